r"""ViT-B/32 on ImageNet from scratch, 224 px, 300 epochs.

python train.py --config=configs/vit_b32.py

The paper's base model with large patches: a quarter of B/16's tokens.
Expect about 69.2% without augmentation or dropout (Google's result for 300 epochs,
github.com/google-research/vision_transformer/issues/62).
Try it without ImageNet: --config=configs/vit_b32.py:quick
"""

from configs import common


def get_config(arg=None):
    options = common.imagenet_options(arg)
    config = common.imagenet("B/32", options)
    return common.quick(config) if options.quick else config
