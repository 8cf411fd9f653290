r"""Growing in depth: the same compute with and without a shallow model to start from, on digits.

python -m vit_jax.scaling run configs/scaling/growing.py --root=runs/growing --workers=2

`shallow` trains two blocks; `grown` goes on with four, stacked from those two (`init_from_depth`);
and `scratch` trains four from the beginning, for 0.3% fewer FLOPs than the two together. Three
seeds each.
"""

from configs import common
from configs.scaling import digits

SHALLOW, GROWN = 32_000, 16_000  # images
SEEDS = (0, 1, 2)


def get_config(arg=None):
    return digits.get_config(arg)


def get_study(arg=None):
    quick = common.parse_arg(arg).quick
    shallow, grown = (2560, 1280) if quick else (SHALLOW, GROWN)
    seeds = SEEDS[:1] if quick else SEEDS
    grow = {"init_from": "{parent}", "init_from_depth": "stack", "model.depth": 4}
    return {
        "collect": ("val/accuracy", "val/loss"),
        "stages": {
            "shallow": {"axes": {"seed": seeds}, "set": {"model.depth": 2, "images": shallow}},
            "grown": {
                "after": "shallow",
                "inherit": ("seed",),
                "set": {**grow, "images": grown},
            },
            "scratch": {
                "axes": {"seed": seeds},
                "set": {"model.depth": 4, "images": shallow // 2 + grown},
            },
        },
    }
