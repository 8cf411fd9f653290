r"""ViT-H/14 on ImageNet from scratch, 224 px, 300 epochs.

python train.py --config=configs/vit_h14.py

The paper's huge model, meant for more data than ImageNet.
No result is published for ImageNet from scratch; the paper pre-trains it on JFT-300M (88.55%
after fine-tuning at 518 px, arXiv:2010.11929, Table 2).
Try it without ImageNet: --config=configs/vit_h14.py:quick
"""

from configs import common


def get_config(arg=None):
    options = common.imagenet_options(arg)
    config = common.imagenet("H/14", options)
    return common.quick(config) if options.quick else config
