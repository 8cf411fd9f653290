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
    config.augment.randaugment_kind = "tensorflow"
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
    config.augment.update(
        randaugment_kind="tensorflow", randaugment_layers=2, randaugment_magnitude=10.0
    )
    config.augment.mixup_alpha = 0.2


def deit(config) -> None:
    """Applies DeiT's recipe without distillation (arXiv:2012.12877, Table 9).

    Differences from DeiT: the learning rate changes at each step instead of each epoch, and warms
    up from 0 instead of 1e-6; MixUp and CutMix draw once for the whole batch, instead of once for
    each GPU; an area to erase that is too long for the image keeps its size, instead of being
    drawn again.
    """
    as_in_timm(config)
    config.batch_size = 1024
    config.schedule.base_lr = 1e-3  # 5e-4 per 512 examples
    config.schedule.end_lr = 1e-5
    config.schedule.warmup_steps = 6_255  # 5 epochs
    config.optimizer.weight_decay = 0.05
    config.grad_clip_norm = 0.0
    config.ema_decay = 0.99996
    config.model.stochastic_depth_rate = 0.1
    config.dataset.repeats = 3
    timm_randaugment(config)
    config.augment.update(erasing_prob=0.25, erasing_fill="noise", label_smoothing=0.1)


def as_in_timm(config) -> None:
    """Sets what DeiT and DeiT III share: timm's model and images, and MixUp or CutMix."""
    config.model.gelu = "exact"
    config.augment.update(
        crop_area=(0.08, 1.0),
        crop_distribution="area",
        resize_method="bicubic",
        eval_method="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
    )


def timm_randaugment(config) -> None:
    """Sets timm's rand-m9-mstd0.5-inc1."""
    config.augment.update(randaugment_kind="timm", randaugment_layers=2, randaugment_magnitude=9.0)


# DeiT III by variant: learning rate and image size from scratch; rates of stochastic depth from
# scratch, in fine-tuning and on ImageNet-21k; image size in fine-tuning; image size and epochs on
# ImageNet-21k. From facebookresearch/deit, README_revenge.md, where H/14 has 160 and 128 pixels,
# of which patches of 14 cover 154 and 126.
DEIT3 = {
    "S/16": dict(lr=4e-3, size=224, depth=(0.05, 0.0, 0.05), tuned_size=384, on_21k=(224, 240)),
    "B/16": dict(lr=3e-3, size=192, depth=(0.2, 0.2, 0.1), tuned_size=224, on_21k=(224, 240)),
    "L/16": dict(lr=3e-3, size=192, depth=(0.45, 0.45, 0.3), tuned_size=224, on_21k=(224, 240)),
    "H/14": dict(lr=3e-3, size=154, depth=(0.6, 0.55, 0.5), tuned_size=224, on_21k=(126, 90)),
}


def deit3(config) -> None:
    """Applies DeiT III's recipe from scratch (arXiv:2204.07118), for `deit3_finetune` to follow.

    All but S/16 train at a lower resolution than they are tested at. Differences from DeiT III:
    those of `deit`; color jitter has a fixed order, and the blur is exactly a Gaussian; LAMB scales
    the kernels of queries, keys and values each by its own norm, and leaves out the head, which
    starts at zero; other kernels start as in the ViT paper.
    """
    settings = deit3_settings(config)
    deit3_model(config)
    config.image_size = settings["size"]
    config.num_epochs = 800.0
    config.batch_size = 2048
    config.loss = "sigmoid"
    config.loss_args = dict(binary=True, mean=True)
    config.optimizer.update(name="lamb", mu_dtype="float32")
    config.optimizer.weight_decay = 0.05
    config.schedule.base_lr = settings["lr"]
    config.schedule.end_lr = 1e-5
    config.schedule.warmup_steps = 3_125  # 5 epochs
    config.model.stochastic_depth_rate = settings["depth"][0]
    config.dataset.repeats = 3
    config.augment.update(three_augment=True, color_jitter=(0.3, 0.3, 0.3))


def deit3_finetune(config) -> None:
    """Fine-tunes a model of `deit3` at the resolution that it is tested at, for 20 epochs."""
    settings = deit3_settings(config)
    deit3_model(config)
    config.init_from_required = True
    config.init_from_hint = (
        "Fine-tuning starts from weights: add --config.init_from=RUN, the folder of a run of "
        "recipe=deit3 without `finetune`"
    )
    config.image_size = settings["tuned_size"]
    config.num_epochs = 20.0
    config.batch_size = 512
    config.optimizer.weight_decay = 0.1
    config.grad_clip_norm = 0.0
    config.schedule.base_lr = config.schedule.end_lr = 1e-5  # constant after the warmup
    config.schedule.warmup_steps = 12_510  # 5 epochs
    config.model.stochastic_depth_rate = settings["depth"][1]
    timm_randaugment(config)
    config.augment.label_smoothing = 0.1


def deit3_21k(config) -> None:
    """Pre-trains on ImageNet-21k as DeiT III does; after `deit3` and `imagenet21k`."""
    settings = deit3_settings(config)
    config.image_size, epochs = settings["on_21k"]
    config.num_epochs = float(epochs)
    config.loss, config.loss_args = "softmax", None
    config.model.head_bias_init = 0.0
    config.optimizer.weight_decay = 0.02
    config.schedule.base_lr = 1e-3
    config.schedule.warmup_steps = 34_660  # 5 epochs of 14.2 million images
    config.model.stochastic_depth_rate = settings["depth"][2]
    config.dataset.repeats = 1
    config.augment.update(crop="simple", mixup_alpha=0.0, label_smoothing=0.1)


def modern(config) -> None:
    """Applies ViT-5's model (arXiv:2602.08071) and, with it, DeiT III's recipe from scratch.

    LayerScale, which `deit3` has too; RMSNorm; QK-norm, without biases; four registers; rotary
    positions beside learned ones. configs/scaling/modern.py leaves out one at a time. Differences
    from ViT-5: registers have no rotary positions of their own; and those of `deit3`.
    """
    deit3(config)
    config.model.update(norm_layer="rmsnorm", qk_norm=True, qkv_bias=False, reg_tokens=4)
    config.model.update(rope="axial", rope_temperature=10_000.0)


def deit3_settings(config) -> dict:
    """Returns the row of DEIT3 of a configuration's variant."""
    variant = config.model.variant
    if variant not in DEIT3:
        raise ValueError(f"recipes deit3 and modern are for {', '.join(DEIT3)}, not for {variant}")
    return DEIT3[variant]


def deit3_model(config) -> None:
    """Sets what all of DeiT III's recipes share: the model, and how images are seen."""
    as_in_timm(config)
    config.model.init_values = 1e-4  # LayerScale
    config.model.stochastic_depth_profile = "constant"
    config.model.no_embed_class = True
    config.augment.eval_crop = 1.0


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
