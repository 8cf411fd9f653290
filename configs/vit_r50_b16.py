r"""ViT-R50+B/16 (hybrid) on ImageNet from scratch, 224 px, 300 epochs.

python train.py --config=configs/vit_r50_b16.py

The paper's hybrid: a ResNet-50 without its last stage, and a base ViT.
No result is published for this size from ImageNet alone.
Try it without ImageNet: --config=configs/vit_r50_b16.py:quick
"""

from configs import common


def get_config(arg=None):
    options = common.imagenet_options(arg)
    config = common.imagenet("R50+B/16", options)
    return common.quick(config) if options.quick else config
