r"""Error against compute and data on scikit-learn's digits: four models, five sizes of the data.

python -m vit_jax.scaling run configs/scaling/digits.py --root=runs/digits_study --workers=2
python -m vit_jax.scaling fit runs/digits_study --model=model.width --size=train_examples

A small copy of the papers' studies: models of width 16 to 128 train on all 1,442 digits for five
durations, and the largest also on nested subsets of them. docs/scaling.md shows the result.
"""

from configs import common, digits

WIDTHS = (16, 32, 64, 128)
IMAGES = (4_000, 8_000, 16_000, 32_000, 64_000)
EXAMPLES = (90, 180, 360, 720, 1442)


def get_config(arg=None):
    options = common.parse_arg(arg)
    config = digits.get_config()
    config.num_epochs, config.total_steps = None, 1000
    config.model.update(width=64, depth=2, num_heads=4, mlp_dim=None)
    config.schedule.update(base_lr=2e-3, warmup_steps=40)
    config.augment.label_smoothing = 0.0
    config.log_every_steps, config.eval_every_steps = 50, 0  # evaluated at the end
    config.checkpoint_every_steps = 200
    config.best_metric, config.report = "", False
    return common.quick(config) if options.quick else config


def get_study(arg=None):
    options = common.parse_arg(arg)
    if options.quick:
        return {"axes": {"model.depth": (1, 2), "images": (1280, 2560)}}
    compute = {"axes": {"model.width": WIDTHS, "images": IMAGES}}
    data = {
        "axes": {"examples": EXAMPLES},
        "set": {"model.width": WIDTHS[-1], "images": IMAGES[-1], "dataset.examples_balanced": True},
    }
    return {"collect": ("val/accuracy", "val/loss"), "stages": {"compute": compute, "data": data}}
