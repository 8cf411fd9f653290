"""Checks of a model's fields, and of its inputs."""

import dataclasses
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp

from vit_jax.checks import FINITE, Range, check_choice, check_range, size_pair
from vit_jax.errors import UserError
from vit_jax.models import posemb
from vit_jax.models.attention import IMPLS
from vit_jax.paths import CLS, EMBEDDING, POSEMB, STEM_ROOT, num_blocks

CHOICES = {
    "pool": ("cls", "gap", "cls_gap", "map", "none"),
    "pool_norm": ("before", "after"),
    "class_token": (None, False, True),
    "posemb": ("learned", *posemb.FIXED, "none"),
    "rope": ("none", "axial", "mixed"),
    "norm": ("pre", "post"),
    "norm_layer": ("layernorm", "rmsnorm"),
    "mlp_layer": ("mlp", "swiglu"),
    "stochastic_depth_profile": ("linear", "constant"),
    "attention_impl": IMPLS,
    **dict.fromkeys(("no_embed_class", "embed_reg", "pre_norm", "qkv_bias"), (False, True)),
    **dict.fromkeys(("qk_norm", "scale_mlp", "scan"), (False, True)),
}

PRECISIONS = (None, "default", "high", "highest")
WIDTH = Range(1, 2**20, whole=True)
OPTIONAL_WIDTH = dataclasses.replace(WIDTH, optional=True)
RATE = Range(0, 1, below=True)
# The valid values of each field that is a number; `optional=True` allows None.
RANGES = {
    "num_classes": Range(1, 2**31 - 1, whole=True, optional=True),
    "width": WIDTH,
    "depth": Range(1, 1000, whole=True),
    "num_heads": WIDTH,
    "mlp_dim": OPTIONAL_WIDTH,
    "representation_size": OPTIONAL_WIDTH,
    "reg_tokens": Range(0, 1000, whole=True),
    "rope_temperature": Range(0, 1e9, above=True),
    "init_values": Range(0, 100, optional=True),
    "layer_norm_eps": Range(0, 1, above=True),
    "head_bias_init": FINITE,
    "dropout_rate": RATE,
    "attention_dropout_rate": RATE,
    "stochastic_depth_rate": RATE,
    "patch_drop_rate": RATE,
}


def check_fields(model) -> None:
    """Raises UserError for a field with an impossible value, or conflicting fields."""
    for field, choices in CHOICES.items():
        check_choice(f"model.{field}", getattr(model, field), choices)
    check_choice("config.matmul_precision", model.matmul_precision, PRECISIONS)
    size_pair("model.patch_size", model.patch_size)
    for field, valid in RANGES.items():
        check_range(f"model.{field}", getattr(model, field), valid)
    if model.width % model.num_heads:
        raise UserError(
            f"model.width {model.width} is not divisible by model.num_heads {model.num_heads}"
        )
    _, divisor = posemb.FIXED.get(model.posemb, (None, 1))
    if model.width % divisor:
        raise UserError(
            f"model.width {model.width} is not divisible by {divisor}, which model.posemb "
            f"{model.posemb!r} needs"
        )
    after = model.pool_norm == "after"
    if after and (model.pool not in ("cls", "gap") or model.norm != "pre"):
        raise UserError(
            "model.pool_norm 'after' needs model.pool 'cls' or 'gap' and model.norm 'pre', not "
            f"{model.pool!r} and {model.norm!r}"
        )
    if model.residual_dtype == jnp.bfloat16 and model.dtype != jnp.bfloat16:
        raise UserError(
            "config.residual_dtype is 'bfloat16', which needs config.dtype 'bfloat16', not "
            f"{jnp.dtype(model.dtype).name!r}"
        )
    if model.residual_dtype is not None and model.norm != "pre":
        raise UserError(
            f"config.residual_dtype is {jnp.dtype(model.residual_dtype).name!r}, which needs "
            f"model.norm 'pre', not {model.norm!r}: its norms change what blocks add to"
        )
    check_tokens(model)
    if model.resnet is not None:
        check_resnet(model.resnet)


def check_tokens(model) -> None:
    """Raises UserError for conflicting fields of the tokens and their positions."""
    if model.class_token is False and model.pool in ("cls", "cls_gap"):
        raise UserError(f"model.class_token is False, but model.pool {model.pool!r} needs one")
    if model.posemb != "learned":
        for field in ("no_embed_class", "embed_reg"):
            if getattr(model, field):
                raise UserError(f"model.{field} needs model.posemb 'learned', not {model.posemb!r}")
    if model.embed_reg and (model.no_embed_class or not model.reg_tokens):
        raise UserError(
            "model.embed_reg, positions for register tokens, needs model.reg_tokens > 0 and "
            "model.no_embed_class False"
        )
    if model.rope == "none":
        if model.rope_grid != "index":
            raise UserError(
                f"model.rope_grid is {model.rope_grid!r}, which needs model.rope 'axial' or 'mixed'"
            )
        return
    head_dim, grid = model.width // model.num_heads, model.rope_grid
    if head_dim % 4:
        raise UserError(
            f"model.rope {model.rope!r} needs heads whose width is a multiple of 4, not {head_dim}"
        )
    if grid not in ("index", "centered"):
        is_pair = isinstance(grid, Sequence) and not isinstance(grid, str) and len(grid) == 2
        if not is_pair or any(n not in Range(1, 2**20, whole=True) for n in grid):
            raise UserError(
                f"model.rope_grid is {grid!r}; it must be 'index', 'centered' or (rows, columns)"
            )


def check_resnet(resnet) -> None:
    """Raises UserError for a ResNet stem that can't be built."""
    if not hasattr(resnet, "items") or set(resnet) != {"num_layers", "width_factor"}:
        shown = dict(resnet) if hasattr(resnet, "items") else resnet
        raise UserError(
            f"model.resnet is {shown!r}; it must have num_layers and width_factor, as in "
            "dict(num_layers=(3, 4, 9), width_factor=1)"
        )
    units = Range(1, 1000, whole=True)
    num_layers, width_factor = resnet["num_layers"], resnet["width_factor"]
    if not isinstance(num_layers, (tuple, list)) or any(n not in units for n in num_layers):
        raise UserError(
            f"model.resnet.num_layers is {num_layers!r}; it must be the number of units of each "
            "stage, such as (3, 4, 9)"
        )
    check_range("model.resnet.width_factor", width_factor, Range(0, 100, above=True))
    if 2 * width_factor % 1:
        raise UserError(
            f"model.resnet.width_factor is {width_factor}; it must be a multiple of 0.5: group "
            "norm has 32 groups"
        )


def check_images(images) -> None:
    """Raises UserError if `images` aren't floating point (N, height, width, channels)."""
    if images.ndim != 4 or (images.shape[1] in (1, 3) and images.shape[3] not in (1, 3, 4)):
        raise UserError(
            f"images are {tuple(images.shape)}; they must be (N, height, width, channels)"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f"images are {images.dtype}; they must be floating point, normalized as in training "
            "(vit_jax.training.augment.normalize)"
        )


def check_tokens_chosen(mask, keep, num_images: int, num_patches: int) -> None:
    """Raises UserError if `mask` isn't bool (N, L), or `keep` no indices (N, K) below L.

    Indices are only compared with L if their values are known: not while JAX traces.
    """
    if mask is not None and (mask.shape != (num_images, num_patches) or mask.dtype != bool):
        raise UserError(
            f"mask is {mask.dtype} {mask.shape}; it must be bool {(num_images, num_patches)}: "
            "(N, L), one for each patch"
        )
    if keep is None:
        return
    has_rows = keep.ndim == 2 and keep.shape[0] == num_images and 0 < keep.shape[1] <= num_patches
    if not has_rows or not jnp.issubdtype(keep.dtype, jnp.integer):
        raise UserError(
            f"keep is {keep.dtype} {keep.shape}; it must be integers (N, K), with N {num_images} "
            f"and K from 1 to {num_patches}, the number of patches"
        )
    if isinstance(keep, jax.core.Tracer):
        return
    smallest, largest = int(keep.min()), int(keep.max())
    if smallest < 0 or largest >= num_patches:
        wrong = smallest if smallest < 0 else largest
        raise UserError(
            f"keep has the index {wrong}; those of the {num_patches} patches are 0 to "
            f"{num_patches - 1}"
        )


def check_image(model, image_size: Sequence[int]) -> None:
    """Raises UserError if the patch size doesn't divide (height, width)."""
    sides = zip(("height", "width"), image_size, model.token_pixels, strict=True)
    for side, pixels, patch in sides:
        if pixels % patch:
            below, above = pixels // patch * patch, (pixels // patch + 1) * patch
            near = f"{below} or {above}" if below else f"{above}"
            raise UserError(
                f"image {side} {pixels} is not divisible by the patch size {patch}: "
                f"use an image_size of {near}, or another patch_size"
            )


def check_parameters(model, params, image_shape: Sequence[int]) -> None:
    """Raises UserError for parameters of another depth, image size or number of channels.

    Args:
        model: the VisionTransformer.
        params: its tree of parameters; {} while they are initialized.
        image_shape: (height, width, channels).
    """
    *image_size, channels = image_shape
    stem = params.get(STEM_ROOT) or params.get(EMBEDDING) or {}
    if "kernel" in stem and (expected := stem["kernel"].shape[2]) != channels:
        raise UserError(
            f"images have {channels} channels; the model's parameters are for {expected}"
        )
    scope, layer, leaf = POSEMB.split("/")
    encoder = params.get(scope, {})
    depth = num_blocks(flax.traverse_util.flatten_dict(encoder, sep="/"))
    if "encoderblock" in encoder:  # stacked
        depth = len(encoder["encoderblock"]["LayerNorm_0"]["scale"])
    if depth not in (0, model.depth):
        raise UserError(
            f"the model has depth {model.depth}; the parameters have {depth} blocks: take the "
            "model of the parameters (vit_jax.features has the outputs of earlier blocks)"
        )
    positions = encoder.get(layer, {}).get(leaf)
    rows, columns = model.grid(image_size)
    has_same_tokens = (CLS in params) == model.has_class_token
    if positions is None or not has_same_tokens:
        return
    stored = positions.shape[1] - model.num_prefix_positions
    if stored != rows * columns:
        height, width = image_size
        raise UserError(
            f"images of {height}x{width} have {rows}x{columns} patches; the model's parameters "
            f"have positions for {stored}: load them with "
            f"pretrained.load(path, model, image_size=({height}, {width})), which resizes them"
        )
