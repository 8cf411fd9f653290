"""Published ways to train a ViT on ImageNet, each a function over a configuration.

`configs/vit_*.py:recipe=NAME` picks one; what a recipe doesn't name stays as in `common.imagenet`.
"""

# RandAugment's (layers, magnitude) and MixUp's alpha: arXiv:2106.10270, section 3.3; the names are
# those of the paper's figures.
AUGREG = {
    "none": (0, 0.0, 0.0),
    "light1": (2, 0.0, 0.0),
    "light2": (2, 10.0, 0.2),
    "medium1": (2, 15.0, 0.2),
    "medium2": (2, 15.0, 0.5),
    "strong1": (2, 20.0, 0.5),
    "strong2": (2, 20.0, 0.8),
}

# What does best for 300 epochs of ImageNet (figure 4 of the paper, as big_vision's vit_i1k.py reads
# it): augmentation by size, and dropout with stochastic depth for B and L.
AUGREG_BY_SIZE = {"Ti/16": "light1", "S/32": "medium1"}
REGULARISED = ("B", "L", "H")  # sizes

# The same for ImageNet-21k, where neither dropout nor stochastic depth helps (vit_i21k.py there).
AUGREG_BY_SIZE_21K = {
    "Ti/16": "none",
    "S/32": "none",
    "S/16": "light1",
    "B/32": "light2",
    "B/16": "light2",
}

WIDTHS = {"Ti": 192, "S": 384, "B": 768, "L": 1024, "H": 1280}  # of the representation layer


def size(variant: str) -> str:
    """The transformer's size: "B" of "B/16" and of "R50+B/16"."""
    return variant.rpartition("+")[2].partition("/")[0]


def augreg(config, aug: str, reg: float, on_21k: bool = False) -> None:
    """AugReg (arXiv:2106.10270): RandAugment and MixUp by strength; dropout and stochastic depth.

    aug: one of AUGREG, "" for the paper's choice; reg: the rate of both, below 0 for the paper's.
    Loss, head bias and representation layer as in big_vision's configs/vit_i1k.py.
    """
    variant = config.model.variant
    aug = aug or (AUGREG_BY_SIZE_21K if on_21k else AUGREG_BY_SIZE).get(variant, "medium2")
    if aug not in AUGREG:
        raise ValueError(f"key 'aug' is {aug!r}; it can be {', '.join(AUGREG)}")
    if reg < 0:
        reg = 0.1 if size(variant) in REGULARISED and not on_21k else 0.0
    layers, magnitude, mixup_alpha = AUGREG[aug]
    config.augment.randaugment_layers = layers
    config.augment.randaugment_magnitude = magnitude
    config.augment.mixup_alpha = mixup_alpha
    config.model.dropout_rate = config.model.stochastic_depth_rate = reg
    config.loss = "sigmoid"
    config.model.head_bias_init = -6.9
    config.model.representation_size = None if on_21k else WIDTHS[size(variant)]


def paper(config) -> None:
    """The original paper's ImageNet from scratch (arXiv:2010.11929, table 3; head: section 3.1)."""
    config.model.representation_size = WIDTHS[size(config.model.variant)]
    config.schedule.base_lr = 3e-3
    config.optimizer.weight_decay = 0.3
    config.model.dropout_rate = 0.1


def plain(config, epochs: float) -> None:
    """Better plain ViT baselines for ImageNet-1k (arXiv:2205.01580, section 2)."""
    config.batch_size = 1024
    config.num_epochs = epochs
    config.model.pool = "gap"
    config.model.posemb = "sincos2d"
    config.model.representation_size = WIDTHS[size(config.model.variant)]
    config.augment.randaugment_layers = 2
    config.augment.randaugment_magnitude = 10.0
    config.augment.mixup_alpha = 0.2


def deit(config) -> None:
    """DeiT without distillation (arXiv:2012.12877, table 9).

    Other than there: no repeated augmentation; RandAugment's operations are always applied and of
    one magnitude, on the scale of randaugment.py; images are resized bilinearly.
    """
    config.model.gelu = "exact"
    config.batch_size = 1024
    config.schedule.base_lr = 1e-3  # 5e-4 for each 512
    config.schedule.end_lr = 1e-5
    config.schedule.warmup_steps = 6_255  # 5 epochs
    config.optimizer.weight_decay = 0.05
    config.grad_clip_norm = 0.0
    config.ema_decay = 0.99996
    config.model.stochastic_depth_rate = 0.1
    config.augment.update(
        crop_area=(0.08, 1.0),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        randaugment_layers=2,
        randaugment_magnitude=9.0,
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
        erasing_prob=0.25,
        erasing_fill="noise",
        label_smoothing=0.1,
    )


def imagenet21k(config) -> None:
    """Pre-training on ImageNet-21k with a sigmoid loss (arXiv:2106.10270), 300 epochs.

    TFDS doesn't prepare this dataset; what you prepared under that name in data_dir is found. Its
    first 51,200 examples are for evaluation.
    """
    config.dataset.update(name="imagenet21k", train_split="full[51200:]", eval_split="full[:51200]")
    config.loss = "sigmoid"
    config.model.head_bias_init = -10.0
