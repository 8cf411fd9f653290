r"""Scaling depth, width, MLP, patch size or all: figure 8 of the ViT paper.

python -m vit_jax.scaling run configs/scaling/paper_fig8.py --root=DIR --dry_run

From a base of 8 layers, width 1024, MLP 2048 and patch 32, one dimension at a time is doubled or
halved, and then all at once. The figure is of ImageNet 5-shot accuracy against relative compute;
which values it has for each dimension, the paper doesn't list, so these are doublings.

What the paper found (arXiv:2010.11929, appendix D.2): depth improves most, clearly up to 64
layers but with diminishing returns from 16 on; width changes least; smaller patches improve
robustly, without more parameters; so compute may predict performance better than the number of
parameters, and scaling should favor depth over width, if either; scaling all dimensions alike
works robustly too.
Nothing of this was measured with this code. Try it on digits: ...paper_fig8.py:quick"""

from configs import common, recipes

BASE = {"depth": 8, "width": 1024, "mlp_dim": 2048, "patch_size": 32}
STAR = {
    "depth": (1, 2, 4, 16, 32, 64),
    "width": (128, 256, 512, 2048),
    "mlp_dim": (256, 512, 1024, 4096, 8192),
    "patch_size": (8, 16),
}
ALL = (0.25, 0.5, 2)


def get_config(arg=None):
    options = common.parse_arg(arg, data="imagenet21k")
    config = common.get_config()
    config.model.variant = "L/32"
    config.model.update(BASE)
    config.image_size = 224
    config.batch_size = 4096
    config.num_epochs = 30.0
    recipes.imagenet21k(config)
    if options.data != "imagenet21k":
        config.dataset.update(name=options.data, train_split="train", eval_split="validation")
    config.loss, config.model.head_bias_init = "softmax", 0.0
    config.schedule.update(name="linear", base_lr=6e-4)
    fewshot = {"kind": "fewshot", "shots": (5,), "every_steps": 50_000}
    elsewhere = {"name": "imagenet2012", "train_split": "train", "split": "validation"}
    config.evals = {"fewshot": fewshot if options.quick else fewshot | elsewhere}
    return common.quick(config) if options.quick else config


def get_study(arg=None):
    quick = common.parse_arg(arg, model="", data="").quick
    star = {"depth": (1,), "width": (32,), "patch_size": (8,)} if quick else STAR
    cells = [{"model.depth": 2 if quick else BASE["depth"]}]
    cells += [{f"model.{name}": value} for name, values in star.items() for value in values]
    for factor in () if quick else ALL:
        cells.append({f"model.{n}": int(BASE[n] * factor) for n in ("depth", "width", "mlp_dim")})
        cells[-1]["model.patch_size"] = int(BASE["patch_size"] / factor)
        if factor < 1:
            cells[-1]["model.patch_size"] = BASE["patch_size"]  # 64 or more doesn't divide 224
    return {"collect": ("fewshot/accuracy_5shot", "val/accuracy"), "cells": cells}
