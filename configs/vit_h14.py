r"""ViT-H/14 on ImageNet from scratch, 224 px, 300 epochs.

python train.py --config=configs/vit_h14.py

The paper's huge model, made for more data than ImageNet.
No figure is published for ImageNet from scratch; the paper pre-trains it on JFT-300M (88.55 %
after fine-tuning at 518 px, arXiv:2010.11929, Table 2).
Try it without ImageNet: --config=configs/vit_h14.py:quick
"""

from configs import common


def get_config(arg=None):
    config = common.imagenet("H/14", arg)
    config.model.scan = True  # one block compiled once, not one a layer
    config.model.remat = "full"  # a block's activations are computed again, not kept
    return config
