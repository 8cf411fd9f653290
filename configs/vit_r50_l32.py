r"""ViT-R50+L/32 (hybrid) on ImageNet from scratch, 224 px, 300 epochs.

python train.py --config=configs/vit_r50_l32.py

A ResNet-50 and a large ViT.
No result is published for this size from ImageNet alone.
Try it without ImageNet: --config=configs/vit_r50_l32.py:quick
"""

from configs import common


def get_config(arg=None):
    options = common.imagenet_options(arg)
    config = common.imagenet("R50+L/32", options)
    return common.quick(config) if options.quick else config
