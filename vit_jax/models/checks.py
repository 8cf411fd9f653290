"""Whether a model's fields go together; each mistake is named with what would do."""

from collections.abc import Sequence

import jax

from vit_jax.errors import UserError

CHOICES = {
    "pool": ("cls", "gap", "map", "none"),
    "pool_norm": ("before", "after"),
    "posemb": ("learned", "sincos2d", "sincos1d", "none"),
    "norm": ("pre", "post"),
    "gelu": ("tanh", "exact"),
    "attention_impl": ("xla", "cudnn", "auto"),
    "remat": ("none", "full", "dots_saveable", "dots_with_no_batch_dims_saveable"),
}
CAPTURES = ("blocks", "attention")


def check_fields(model) -> None:
    """Raises UserError for a field that has no such value, or fields that don't go together."""
    for field, choices in CHOICES.items():
        if getattr(model, field) not in choices:
            known = ", ".join(map(repr, choices))
            raise UserError(f"model.{field} is {getattr(model, field)!r}; it can be {known}")
    numbers = {name: (getattr(model, name),) for name in ("width", "depth", "num_heads")}
    numbers["mlp_dim"] = () if model.mlp_dim is None else (model.mlp_dim,)
    numbers["patch_size"] = model.patch_shape
    for field, values in numbers.items():
        if not all(isinstance(value, int) and value > 0 for value in values):
            raise UserError(
                f"model.{field} is {getattr(model, field)!r}; it takes whole numbers above 0"
            )
    if model.pool_norm == "after" and (model.pool, model.norm) != ("gap", "pre"):
        raise UserError(
            f"model.pool_norm 'after' goes with pool 'gap' and norm 'pre', not with "
            f"{model.pool!r} and {model.norm!r}"
        )
    if model.resnet is not None:
        check_resnet(model.resnet)
    for field in ("dropout_rate", "attention_dropout_rate", "stochastic_depth_rate"):
        if not 0 <= getattr(model, field) < 1:
            raise UserError(f"model.{field} is {getattr(model, field)}; it lies in [0, 1)")
    if model.width % model.num_heads:
        raise UserError(
            f"model.width {model.width} is not divisible by model.num_heads {model.num_heads}"
        )
    unit = {"sincos2d": 4, "sincos1d": 2}.get(model.posemb, 1)
    if model.width % unit:
        raise UserError(f"posemb {model.posemb!r} needs a width divisible by {unit}")
    if model.attention_impl == "cudnn" and jax.default_backend() != "gpu":
        raise UserError(
            f"model.attention_impl 'cudnn' needs a GPU; this is a {jax.default_backend()}: "
            "take 'xla' or 'auto'"
        )


def check_resnet(resnet) -> None:
    """Raises UserError for a stem that can't be."""
    if set(resnet) != {"num_layers", "width_factor"}:
        raise UserError(
            f"model.resnet has {', '.join(sorted(resnet)) or 'nothing'}; it takes num_layers, such "
            "as (3, 4, 9), and width_factor"
        )
    num_layers, channels = resnet["num_layers"], 64 * resnet["width_factor"]
    if not all(isinstance(n, int) and n > 0 for n in num_layers):
        raise UserError(f"model.resnet.num_layers is {tuple(num_layers)}; it takes units, above 0")
    if channels < 32 or channels % 32:
        raise UserError(
            f"model.resnet.width_factor is {resnet['width_factor']}; it takes multiples of 0.5: "
            "group norm has 32 groups"
        )


def check_image(model, image_size: Sequence[int]) -> None:
    """Raises UserError where the patch doesn't divide the (height, width)."""
    sides = zip(("height", "width"), image_size, model.token_pixels, strict=True)
    for side, pixels, patch in sides:
        if pixels % patch:
            below, above = pixels // patch * patch, (pixels // patch + 1) * patch
            near = f"{below} or {above}" if below else f"{above}"
            raise UserError(
                f"image {side} {pixels} is not divisible by the patch size {patch}: "
                f"take an image_size of {near}, or another patch_size"
            )


def check_capture(capture: Sequence[str]) -> None:
    for name in capture:
        if name not in CAPTURES:
            raise UserError(f"capture has {name!r}; it can have {', '.join(CAPTURES)}")
