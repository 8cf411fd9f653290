r"""ViT-B/16 on ImageNet from scratch, 224 px, 300 epochs.

python train.py --config=configs/vit_b16.py

The paper's base model.
Expect about 74.8% without augmentation or dropout (Google's result for 300 epochs,
github.com/google-research/vision_transformer/issues/62); AugReg's augmentation brings about 79%
(github.com/google-research/big_vision/issues/7).
Try it without ImageNet: --config=configs/vit_b16.py:quick
"""

from configs import common


def get_config(arg=None):
    options = common.imagenet_options(arg)
    config = common.imagenet("B/16", options)
    # For another dataset, set here: config.dataset.update(name=..., eval_split=...),
    # config.num_epochs, config.batch_size, and config.schedule.warmup_steps, well below the steps.
    return common.quick(config) if options.quick else config
