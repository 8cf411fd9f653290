"""Reads settings in the JSON files beside weights, and checks them against the tensors."""

import logging
import numbers

from vit_jax.checks import size_pair
from vit_jax.errors import UserError
from vit_jax.pretrained.codebases import architecture

logger = logging.getLogger("vit_jax")

JSON_TYPES = {
    str: "a string",
    int: "a whole number",
    (int, float): "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}

TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_tanh")
# `eval_method` -> Pillow's number in preprocessor_config.json; timm has the same names.
RESAMPLE_CODES = {"bilinear": 2, "bicubic": 3}


def get_setting(settings: dict, path, name: str, kind, default=None):
    """Returns a setting from a JSON file, or `default` if it is missing or null.

    Raises:
        UserError: a value that isn't of the type (or types) `kind`.
    """
    value = settings.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise UserError(f"{path}: {name} is {value!r}; it must be {JSON_TYPES[kind]}")
    return value


def get_numbers(settings: dict, path, name: str) -> tuple[float, ...] | None:
    """Returns a setting that is a number, or a list with a number per channel."""
    values = settings.get(name)
    if values is None:
        return None
    per_channel = values if isinstance(values, list) else [values]
    if not per_channel or not all(isinstance(value, (int, float)) for value in per_channel):
        raise UserError(f"{path}: {name} is {values!r}; it must be a number, or one per channel")
    return tuple(map(float, per_channel))


def get_size(settings: dict, path, name: str) -> tuple[int, int] | None:
    """Returns a setting that is the side of a square, or a list of height and width."""
    value = settings.get(name)
    return None if value is None else size_pair(f"{path}: {name}", value)


def gelu_field(path: str, activation: str) -> str:
    """Returns the field `gelu` for the name of an activation."""
    if activation in TANH_GELUS:
        return "tanh"
    if activation == "quick_gelu":
        return "quick"
    if activation != "gelu":
        raise UserError(
            f"{path}: its model has the activation {activation!r}; only 'gelu', 'quick_gelu' and "
            f"{', '.join(map(repr, TANH_GELUS))} are supported"
        )
    return "exact"


def resolve_num_heads(path: str, num_heads: int | None, width: int) -> int:
    """Returns `num_heads` if given, or else that of the published size with this width."""
    if num_heads is None:
        num_heads = architecture.published_num_heads(width)
        if num_heads is None:
            raise UserError(
                f"{path} doesn't specify the number of attention heads, and no published size has "
                f"width {width}: give num_heads (--num_heads)"
            )
    if not isinstance(num_heads, numbers.Integral) or num_heads < 1 or width % num_heads:
        raise UserError(f"num_heads is {num_heads}; it must divide the width of {path}, {width}")
    return num_heads


def check_sizes(path: str, settings: dict, names: dict[str, str], params) -> None:
    """Raises UserError if config.json belongs to a model of another size than the tensors do."""
    stored = architecture.infer_fields({name: value.shape for name, value in params.items()})
    patch_size = get_size(settings, path, "patch_size")
    if stored and patch_size not in (None, size_pair("patch_size", stored["patch_size"])):
        raise UserError(
            f"{path}: config.json says patch_size {settings['patch_size']}, but the patches of the "
            f"tensors are of {stored['patch_size']} pixels"
        )
    for name, field in names.items():
        declared = get_setting(settings, path, name, int)
        if stored and declared not in (None, stored[field]):
            raise UserError(
                f"{path}: config.json says {name} {declared}, but the tensors have "
                f"{stored[field]}: the two files belong to different models, or one is incomplete"
            )


def warn_unsupported(path: str, name: str, value, used):
    """Logs a warning that a setting of evaluation isn't supported; returns what is used instead."""
    logger.warning(f"{path}: {name} is {value!r}, which isn't supported: evaluation uses {used!r}")
    return used
