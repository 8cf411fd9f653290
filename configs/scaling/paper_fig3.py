r"""Transfer against the size of the pre-training set: figure 3 of "An image is worth 16x16 words".

python -m vit_jax.scaling run configs/scaling/paper_fig3.py --root=DIR --dry_run

Five models are pre-trained on ImageNet (1.28 M images) and on ImageNet-21k (14 M), and fine-tuned
on ImageNet at 384 px (H/14: 378). The paper's third set, JFT-300M, isn't public: DATA takes
the name of any other.

What the paper found (arXiv:2010.11929, section 4.3; accuracies in % from Table 5): on the smallest
set, large models are worse than base models; on the largest, they are the best.
                       B/16   B/32   L/16   L/32   H/14
  ImageNet            77.91  73.38  76.53  71.16
  ImageNet-21k        83.97  81.28  85.15  80.99  85.13
  JFT-300M            84.15  80.73  87.12  84.37  88.04
Nothing of this was measured with this code. Try it on digits: ...paper_fig3.py:quick
"""

from configs import common, recipes

MODELS = ("B/32", "B/16", "L/32", "L/16", "H/14")
DATA = ("imagenet", "imagenet21k")


def get_config(arg=None):
    """Returns the configuration of a pre-training run (Table 3)."""
    options = common.parse_arg(arg, model="B/16", data="imagenet21k")
    config = common.get_config()
    config.model.variant = options.model
    config.image_size = 224
    recipes.paper(config)
    config.num_epochs = 300.0
    if options.data != "imagenet":
        config.num_epochs = 90.0
        config.optimizer.weight_decay = 0.03
        config.schedule.update(name="linear", base_lr=1e-3)
        config.dataset.update(name=options.data, eval_split="validation")
    if options.data == "imagenet21k":
        recipes.imagenet21k(config)
        config.loss, config.model.head_bias_init = "softmax", 0.0
    if options.quick:
        common.quick(config)
        config.dataset.examples = 0.1 if options.data == "imagenet" else None
    return config


def get_study(arg=None):
    quick = common.parse_arg(arg, model="", data="").quick
    suffix = ",quick" if quick else ""
    return {
        "collect": ("val/accuracy",),
        "stages": {
            "pretrain": {"axes": {":data": DATA, ":model": MODELS[:2] if quick else MODELS}},
            "transfer": {
                "config": f"configs/finetune.py:dataset=imagenet{suffix}",
                "after": "pretrain",
                "inherit": (":model",),
                "set": {"init_from": "{parent}"},
            },
        },
    }
