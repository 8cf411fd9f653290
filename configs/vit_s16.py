r"""ViT-S/16 on ImageNet from scratch, 224 px, 300 epochs.

python train.py --config=configs/vit_s16.py

A small ViT that one 8-chip host trains in a day.
No result is published for this base recipe; from scratch, an S/16 reaches 76.5% in 90 epochs with
average pooling and RandAugment (arXiv:2205.01580), 79.8% with DeiT's recipe
(arXiv:2012.12877).
Try it without ImageNet: --config=configs/vit_s16.py:quick
"""

from configs import common


def get_config(arg=None):
    options = common.imagenet_options(arg)
    config = common.imagenet("S/16", options)
    return common.quick(config) if options.quick else config
