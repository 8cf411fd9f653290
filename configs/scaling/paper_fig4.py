r"""Few-shot accuracy against the number of pre-training images: figure 4 of the ViT paper.

python -m vit_jax.scaling run configs/scaling/paper_fig4.py --root=DIR --dry_run

Four models are pre-trained on nested random subsets of one dataset, with the same settings for
all sizes and no further regularization. Every evaluation adds a linear 5-shot classifier on
ImageNet, and with `early_stopping` the best one counts.

The paper (arXiv:2010.11929, section 4.3) takes 9, 30, 90 and 303 million images of JFT-300M,
which isn't public; here they are 1, 3 and 10 million of ImageNet-21k, or `data=NAME`. Its ViT-b,
B with all widths halved, is S/32 here.
What it found: ResNets are better on the smaller subsets but level off sooner. B/32 is much worse
than a ResNet-50, which is slightly slower, on 9 million images, and better on 90 million and more;
the same holds for L/16 and ResNet-152x2.
Nothing of this was measured with this code. Try it on digits: ...paper_fig4.py:quick"""

from configs import common, recipes

MODELS = ("S/32", "B/32", "L/32", "L/16")
EXAMPLES = (1e6, 3e6, 1e7)
RATES = {"L/32": 6e-4, "L/16": 4e-4}  # Table 3; B: 8e-4


def get_config(arg=None):
    options = common.parse_arg(arg, model="B/32", data="imagenet21k")
    config = common.get_config()
    config.model.variant = options.model
    config.image_size = 224
    config.batch_size = 4096
    config.total_steps = 500_000  # 2 billion images: seven epochs of 300 million
    recipes.imagenet21k(config)
    if options.data != "imagenet21k":
        config.dataset.update(name=options.data, train_split="train", eval_split="validation")
    config.loss, config.model.head_bias_init = "softmax", 0.0
    config.optimizer.weight_decay = 0.1
    config.schedule.update(name="linear", base_lr=RATES.get(options.model, 8e-4))
    config.eval_every_steps = 10_000
    fewshot = {"kind": "fewshot", "shots": (5,)}
    elsewhere = {"name": "imagenet2012", "train_split": "train", "split": "validation"}
    config.best_metric = "accuracy"
    config.evals = {"fewshot": fewshot if options.quick else fewshot | elsewhere}
    return common.quick(config) if options.quick else config


def get_study(arg=None):
    quick = common.parse_arg(arg, model="", data="").quick
    return {
        "collect": ("fewshot/accuracy_5shot", "val/accuracy"),
        "early_stopping": True,
        "axes": {
            ":model": MODELS[:2] if quick else MODELS,
            "examples": (100, 1000) if quick else EXAMPLES,
        },
    }
