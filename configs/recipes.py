"""Published ways to train a ViT on ImageNet, each a function that changes a configuration.

`configs/vit_*.py:recipe=NAME` chooses one. What a recipe doesn't set stays as in
`common.imagenet`.
"""

# From arXiv:2106.10270, section 3.3: RandAugment's layers and magnitude, MixUp's alpha.
AUGREG = {
    "none": dict(layers=0, magnitude=0.0, mixup_alpha=0.0),
    "light1": dict(layers=2, magnitude=0.0, mixup_alpha=0.0),
    "light2": dict(layers=2, magnitude=10.0, mixup_alpha=0.2),
    "medium1": dict(layers=2, magnitude=15.0, mixup_alpha=0.2),
    "medium2": dict(layers=2, magnitude=15.0, mixup_alpha=0.5),
    "strong1": dict(layers=2, magnitude=20.0, mixup_alpha=0.5),
    "strong2": dict(layers=2, magnitude=20.0, mixup_alpha=0.8),
}

# The best settings for 300 epochs of ImageNet, if not medium2 (figure 4, as in big_vision's
# vit_i1k.py); B, L and H also need dropout and stochastic depth.
AUGREG_BY_VARIANT = {"Ti/16": "light1", "S/32": "medium1"}
REGULARIZED_SIZES = ("B", "L", "H")

# The best settings for ImageNet-21k (vit_i21k.py); neither dropout nor stochastic depth helps.
AUGREG_BY_VARIANT_21K = {
    "Ti/16": "none",
    "S/32": "none",
    "S/16": "light1",
    "B/32": "light2",
    "B/16": "light2",
}


def size(variant: str) -> str:
    """Returns the transformer's size: "B" for "B/16" and for "R50+B/16"."""
    return variant.rpartition("+")[2].partition("/")[0]


def augreg(config, aug: str, reg: float, on_21k: bool = False) -> None:
    """Applies AugReg (arXiv:2106.10270): RandAugment, MixUp, dropout and stochastic depth.

    Loss, head bias and representation layer are those of big_vision's configs/vit_i1k.py.

    Args:
        aug: a key of AUGREG; "": the paper's choice for the variant.
        reg: the rate of dropout and of stochastic depth; negative: the paper's choice.
        on_21k: whether the dataset is ImageNet-21k.
    """
    variant = config.model.variant
    best = AUGREG_BY_VARIANT_21K if on_21k else AUGREG_BY_VARIANT
    aug = aug or best.get(variant, "medium2")
    if aug not in AUGREG:
        raise ValueError(f"key 'aug' is {aug!r}; it must be one of {', '.join(AUGREG)}")
    if reg < 0:
        reg = 0.1 if size(variant) in REGULARIZED_SIZES and not on_21k else 0.0
    config.augment.randaugment_layers = AUGREG[aug]["layers"]
    config.augment.randaugment_magnitude = AUGREG[aug]["magnitude"]
    config.augment.mixup_alpha = AUGREG[aug]["mixup_alpha"]
    config.model.dropout_rate = config.model.stochastic_depth_rate = reg
    config.loss = "sigmoid"
    config.model.head_bias_init = -6.9
    config.model.representation_size = None if on_21k else True


def paper(config) -> None:
    """Applies the paper's recipe from scratch (arXiv:2010.11929, Table 3; head: section 3.1)."""
    config.model.representation_size = True
    config.schedule.base_lr = 3e-3
    config.optimizer.weight_decay = 0.3
    config.model.dropout_rate = 0.1


def plain(config, epochs: float) -> None:
    """Applies "Better plain ViT baselines for ImageNet-1k" (arXiv:2205.01580, section 2)."""
    config.batch_size = 1024
    config.num_epochs = epochs
    config.model.pool = "gap"
    config.model.posemb = "sincos2d"
    config.model.representation_size = True
    config.augment.randaugment_layers = 2
    config.augment.randaugment_magnitude = 10.0
    config.augment.mixup_alpha = 0.2


def deit(config) -> None:
    """Applies DeiT's recipe without distillation (arXiv:2012.12877, Table 9).

    Differences from DeiT: no repeated augmentation; RandAugment always applies its operations, at
    one magnitude, on the scale of vit_jax/data/randaugment.py; images are resized bilinearly.
    """
    config.model.gelu = "exact"
    config.batch_size = 1024
    config.schedule.base_lr = 1e-3  # 5e-4 per 512 examples
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
    """Pre-trains on ImageNet-21k with a sigmoid loss (arXiv:2106.10270), for 300 epochs.

    TFDS can't prepare this dataset: prepare it yourself in data_dir under the name imagenet21k.
    The first 51,200 examples are for evaluation.
    """
    imagenet21k_splits(config)
    config.loss = "sigmoid"
    config.model.head_bias_init = -10.0


def imagenet21k_splits(config) -> None:
    """Selects ImageNet-21k, and holds out its first 51,200 examples for evaluation."""
    config.dataset.update(name="imagenet21k", train_split="full[51200:]", eval_split="full[:51200]")
