r"""ViT-g/14 as in "Scaling Vision Transformers" (arXiv:2106.04560), 224 px, 16 billion images.

python train.py --config=configs/vit_g14.py --config.dataset.data_dir=DIR --config.mesh.fsdp=16

The settings of big_vision's configs/proj/scaling_laws/train_vit_g.py: Adafactor; weight decay 3.0
on the head and 0.03 on the body; attention pooling; after 10,000 warmup steps a learning rate that
falls as 1 / sqrt(step), and over the last 50,000 steps to 0. `model=G/14` is the larger model.
The paper pre-trains on JFT-3B, which isn't public, and reports 90.45% for G/14 after fine-tuning on
ImageNet. Here the dataset is ImageNet-21k (docs/recipes.md), or `dataset=NAME`; no result is known.
Try it without ImageNet: --config=configs/vit_g14.py:quick
"""

from configs import common, recipes


def get_config(arg=None):
    options = common.parse_arg(arg, model="g/14", dataset="imagenet21k")
    config = common.get_config()
    config.model.variant = options.model
    config.model.pool = "map"
    recipes.imagenet21k(config)  # a sigmoid loss, and the head's bias at -10
    if options.dataset != "imagenet21k":
        config.dataset.update(name=options.dataset, train_split="train", eval_split="validation")
    config.image_size = 224
    config.batch_size = 16_384
    config.total_steps = 1_000_000

    config.optimizer.update(name="adafactor", weight_decay=0.03)
    config.optimizer.weight_decay_multipliers = (("head", 100.0),)
    config.schedule.update(name="rsqrt", base_lr=8e-4, timescale=10_000)
    config.schedule.update(warmup_steps=10_000, cooldown_steps=50_000)
    return common.quick(config) if options.quick else config
