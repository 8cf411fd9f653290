"""What all presets share: every field with its default, the arguments after the colon, `quick`."""

import ast
import difflib

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import recipes


def get_config() -> ConfigDict:
    """Every field there is. Presets assign to them; the command line can override each."""
    config = ConfigDict()
    config.seed = 0
    config.num_epochs = placeholder(float)
    config.total_steps = placeholder(int)  # where set, num_epochs doesn't count
    config.batch_size = 4096  # of all devices together
    config.accum_steps = 1  # parts the batch is computed in, one after the other
    config.image_size = placeholder(object)  # pixels: an int, or (height, width)
    config.dtype = "bfloat16"  # of matrix products and activations
    config.loss = "softmax"  # or "sigmoid"
    config.grad_clip_norm = 1.0  # 0: no clipping
    config.on_nonfinite = "stop"  # or "skip": drops the update of a step with such numbers, counts
    config.ema_decay = placeholder(float)  # such as 0.9999; evaluates the average
    # Weights to start from: a published file, or a run's folder. vit_jax/pretrained.py tells which.
    config.init_from = placeholder(str)
    config.init_from_depth = placeholder(str)  # fills a deeper model: "stack", "append"
    config.init_from_patch = placeholder(str)  # "resize": for patches of another size
    config.init_from_grid = placeholder(object)  # (rows, columns) of its positions, if not square
    config.init_from_required = False  # whether a run may not start at random
    config.num_classes = placeholder(int)  # of the dataset, filled in when the run starts

    config.dataset = ConfigDict()
    config.dataset.name = "imagenet2012"
    config.dataset.data_dir = placeholder(str)
    config.dataset.train_split = "train"
    config.dataset.eval_split = "validation"
    config.dataset.channels = 3
    config.dataset.in_memory_mb = 1_000  # TFRecord splits up to this are held encoded in memory
    config.dataset.shuffle_buffer = 20_000  # records, for larger TFRecord splits
    config.dataset.order = placeholder(str)  # "global" or "buffer", filled in when the run starts
    config.dataset.parts = placeholder(int)  # that are shuffled each by itself; likewise
    config.dataset.on_error = "stop"  # or "skip": examples that can't be read or decoded

    config.augment = ConfigDict()
    config.augment.crop = "inception"  # "resize", "pad", "none"
    config.augment.crop_area = (0.05, 1.0)  # inception
    config.augment.crop_keep = 0.875  # resize: part of the resized short side that is kept
    config.augment.pad = 4  # pad: pixels
    config.augment.flip = True
    config.augment.color_jitter = (0.0, 0.0, 0.0)  # strengths: brightness, contrast, colour
    config.augment.randaugment_layers = 0  # 0: no RandAugment
    config.augment.randaugment_magnitude = 10.0
    config.augment.eval_crop = 0.875  # part of the resized short side that evaluation sees
    config.augment.mean = (0.5,)  # of pixels in [0, 1]; or one a channel
    config.augment.std = (0.5,)
    config.augment.label_smoothing = 0.0
    config.augment.mixup_alpha = 0.0  # 0: no MixUp
    config.augment.cutmix_alpha = 0.0  # 0: no CutMix
    config.augment.cutmix_prob = 0.5  # of CutMix, where both are on
    config.augment.mix_per_example = False  # or one draw for the batch
    config.augment.erasing_prob = 0.0
    config.augment.erasing_area = (0.02, 0.33)  # Cutout as some recipes have it: (0.1, 0.4)
    config.augment.erasing_fill = "zero"  # "noise"

    config.model = ConfigDict()
    config.model.variant = "B/16"  # sets the six below where they are None
    config.model.patch_size = placeholder(object)
    config.model.resnet = placeholder(object)  # a hybrid's stem: dict(num_layers=, width_factor=)
    config.model.width = placeholder(int)
    config.model.depth = placeholder(int)
    config.model.num_heads = placeholder(int)
    config.model.mlp_dim = placeholder(int)
    config.model.pool = "cls"  # "gap", "map"
    config.model.pool_norm = "before"  # the last norm and pool "gap"; "after"
    config.model.posemb = "learned"  # "sincos2d", "sincos1d", "none"
    config.model.norm = "pre"  # "post"
    config.model.gelu = "tanh"  # "exact"
    config.model.layer_norm_eps = 1e-6
    config.model.representation_size = placeholder(int)
    config.model.head_bias_init = 0.0
    config.model.dropout_rate = 0.0
    config.model.attention_dropout_rate = 0.0
    config.model.stochastic_depth_rate = 0.0
    config.model.scan = False
    config.model.remat = "none"  # "full", or one of jax.checkpoint_policies
    config.model.attention_impl = "xla"  # "cudnn", "auto"

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # "adam", "sgd"
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.mu_dtype = "bfloat16"
    config.optimizer.momentum = 0.9
    config.optimizer.momentum_dtype = "bfloat16"
    config.optimizer.weight_decay = 0.1  # times the learning rate, on kernels
    # Patterns match a parameter's path from its beginning: "Transformer/encoderblock_0/...".
    config.optimizer.lr_multipliers = ()  # such as (("head", 10.0),): the first match counts
    config.optimizer.layer_decay = placeholder(float)  # such as 0.75
    config.optimizer.frozen = ()  # such as ("(?!head)",): only the head learns

    config.schedule = ConfigDict()
    config.schedule.name = "cosine"  # "linear", "rsqrt", "constant", "step"
    config.schedule.base_lr = 1e-3
    config.schedule.end_lr = 0.0
    config.schedule.warmup_steps = 10_000
    config.schedule.timescale = 10_000  # rsqrt
    config.schedule.cooldown_steps = 0  # rsqrt
    config.schedule.decay_steps = 0  # step
    config.schedule.decay_factor = 0.1  # step

    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # -1: the rest of the devices

    config.log_every_steps = 50
    config.eval_every_steps = 2_500  # and at the end
    config.checkpoint_every_steps = 1_000  # and at the end
    config.keep_every_steps = 0  # checkpoints kept for good, beside the latest and the best
    # Of the evaluation: "loss", "accuracy_top5"; "": none. With one, evaluations are checkpoints.
    config.best_metric = "accuracy"
    return config.lock()  # a field that isn't there can't be assigned to


def parse_arg(arg: str | None, **defaults):
    """The text after a preset's colon, "key=value,key" -> a ConfigDict of the preset's options.

    A key alone means True; values are Python literals or else text. `quick` is known everywhere.

    Raises:
        ValueError: an unknown key, by name, or a value of another kind than the default's.
    """
    options = ConfigDict({"quick": False, **defaults})
    for item in filter(None, (arg or "").split(",")):
        key, has_value, text = item.partition("=")
        if key not in options:
            near = difflib.get_close_matches(key, options, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"unknown key {key!r}; there are {', '.join(sorted(options))}.{hint}")
        try:
            value = ast.literal_eval(text) if has_value else True
        except (SyntaxError, ValueError):
            value = text
        try:
            options[key] = value
        except TypeError:
            kind = type(options[key]).__name__
            raise ValueError(f"key {key!r} takes a value of type {kind}, not {text!r}") from None
    return options


RECIPES = ("base", "augreg", "paper", "plain", "deit")


def imagenet(variant: str, arg: str | None) -> ConfigDict:
    """A preset for one size; `arg` chooses how to train it.

    The base recipe is AugReg's for ImageNet from scratch (arXiv:2106.10270, section 3) without its
    augmentation: 300 epochs at batch 4096, Adam with decoupled decay 0.1, rate 1e-3 after 10,000
    warm-up steps, cosine, clipping at 1. Keys: recipe=, one of RECIPES; for augreg: aug=, reg=;
    for plain: epochs=; dataset=imagenet21k; quick.
    """
    options = parse_arg(arg, recipe="base", aug="", reg=-1.0, epochs=90.0, dataset="imagenet2012")
    config = get_config()
    config.model.variant = variant
    config.image_size = 224
    config.num_epochs = 300.0
    if options.recipe == "augreg":
        recipes.augreg(config, options.aug, options.reg, options.dataset == "imagenet21k")
    elif options.recipe == "plain":
        recipes.plain(config, options.epochs)
    elif options.recipe in ("paper", "deit"):
        getattr(recipes, options.recipe)(config)
    elif options.recipe != "base":
        raise ValueError(f"key 'recipe' is {options.recipe!r}; it can be {', '.join(RECIPES)}")
    if options.dataset == "imagenet21k":
        recipes.imagenet21k(config)
    else:
        config.dataset.name = options.dataset
    return quick(config) if options.quick else config


def quick(config: ConfigDict) -> ConfigDict:
    """Shrinks a preset to a run of under two minutes on a laptop's CPU, on the embedded digits.

    What makes the preset what it is stays: its loss, optimizer, schedule, pooling, ...
    """
    config.num_epochs, config.total_steps = None, 60
    config.batch_size = 64 * config.accum_steps
    config.image_size = 16
    config.dtype = "float32"
    config.dataset.update(name="digits", train_split="train", eval_split="test", channels=1)
    config.augment.eval_crop = 1.0
    if len(config.augment.mean) > 1:  # of three channels; the digits are grey
        config.augment.update(mean=(0.5,), std=(0.5,))
    config.model.update(patch_size=4, width=64, depth=2, num_heads=4, mlp_dim=128)
    if config.model.variant.startswith("R"):
        config.model.update(patch_size=1, resnet=dict(num_layers=(1,), width_factor=0.5))
    if config.model.representation_size:
        config.model.representation_size = 64
    config.schedule.warmup_steps = min(config.schedule.warmup_steps, 10)
    config.schedule.cooldown_steps = min(config.schedule.cooldown_steps, 10)
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 10, 30, 20
    return config
