r"""A small ViT on CIFAR-10 from scratch: 32 px, patch 4, 300 epochs at batch 128.

python train.py --config=configs/cifar10.py
python train.py --config=configs/cifar10.py:model=small     # width 384, 12 layers, 6 heads
python train.py --config=configs/cifar10.py:schedule=step   # x 0.1 every 100 epochs

No accuracy is published for exactly this recipe; it was not trained to the end with this code.
Try it without CIFAR-10: --config=configs/cifar10.py:quick
"""

from configs import common

STEPS_PER_EPOCH = 50_000 / 128


def get_config(arg=None):
    options = common.parse_arg(arg, model="tiny", schedule="cosine")
    config = common.get_config()
    config.num_epochs = 300.0
    config.batch_size = 128
    config.image_size = 32

    config.dataset.name = "cifar10"
    config.dataset.eval_split = "test"

    config.augment.crop = "pad"
    config.augment.pad = 4
    config.augment.color_jitter = (0.2, 0.2, 0.2)
    config.augment.erasing_prob = 0.5  # Cutout
    config.augment.erasing_area = (0.1, 0.4)
    config.augment.label_smoothing = 0.1
    config.augment.eval_crop = 1.0

    if options.model == "small":
        config.model.update(variant="S/16", patch_size=4)
    elif options.model == "tiny":
        config.model.variant = "Ti/16"
        config.model.update(patch_size=4, width=256, depth=6, num_heads=8, mlp_dim=512)
    else:
        raise ValueError(f"key 'model' is {options.model!r}; it must be tiny or small")
    config.model.stochastic_depth_rate = 0.1

    config.optimizer.weight_decay = 0.01
    config.schedule.base_lr = 1e-3
    config.schedule.warmup_steps = 1_000
    config.schedule.name = options.schedule
    config.schedule.decay_steps = round(100 * STEPS_PER_EPOCH)
    config.schedule.decay_factor = 0.1
    return common.quick(config) if options.quick else config
