r"""ViT-L/32 on ImageNet from scratch, 224 px, 300 epochs.

python train.py --config=configs/vit_l32.py

The paper's large model with large patches.
Expect about 66.9% without augmentation or dropout (Google's result for 300 epochs,
github.com/google-research/vision_transformer/issues/62).
Try it without ImageNet: --config=configs/vit_l32.py:quick
"""

from configs import common


def get_config(arg=None):
    options = common.imagenet_options(arg)
    config = common.imagenet("L/32", options)
    return common.quick(config) if options.quick else config
