r"""The compute-optimal shape: a star sweep, then a grid, as in "Getting ViT in Shape".

python -m vit_jax.scaling run configs/scaling/vit_in_shape.py --root=DIR --dry_run
python -m vit_jax.scaling fit DIR/star --shape=model.width,model.depth,model.mlp_dim

The star changes one of width, depth and MLP dimension at a time, from a large center, which gives
the exponents with which each grows with compute; the grid of small models gives the shape to grow
from (arXiv:2305.13035). The star's values are the paper's; those of the grid are this page's,
around the paper's best: width 608, depth 10, MLP 928.

What the paper found, on JFT-3B, which isn't public (`data=NAME`; default: ImageNet-21k): around the
center of width 1968, depth 40 and MLP 6144, the optimum grows as compute^0.22 (width), compute^0.45
(depth) and compute^0.6 (MLP). Its SoViT-400m/14 (width 1152, depth 27, MLP 4304) reaches 90.3% on
ImageNet after fine-tuning at 518 px, more than the larger g/14, with less than half of the
inference cost of G/14, whose 90.45% it approaches.
Nothing of this was measured with this code. Try it on digits: ...vit_in_shape.py:quick
"""

from configs import common, vit_g14

CENTER = {"width": 1968, "depth": 40, "mlp_dim": 6144}
STAR = {
    "width": (608, 768, 928, 1088, 1328, 1648),
    "depth": (8, 10, 12, 16, 20, 24),
    "mlp_dim": (1088, 1360, 1728, 2160, 2592, 3072),
}
GRID = {
    "model.width": (416, 608, 800),
    "model.depth": (8, 10, 12),
    "model.mlp_dim": (768, 928, 1088),
}


def get_config(arg=None):
    options = common.parse_arg(arg, data="imagenet21k")
    config = vit_g14.get_config(f"model=g/14,dataset={options.data}")
    config.batch_size = 4096
    config.total_steps = 500_000
    config.model.update(CENTER)
    fewshot = {"kind": "fewshot", "shots": (10,), "every_steps": 50_000}
    elsewhere = {"name": "imagenet2012", "train_split": "train", "split": "validation"}
    config.evals = {"fewshot": fewshot if options.quick else fewshot | elsewhere}
    return common.quick(config) if options.quick else config


def get_study(arg=None):
    quick = common.parse_arg(arg, model="", data="").quick
    center = {"width": 64, "depth": 2, "mlp_dim": 128} if quick else CENTER
    star = {"width": (32,), "depth": (1,)} if quick else STAR
    cells = [center, *({**center, name: x} for name, values in star.items() for x in values)]
    cells = [{f"model.{name}": value for name, value in cell.items()} for cell in cells]
    grid = {"model.width": (32, 48), "model.mlp_dim": (64,)} if quick else GRID
    return {
        "collect": ("fewshot/accuracy_10shot", "val/accuracy"),
        "stages": {"star": {"cells": cells}, "grid": {"axes": grid}},
    }
