r"""What each part of a modern ViT is worth: `recipe=modern`, and without one part at a time.

python -m vit_jax.scaling run configs/scaling/modern.py --root=DIR --dry_run

ViT-5 (arXiv:2602.08071) adds RMSNorm, QK-norm without biases, registers and rotary positions to
DeiT III's model, which has LayerScale. Its B reaches 84.2% on ImageNet, and DeiT III's 83.8%
(abstract). `without=all` is DeiT III's model. ARG: `model=S/16` and so on.
Nothing of this was measured with this code. Try it on digits: ...modern.py:quick"""

from configs import common

PARTS = {
    "RMSNorm": {"model.norm_layer": "layernorm"},
    "QK-norm": {"model.qk_norm": False},
    "no biases": {"model.qkv_bias": True},
    "registers": {"model.reg_tokens": 0},
    "rotary": {"model.rope": "none"},
    "learned positions": {"model.posemb": "none", "model.no_embed_class": False},
    "LayerScale": {"model.init_values": None},
}


def get_config(arg=None):
    options = common.parse_arg(arg, model="B/16")
    config = common.imagenet(options.model, common.imagenet_options("recipe=modern"))
    return common.quick(config) if options.quick else config


def get_study(arg=None):
    quick = common.parse_arg(arg, model="").quick
    parts = dict(list(PARTS.items())[-2:]) if quick else PARTS
    without = {"nothing": {}, **parts}
    if not quick:  # DeiT III keeps its LayerScale and positions
        kept = ("LayerScale", "learned positions")
        fields = [fields for part, fields in PARTS.items() if part not in kept]
        without["all"] = {name: value for group in fields for name, value in group.items()}
    return {"collect": ("val/accuracy",), "axes": {"without": without}}
