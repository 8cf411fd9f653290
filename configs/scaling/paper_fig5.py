r"""Performance against pre-training compute, ViT and hybrids: figure 5 of the ViT paper.

python -m vit_jax.scaling run configs/scaling/paper_fig5.py --root=DIR --dry_run

Six ViTs and five hybrids see 7 or 14 times 303 million images, and are fine-tuned on five datasets,
whose mean is the figure's axis.

What the paper found (arXiv:2010.11929, section 4.4): a ViT needs 2 to 4 times less compute than a
ResNet for the same mean accuracy; hybrids are slightly better than ViTs at small budgets, and no
better at large ones; and ViTs don't seem to saturate. From its Table 6, pre-trained on JFT-300M,
which isn't public (`data=NAME`; default: ImageNet-21k):
                 epochs  ImageNet  exaFLOPs                    epochs  ImageNet  exaFLOPs
  B/32                7     80.73        55     R50+B/32            7     84.90       106
  B/16                7     84.15       224     R50+B/16            7     85.58       274
  L/32                7     84.37       196     R50+L/32            7     85.68       246
  L/16                7     86.30       783     R50+L/16            7     86.60       859
  L/16               14     87.12     1,567     R50+L/16           14     87.12     1,668
  H/14               14     88.08     4,262
Nothing of this was measured with this code. Try it on digits: ...paper_fig5.py:quick"""

from configs import common, recipes

IMAGES = 303e6  # an epoch of JFT-300M
RUNS = (  # model, epochs, learning rate (Table 3)
    ("B/32", 7, 8e-4),
    ("B/16", 7, 8e-4),
    ("L/32", 7, 6e-4),
    ("L/16", 7, 4e-4),
    ("L/16", 14, 4e-4),
    ("H/14", 14, 3e-4),
    ("R50+B/32", 7, 8e-4),
    ("R50+B/16", 7, 8e-4),
    ("R50+L/32", 7, 2e-4),
    ("R50+L/16", 7, 4e-4),
    ("R50+L/16", 14, 4e-4),
)
TASKS = ("imagenet", "cifar10", "cifar100", "pets", "flowers")


def get_config(arg=None):
    options = common.parse_arg(arg, model="B/16", data="imagenet21k")
    config = common.get_config()
    config.model.variant = options.model
    config.image_size = 224
    config.batch_size = 4096
    config.total_steps = round(7 * IMAGES / config.batch_size)
    recipes.imagenet21k(config)
    if options.data != "imagenet21k":
        config.dataset.update(name=options.data, train_split="train", eval_split="validation")
    config.loss, config.model.head_bias_init = "softmax", 0.0
    config.optimizer.weight_decay = 0.1
    config.schedule.name = "linear"
    return common.quick(config) if options.quick else config


def get_study(arg=None):
    quick = common.parse_arg(arg, model="", data="").quick
    runs = [
        {"run": {f"{model}-{n}": {":model": model, "images": n * IMAGES, "lr": lr}}}
        for model, n, lr in RUNS
    ]
    pretrain = {"axes": {"run": {k: v for run in runs for k, v in run["run"].items()}}}
    if quick:
        pretrain = {"axes": {":model": ("B/32", "R50+B/16"), "images": (1280, 2560)}}
    suffix = ",quick" if quick else ""
    tasks = {
        f"transfer_{task}": {
            "config": f"configs/finetune.py:dataset={task}{suffix}",
            "after": "pretrain",
            "inherit": (":model",),
            "set": {"init_from": "{parent}"},
        }
        for task in TASKS[: 1 if quick else None]
    }
    return {"collect": ("val/accuracy",), "stages": {"pretrain": pretrain, **tasks}}
