r"""ViT-L/16 on ImageNet from scratch, 224 px, 300 epochs.

python train.py --config=configs/vit_l16.py

The paper's large model; ImageNet alone is too little data for it.
Expect about 72.6% without augmentation or dropout (Google's result for 300 epochs,
github.com/google-research/vision_transformer/issues/62).
Try it without ImageNet: --config=configs/vit_l16.py:quick
"""

from configs import common


def get_config(arg=None):
    options = common.imagenet_options(arg)
    config = common.imagenet("L/16", options)
    return common.quick(config) if options.quick else config
