"""Vision Transformers by name: `models.create("B/16", num_classes=1000)`."""

import difflib

import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models import checks, variants
from vit_jax.models.vit import VisionTransformer

FIELDS = tuple(
    name for name in VisionTransformer.__dataclass_fields__ if name not in ("parent", "name")
)

DTYPES = ("float32", "bfloat16")


def create(variant: str, num_classes: int | None = 1000, **fields) -> VisionTransformer:
    """The model of that name, any field of `VisionTransformer` overridden by keyword.

    Args:
        variant: size and patch as the papers write them, such as "B/16".
        num_classes: units of the head; None or 0 for no head (features come out).
        **fields: module fields; `dtype` may be a name ("bfloat16").

    Raises:
        UserError: an unknown variant or field, or a choice that the field doesn't have.
    """
    for name in fields:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"Unknown model field {name!r}: {hint}The fields: {', '.join(FIELDS)}")
    if isinstance(fields.get("dtype"), str):
        if fields["dtype"] not in DTYPES:
            known = ", ".join(map(repr, DTYPES))
            raise UserError(f"dtype is {fields['dtype']!r}; it can be {known}")
        fields["dtype"] = jnp.dtype(fields["dtype"])
    model = VisionTransformer(
        num_classes=num_classes or None, **{**variants.fields(variant), **fields}
    )
    checks.check_fields(model)
    return model


def from_config(config) -> VisionTransformer:
    """The model of a run: `config.model`, `config.dtype`, `config.num_classes`."""
    fields = {name: value for name, value in config.model.items() if value is not None}
    if isinstance(fields.get("patch_size"), list):  # as config.json has it
        fields["patch_size"] = tuple(fields["patch_size"])
    if stem := fields.get("resnet"):
        fields["resnet"] = {**stem, "num_layers": tuple(stem["num_layers"])}
    return create(**fields, num_classes=config.num_classes, dtype=config.dtype)
