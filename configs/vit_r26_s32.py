r"""ViT-R26+S/32 (hybrid) on ImageNet from scratch, 224 px, 300 epochs.

python train.py --config=configs/vit_r26_s32.py

A ResNet of eight units and a small ViT.
No result is published for this size from ImageNet alone.
Try it without ImageNet: --config=configs/vit_r26_s32.py:quick
"""

from configs import common


def get_config(arg=None):
    options = common.imagenet_options(arg)
    config = common.imagenet("R26+S/32", options)
    return common.quick(config) if options.quick else config
