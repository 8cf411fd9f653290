r"""A small ViT on scikit-learn's 1,797 handwritten digits; nothing is downloaded.

python train.py --config=configs/digits.py

Takes under two minutes on two CPU cores; expect 98 to 99% accuracy on the 355 test digits.
"""

from configs import common


def get_config(arg=None):
    options = common.parse_arg(arg)
    config = common.get_config()

    config.num_epochs = 100.0
    config.batch_size = 64
    config.image_size = 8
    config.dtype = "float32"

    # A TFDS dataset, prepared by `tfds build NAME`, or a folder; it tells the number of classes.
    config.dataset.name = "digits"
    config.dataset.eval_split = "test"  # common.py: "validation"; train_split is "train"
    config.dataset.channels = 1  # common.py: 3

    config.augment.crop = "pad"
    config.augment.pad = 1
    config.augment.flip = False  # mirrored digits are not digits
    config.augment.eval_crop = 1.0
    config.augment.label_smoothing = 0.1

    config.model.variant = "Ti/16"
    config.model.update(patch_size=4, width=128, depth=4, num_heads=4, mlp_dim=256, pool="gap")

    config.schedule.warmup_steps = 100

    config.log_every_steps = 100
    config.eval_every_steps = 500
    config.checkpoint_every_steps = 500
    return common.quick(config) if options.quick else config
