r"""ViT-Ti/16 on ImageNet from scratch, 224 px, 300 epochs.

python train.py --config=configs/vit_ti16.py

The smallest of the family, for quick studies.
No result is published for this base recipe; with DeiT's augmentation a Ti/16 from scratch
reaches 72.2% (arXiv:2012.12877, Table 5).
Try it without ImageNet: --config=configs/vit_ti16.py:quick
"""

from configs import common


def get_config(arg=None):
    options = common.imagenet_options(arg)
    config = common.imagenet("Ti/16", options)
    return common.quick(config) if options.quick else config
