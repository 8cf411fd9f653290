r"""The paper's sweep of the learning rate for fine-tuning: held-out data first, then all of it.

python -m vit_jax.scaling run configs/scaling/lr_sweep.py --root=DIR

Each model is fine-tuned on each dataset at four learning rates, with a part of the training split
held out (2% of CIFAR, 10% of Pets and Flowers, 1% of ImageNet); the best rate on that part is
then used on the whole split, and evaluated on the test split (arXiv:2010.11929, appendix B.1.1
and Table 4). `--print` gives the second stage's commands once the first is finished.

What the paper found: Table 4 lists 0.001, 0.003, 0.01 and 0.03 as candidates, on ImageNet 0.003,
0.01, 0.03 and 0.06; with them, B/16 from ImageNet-21k reaches (Table 5) 98.95% on CIFAR-10,
91.67% on CIFAR-100, 94.43% on Pets, 99.38% on Flowers and 83.97% on ImageNet; L/16 99.16, 93.44,
94.73, 99.61 and 85.15%.
Nothing of this was measured with this code. Try it on digits: ...lr_sweep.py:quick"""

from configs import common, finetune

MODELS = ("B/16", "L/16")
RATES = {
    **dict.fromkeys(("cifar10", "cifar100", "pets", "flowers"), (0.001, 0.003, 0.01, 0.03)),
    "imagenet": (0.003, 0.01, 0.03, 0.06),
}


def get_config(arg=None):
    return finetune.get_config(arg)


def get_study(arg=None):
    options = common.parse_arg(arg)
    if options.quick:
        part = {"dataset.train_split": "train[:90%]", "dataset.eval_split": "train[90%:]"}
        whole = {"dataset.train_split": "train", "dataset.eval_split": "test"}
        sweep = {"axes": {":model": ("B/16",), "lr": (0.01, 0.1)}, "set": part}
        return {"stages": {"sweep": sweep, "final": final("quick", whole)}}
    weights = {
        model: {
            ":model": model,
            "init_from": f"{finetune.BUCKET}/imagenet21k/{finetune.PAPER[model]}.npz",
        }
        for model in MODELS
    }
    cells = [{":dataset": name, "lr": rate} for name, rates in RATES.items() for rate in rates]
    sweep = {"config": "configs/finetune.py:sweep", "axes": {"weights": weights}, "cells": cells}
    return {"stages": {"sweep": sweep, "final": final("", {})}}


def final(arg: str, fields: dict) -> dict:
    """Returns the stage that trains on everything, at the best learning rate."""
    preset = f"configs/finetune.py:{arg}" if arg else "configs/finetune.py"
    return {"config": preset, "best": "sweep", "over": ("lr",), "set": fields}
