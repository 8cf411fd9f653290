r"""ViT-R+Ti/16 (hybrid) on ImageNet from scratch, 224 px, 300 epochs.

python train.py --config=configs/vit_r_ti16.py

The root of a ResNet and a tiny ViT, with patches of 8x8 features (32 pixels).
No result is published for this size from ImageNet alone.
Try it without ImageNet: --config=configs/vit_r_ti16.py:quick
"""

from configs import common


def get_config(arg=None):
    options = common.imagenet_options(arg)
    config = common.imagenet("R+Ti/16", options)
    return common.quick(config) if options.quick else config
