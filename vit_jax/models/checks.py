"""Checks of a model's fields, and of its inputs."""

from collections.abc import Sequence

import jax

from vit_jax.checks import check_choice, size_pair
from vit_jax.errors import UserError
from vit_jax.models import posemb

CHOICES = {
    "pool": ("cls", "gap", "map", "none"),
    "pool_norm": ("before", "after"),
    "posemb": ("learned", *posemb.FIXED, "none"),
    "norm": ("pre", "post"),
    "attention_impl": ("xla", "cudnn", "auto"),
    "remat": ("none", "full", "dots_saveable", "dots_with_no_batch_dims_saveable"),
}


def check_fields(model) -> None:
    """Raises UserError for a field with an impossible value, or fields that exclude each other."""
    for field, choices in CHOICES.items():
        check_choice(f"model.{field}", getattr(model, field), choices)
    size_pair("model.patch_size", model.patch_size)
    for field in ("width", "depth", "num_heads", "mlp_dim", "representation_size"):
        value = getattr(model, field)
        is_optional = field in ("mlp_dim", "representation_size")
        if not (is_optional and value is None) and not (type(value) is int and value > 0):
            raise UserError(f"model.{field} is {value!r}; it must be a whole number above 0")
    for field in ("dropout_rate", "attention_dropout_rate", "stochastic_depth_rate"):
        if not 0 <= getattr(model, field) < 1:
            raise UserError(
                f"model.{field} is {getattr(model, field)}; it must be at least 0 and below 1"
            )
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
    if model.pool_norm == "after" and (model.pool, model.norm) != ("gap", "pre"):
        raise UserError(
            "model.pool_norm 'after' needs model.pool 'gap' and model.norm 'pre', not "
            f"{model.pool!r} and {model.norm!r}"
        )
    if model.attention_impl == "cudnn" and jax.default_backend() != "gpu":
        raise UserError(
            f"model.attention_impl 'cudnn' needs a GPU, but JAX runs on {jax.default_backend()}: "
            "use 'xla' or 'auto'"
        )
    if model.resnet is not None:
        check_resnet(model.resnet)


def check_resnet(resnet) -> None:
    """Raises UserError for a ResNet stem that can't be built."""
    if set(resnet) != {"num_layers", "width_factor"}:
        raise UserError(
            f"model.resnet has {', '.join(sorted(resnet)) or 'nothing'}; it must have num_layers, "
            "such as (3, 4, 9), and width_factor"
        )
    num_layers, channels = resnet["num_layers"], 64 * resnet["width_factor"]
    if not all(type(units) is int and units > 0 for units in num_layers):
        raise UserError(
            f"model.resnet.num_layers is {tuple(num_layers)}; it must be the number of units "
            "of each stage, all above 0"
        )
    if channels < 32 or channels % 32:
        raise UserError(
            f"model.resnet.width_factor is {resnet['width_factor']}; it must be a multiple of 0.5: "
            "group norm has 32 groups"
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
