r"""ViT-S/32 on ImageNet from scratch, 224 px, 300 epochs.

python train.py --config=configs/vit_s32.py

A small ViT with large patches: a quarter of S/16's tokens.
No result is published for this base recipe.
Try it without ImageNet: --config=configs/vit_s32.py:quick
"""

from configs import common


def get_config(arg=None):
    options = common.imagenet_options(arg)
    config = common.imagenet("S/32", options)
    return common.quick(config) if options.quick else config
