"""Vision Transformers by name: `models.create("B/16", num_classes=1000)`."""

import difflib

import jax.numpy as jnp

from vit_jax.checks import check_choice
from vit_jax.errors import UserError
from vit_jax.models import variants
from vit_jax.models.checks import check_fields, check_image, check_resnet
from vit_jax.models.layers import GELUS
from vit_jax.models.vit import REMAT, VisionTransformer

__all__ = [
    "FIELDS",
    "OBJECTIVES",
    "VisionTransformer",
    "check_image",
    "create",
    "from_config",
    "predicts_classes",
]

FIELDS = tuple(
    name for name in VisionTransformer.__dataclass_fields__ if name not in ("parent", "name")
)

# What training adds to a model, and how a machine computes it: the same parameters are the same
# function with any value.
FIELDS_OF_TRAINING = (
    *("head_bias_init", "dropout_rate", "attention_dropout_rate", "stochastic_depth_rate"),
    *("stochastic_depth_profile", "patch_drop_rate", "scan", "remat", "attention_impl"),
    *("dtype", "residual_dtype", "matmul_precision"),
)
DTYPES = ("float32", "bfloat16")

CLASSES, MASKED_PATCHES = OBJECTIVES = ("classes", "masked_patches")  # of `config.objective`


def create(variant: str, num_classes: int | None = 1000, **fields) -> VisionTransformer:
    """Creates a model by name; keywords override any field of `VisionTransformer`.

    Args:
        variant: size and patch size as the papers write them, such as "B/16".
        num_classes: the number of classes; None or 0 removes the head.
        **fields: module fields. `dtype` may be a name ("bfloat16"). `representation_size` may be
            True, for the width. If `width` isn't the variant's, `mlp_dim` is 4 x width by default.

    Raises:
        UserError: an unknown variant or field, or an impossible value.
    """
    for name in fields:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f": did you mean {near[0]}?" if near else "."
            raise UserError(
                f"Unknown model field {name!r}{hint} The fields are {', '.join(FIELDS)}"
            )
    size = variants.fields(variant)
    if fields.get("width", size["width"]) != size["width"]:
        size.pop("mlp_dim", None)
    fields = {"mlp_dim": None, **size, **fields}
    if fields["mlp_dim"] is None and isinstance(fields["width"], int):
        fields["mlp_dim"] = 4 * fields["width"]
    if fields.get("representation_size") is True:
        fields["representation_size"] = fields["width"]
    for field in ("dtype", "residual_dtype"):
        if (dtype := fields.get(field)) is not None:
            name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
            check_choice(f"config.{field}", name, DTYPES)
            fields[field] = jnp.dtype(name)
    model = VisionTransformer(num_classes=num_classes or None, **fields)
    check_fields(model)
    check_choice("model.gelu", model.gelu, GELUS)
    check_choice("model.remat", model.remat, REMAT)
    return model


def predicts_classes(config) -> bool:
    """Whether a run's model is trained to predict classes."""
    # `get`: the configuration may be of a run from before the field.
    return config.get("objective", CLASSES) != MASKED_PATCHES


def from_config(config) -> VisionTransformer:
    """Creates a run's model from `config.model`, `config.num_classes` and the fields of precision.

    If its objective isn't the prediction of classes, it has no head.
    """
    if not hasattr(config, "model") or not hasattr(config, "num_classes"):
        raise UserError(
            f"config is a {type(config).__name__} without model and num_classes; it must be a "
            "run's ConfigDict, as `get_config()` of a preset and `checkpoint.restore_params` return"
        )
    fields = {name: value for name, value in config.model.items() if value is not None}
    for name in ("patch_size", "rope_grid"):
        if isinstance(fields.get(name), list):  # from a config.json
            fields[name] = tuple(fields[name])
    if (stem := fields.get("resnet")) is not None:
        check_resnet(stem)
        fields["resnet"] = {**stem, "num_layers": tuple(stem["num_layers"])}
    num_classes = config.num_classes if predicts_classes(config) else None
    # `get`: the configuration may be of a run from before these fields.
    for field in ("dtype", "residual_dtype", "matmul_precision"):
        fields[field] = config.get(field)
    return create(**fields, num_classes=num_classes)
