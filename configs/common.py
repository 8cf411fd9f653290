"""A run's configuration: every field with its default, the presets' arguments, and `quick`."""

import ast
import difflib

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder

from configs import recipes


def get_config() -> ConfigDict:
    """Returns every field with its default; presets and the command line override them.

    `placeholder` fields are None until they are set. No field can change when a run is resumed,
    except those that `may_change` in vit_jax/runs/resuming.py names, or --allow_changes.
    """
    config = ConfigDict()
    config.seed = 0
    config.num_epochs = placeholder(float)
    config.total_steps = placeholder(int)  # overrides num_epochs
    config.batch_size = 4096  # global: over all devices
    config.accum_steps = 1  # microbatches per step, run sequentially
    config.image_size = placeholder(object)  # in pixels: an int, or (height, width)
    config.dtype = "bfloat16"  # for matrix products and activations; or "float32"
    config.residual_dtype = placeholder(str)  # of what blocks add to; None: as config.dtype
    # Of float32 products: "default", "high", "highest"; None: the highest. big_vision's ImageNet
    # configurations compute in dtype "float32" with matmul_precision "default".
    config.matmul_precision = placeholder(str)
    config.objective = "classes"  # or "masked_patches": docs/self_supervised.md
    config.loss = "softmax"  # or "sigmoid"; vit_jax/training/losses.py
    config.loss_args = placeholder(object)  # keyword arguments: --config.loss_args="{'gamma': 2.0}"
    config.grad_clip_norm = 1.0  # 0: no clipping
    config.on_nonfinite = "stop"  # or "skip": drops updates that aren't finite, and counts them
    config.ema_decay = placeholder(float)  # such as 0.9999: evaluates a moving average
    config.num_classes = placeholder(int)  # filled in from the dataset

    # Start from published weights or a run: see docs/weights.md.
    config.init_from = placeholder(str)
    # "weights": starts anew, from the parameters alone; or "continue": goes on from a checkpoint of
    # a run, with its optimizer's state, step and order of examples: see docs/branches.md.
    config.init_mode = "weights"
    config.init_from_depth = placeholder(str)  # "stack" or "append": fills a deeper model
    config.init_from_patch = placeholder(str)  # "resize": to the model's patch size
    config.init_from_resize = "google"  # or "torch": how positions are resized
    # (rows, columns) of the positions in init_from, if they aren't a square.
    config.init_from_grid = placeholder(object)
    config.init_from_required = False  # whether init_from must be set
    config.init_from_hint = ""  # the error message if it isn't set

    config.dataset = ConfigDict()
    config.dataset.name = "imagenet2012"  # a TFDS name, or a folder: see docs/data.md
    config.dataset.data_dir = placeholder(str)  # where TFDS keeps its datasets
    config.dataset.train_split = "train"
    config.dataset.eval_split = "validation"
    # Trains on a subset of train_split: so many examples or, below 1, such a share. With the same
    # seed, a smaller subset is a part of a larger one.
    config.dataset.examples = placeholder(float)
    config.dataset.examples_seed = 0
    config.dataset.examples_balanced = False  # whether classes have the same number of examples
    # Repeated augmentation: so many views of each example in a row. An epoch still has as many
    # views as the split has examples, and therefore shows a part of them.
    config.dataset.repeats = 1
    config.dataset.channels = 3  # or 1
    # Whether photographs are turned upright as their EXIF data says; None: only those of folders.
    config.dataset.exif = placeholder(bool)
    config.dataset.in_memory_mb = 1_000  # TFRecord splits up to this size are read into memory
    # Evaluation images up to this size are kept decoded, by each process and for each set.
    config.dataset.eval_cache_mb = 1_000
    # Records, over all processes, for larger TFRecord splits.
    config.dataset.shuffle_buffer = 20_000
    # Not settings: what determines the order of the examples, recorded for resuming.
    config.dataset.order = placeholder(str)  # "global", "parts" or "buffer"
    config.dataset.parts = placeholder(int)  # the number of parts shuffled independently
    config.dataset.num_examples = placeholder(int)  # of the training split
    config.dataset.fingerprint = placeholder(str)  # of the names of its examples
    config.dataset.offset = 0  # added to step * batch_size, where a step begins in the order
    config.dataset.on_error = "stop"  # or "skip", for examples that can't be read or decoded

    config.augment = ConfigDict()
    # On the host, for each image: vit_jax/data/preprocess/.
    config.augment.crop = "inception"  # or "simple", "resize", "pad", "none"
    config.augment.crop_area = (0.05, 1.0)  # inception: share of the image's area
    # inception: how the share is drawn. "tensorflow" favors small ones; "area" is uniform, as
    # torchvision's; "beta" is Beta(*crop_beta), scaled to crop_area.
    config.augment.crop_distribution = "tensorflow"
    config.augment.crop_beta = (1.0, 1.0)  # (1, 1): uniform
    config.augment.crop_keep = 0.875  # resize: share of the shorter side that is kept
    config.augment.pad = 4  # simple, pad: pixels
    config.augment.resize_method = "bilinear"  # or "bicubic"; evaluation has eval_method
    config.augment.flip = True
    config.augment.three_augment = False  # grayscale, solarize or blur, from DeiT III
    config.augment.color_jitter = (0.0, 0.0, 0.0)  # strengths: brightness, contrast, color
    config.augment.randaugment_layers = 0  # 0: no RandAugment
    config.augment.randaugment_magnitude = 10.0
    # Its operations: big_vision's, with Pillow's contrast; "tensorflow": with their own contrast;
    # or "timm": timm's increasing ones, as in DeiT. See vit_jax/data/preprocess/randaugment.py.
    config.augment.randaugment_kind = "pillow"
    # Of the images that evaluation sees, the share of the shorter side, or "squeeze": the whole
    # image, whose proportions aren't kept. docs/evaluation.md tells whose numbers need what.
    config.augment.eval_crop = FieldReference(0.875, field_type=object)
    # Or "bicubic", "area"; "bilinear_aliased", "bicubic_aliased": without antialiasing.
    config.augment.eval_method = "bilinear"
    # On the device, for each batch: vit_jax/training/augment.py.
    config.augment.mean = (0.5,)  # for pixels in [0, 1]; one number, or one per channel
    config.augment.std = (0.5,)
    config.augment.label_smoothing = 0.0
    config.augment.mixup_alpha = 0.0  # 0: no MixUp
    config.augment.cutmix_alpha = 0.0  # 0: no CutMix
    config.augment.cutmix_prob = 0.5  # the probability of CutMix, if both are on
    config.augment.mix_per_example = False  # whether each example draws its own lambda and box
    config.augment.erasing_prob = 0.0
    config.augment.erasing_area = (0.02, 0.33)  # share of the image's area
    config.augment.erasing_fill = "zero"  # or "noise"

    # Of the objective "masked_patches": vit_jax/objectives/masked_patches.py.
    config.masked_patches = ConfigDict()
    config.masked_patches.target = "mean_color"  # of a patch; or "downsized" (to 4x4), "pixels"
    config.masked_patches.bits = 3  # per channel of a color: 512 classes of 3 channels
    config.masked_patches.share = 0.5  # of an image's patches: those that are corrupted
    config.masked_patches.mask_share = 0.8  # of those: replaced by a learned [mask] embedding
    config.masked_patches.random_share = 0.1  # by another patch's embedding; the rest are kept

    # Fields of vit_jax/models/vit.py, with the defaults there. None: the variant's value. If you
    # set width, mlp_dim becomes 4 x width, unless the preset sets it (digits.py, cifar10.py and
    # `:quick` do); num_heads stays the variant's, and must divide width.
    config.model = ConfigDict()
    config.model.variant = "B/16"  # vit_jax/models/variants.py
    config.model.patch_size = placeholder(object)
    config.model.resnet = placeholder(object)  # a hybrid's stem: dict(num_layers=, width_factor=)
    config.model.width = placeholder(int)
    config.model.depth = placeholder(int)
    config.model.num_heads = placeholder(int)
    config.model.mlp_dim = placeholder(int)
    config.model.pool = "cls"  # or "gap", "cls_gap", "map"
    config.model.pool_norm = "before"  # or "after": where the last norm is, for "gap" and "cls"
    config.model.class_token = placeholder(bool)  # None: if pool needs one
    config.model.reg_tokens = 0
    config.model.posemb = "learned"  # or "sincos2d", "sincos1d", "none"
    config.model.no_embed_class = False  # True: only patches have positions
    config.model.embed_reg = False  # True: register tokens have positions too
    config.model.rope = "none"  # or "axial", "mixed": rotary positions
    config.model.rope_temperature = 100.0
    config.model.rope_grid = FieldReference("index", field_type=object)  # "centered", (rows, cols)
    config.model.pre_norm = False  # True: a norm before the blocks
    config.model.norm = "pre"  # or "post"
    config.model.norm_layer = "layernorm"  # or "rmsnorm"
    config.model.qkv_bias = True
    config.model.qk_norm = False
    config.model.init_values = placeholder(float)  # LayerScale's, such as 1e-5
    config.model.gelu = "tanh"  # or "exact", "quick": the MLP's activation
    config.model.mlp_layer = "mlp"  # or "swiglu"
    config.model.scale_mlp = False  # True: a norm of the MLP's hidden layer
    config.model.layer_norm_eps = 1e-6
    config.model.representation_size = placeholder(object)  # True: the width
    config.model.head_bias_init = 0.0
    config.model.dropout_rate = 0.0
    config.model.attention_dropout_rate = 0.0
    config.model.stochastic_depth_rate = 0.0
    config.model.stochastic_depth_profile = "linear"  # or "constant": the same in all blocks
    config.model.patch_drop_rate = 0.0
    config.model.scan = False
    config.model.remat = "auto"  # recomputes what doesn't fit; "none", "full", or between: vit.py
    config.model.attention_impl = "auto"  # or "pallas" (on TPU), "cudnn" (on GPU), "xla"

    config.optimizer = ConfigDict()  # vit_jax/training/optim.py
    config.optimizer.name = "adamw"  # or "adam", "sgd", "adafactor", "lamb", "lion", "muon"
    # b1, b2, eps, mu_dtype: for all but "sgd"; "lion" has no eps, nor has "adafactor", whose b2 is
    # a bound; those of "muon" are for what isn't a matrix.
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.mu_dtype = "bfloat16"
    config.optimizer.momentum = 0.9  # momentum, momentum_dtype: for "sgd", "muon"
    config.optimizer.momentum_dtype = "bfloat16"
    config.optimizer.decay_rate = 0.8  # "adafactor": the second moment decays at 1 - t ** -0.8
    config.optimizer.min_dim_size_to_factor = 32  # "adafactor": smaller axes aren't factored
    # On kernels, times the learning rate. "adam", "sgd": added to the gradient instead.
    config.optimizer.weight_decay = 0.1
    # Patterns match the start of a parameter's name: "Transformer/encoderblock_0/...".
    config.optimizer.weight_decay_multipliers = ()  # such as (("head", 100.0),)
    config.optimizer.lr_multipliers = ()  # such as (("head", 10.0),); the first match applies
    config.optimizer.layer_decay = placeholder(float)  # such as 0.75
    config.optimizer.frozen = ()  # such as ("(?!head)",): trains only the head

    config.schedule = ConfigDict()  # vit_jax/training/schedules.py
    config.schedule.name = "cosine"  # or "linear", "rsqrt", "constant", "step"
    config.schedule.base_lr = 1e-3
    config.schedule.end_lr = 0.0
    config.schedule.warmup_steps = 10_000
    config.schedule.timescale = 10_000  # for "rsqrt"
    config.schedule.cooldown_steps = 0  # at the end, to end_lr: for "rsqrt", "constant"
    config.schedule.decay_steps = 0  # for "step"
    config.schedule.decay_factor = 0.1  # for "step"

    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # -1: the remaining devices
    # TPU slices (or hosts with GPUs) that `data` is divided over, while fsdp and tensor stay inside
    # each; None: recognized.
    config.mesh.slices = placeholder(int)

    config.log_every_steps = 50
    config.wandb = placeholder(str)  # a project of Weights & Biases that gets the metrics too
    config.eval_every_steps = 2_500  # and at the end
    config.report = True  # writes report.html at the end of a run of one process
    # More evaluations, {name: what}, such as {"knn": {"kind": "knn"}}: docs/evaluation.md.
    config.evals = placeholder(object)
    config.checkpoint_every_steps = 1_000  # and at the end
    config.keep_every_steps = 0  # also keeps checkpoints at multiples of it; 0: none
    # The metric that decides which checkpoint is the best, and kept: "accuracy", "accuracy_top5",
    # "loss". Unless it is "", every evaluation saves a checkpoint.
    config.best_metric = "accuracy"
    return config.lock()  # assigning to an unknown field raises


def parse_arg(arg: str | None, **defaults) -> ConfigDict:
    """Parses what follows a preset's colon, "key=value,key", into the preset's options.

    A key alone means True. Values are Python literals, or else strings. Every preset has `quick`.

    Raises:
        ValueError: an unknown key, or a value whose type isn't the default's.
    """
    options = ConfigDict({"quick": False, **defaults})
    for item in filter(None, (arg or "").split(",")):
        key, has_value, text = item.partition("=")
        if key not in options:
            near = difflib.get_close_matches(key, options, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"unknown key {key!r}; the keys are {', '.join(sorted(options))}.{hint}"
            )
        if not has_value and not isinstance(options[key], bool):
            raise ValueError(f"key {key!r} needs a value: {key}=VALUE")
        try:
            value = ast.literal_eval(text) if has_value else True
        except (SyntaxError, ValueError):
            value = text
        try:
            options[key] = value
        except TypeError:
            kind = type(options[key]).__name__
            raise ValueError(f"key {key!r} must be of type {kind}, not {text!r}") from None
    return options


RECIPES = ("base", "augreg", "paper", "plain", "deit", "deit3", "modern")


def imagenet_options(arg: str | None) -> ConfigDict:
    """Parses the argument of an ImageNet preset.

    Keys: recipe, one of RECIPES; aug and reg, for recipe=augreg; epochs, for recipe=plain;
    finetune, the second part of recipe=deit3; dataset, a TFDS name or a folder; quick.
    """
    not_set = dict(aug="", reg=-1.0, epochs=-1.0, finetune=False)
    options = parse_arg(arg, recipe="base", dataset="imagenet2012", **not_set)
    recipe_of = dict(aug="augreg", reg="augreg", epochs="plain", finetune="deit3")
    for key, recipe in recipe_of.items():
        if options[key] != not_set[key] and options.recipe != recipe:
            raise ValueError(f"key {key!r} is for recipe={recipe}, not recipe={options.recipe}")
    return options


def imagenet(variant: str, options: ConfigDict) -> ConfigDict:
    """Returns the configuration of an ImageNet preset.

    The base recipe is AugReg's for ImageNet from scratch (arXiv:2106.10270, section 3) without
    its augmentation: 300 epochs at batch 4096, Adam with decoupled weight decay 0.1, learning
    rate 1e-3 after 10,000 warmup steps, cosine schedule, gradients clipped at norm 1.

    Args:
        variant: such as "B/16".
        options: the result of `imagenet_options`. The preset applies `quick` itself, at the end.
    """
    on_21k = options.dataset == "imagenet21k"
    if options.finetune and on_21k:
        raise ValueError("key 'finetune' is for ImageNet, not for dataset=imagenet21k")
    config = get_config()
    config.model.variant = variant
    config.image_size = 224
    config.num_epochs = 300.0
    if options.recipe == "augreg":
        recipes.augreg(config, options.aug, options.reg, on_21k)
    elif options.recipe == "plain":
        recipes.plain(config, options.epochs if options.epochs >= 0 else 90.0)
    elif options.recipe == "paper":
        recipes.paper(config)
    elif options.recipe == "deit":
        recipes.deit(config)
    elif options.recipe == "deit3" and options.finetune:
        recipes.deit3_finetune(config)
    elif options.recipe == "deit3":
        recipes.deit3(config)
    elif options.recipe == "modern":
        recipes.modern(config)
    elif options.recipe != "base":
        raise ValueError(f"key 'recipe' is {options.recipe!r}; it must be {one_of(RECIPES)}")
    if on_21k:
        recipes.imagenet21k(config)
        if options.recipe in ("deit3", "modern"):
            recipes.deit3_21k(config)
    else:
        config.dataset.name = options.dataset
    return config


def one_of(choices) -> str:
    """Returns "a, b or c"."""
    *first, last = choices
    return f"{', '.join(first)} or {last}"


def quick(config: ConfigDict) -> ConfigDict:
    """Shrinks a preset to a run on the embedded digits, of under two minutes on a laptop's CPU.

    The preset's loss, optimizer, schedule, pooling and so on stay. Must be applied last.
    """
    config.num_epochs, config.total_steps = None, 60
    config.batch_size = 64 * config.accum_steps
    config.image_size = 16
    config.dtype = "float32"
    config.dataset.update(name="digits", train_split="train", eval_split="test", channels=1)
    config.augment.eval_crop = 1.0
    if len(config.augment.mean) > 1:  # the digits have one channel
        config.augment.update(mean=(0.5,), std=(0.5,))
    config.model.update(patch_size=4, width=64, depth=2, num_heads=4, mlp_dim=128)
    if config.model.head_bias_init:  # a sigmoid loss starts at the odds of one class in 10
        config.model.head_bias_init = -2.2
    if config.model.variant.startswith("R"):
        config.model.update(patch_size=1, resnet=dict(num_layers=(1,), width_factor=0.5))
    config.schedule.warmup_steps = min(config.schedule.warmup_steps, 10)
    config.schedule.cooldown_steps = min(config.schedule.cooldown_steps, 10)
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 10, 30, 20
    config.init_from_required = False  # no weights of that size are published
    config.report = False
    return config
