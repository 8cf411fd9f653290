"""The configurations that cells start from, and the fields that they set in them."""

import difflib
import functools
from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from vit_jax.errors import UserError, first_line
from vit_jax.studies.pages.modules import call, import_page

ALIASES = {
    "variant": "model.variant",
    "resolution": "image_size",
    "examples": "dataset.examples",
    "images": "total_steps",  # images seen: total_steps x batch_size
    "lr": "schedule.base_lr",
}


@functools.cache
def configuration(preset: str) -> ConfigDict:
    """Returns the configuration that FILE[:ARG] gives; callers must copy it to change it."""
    file, _, arg = preset.partition(":")
    config = call(import_page(file), "get_config", arg)
    if not isinstance(config, ConfigDict):
        raise UserError(f"{file}: get_config returns no ConfigDict")
    return config


def configured(preset: str, fields: Mapping) -> ConfigDict:
    """Returns the configuration of a cell, before what the dataset fills in.

    Raises:
        UserError: a field has no such name, or another type.
    """
    config = configuration(preset).copy_and_resolve_references()
    if "num_epochs" in fields and "total_steps" not in fields:
        config.total_steps = None  # as on the command line
    for field, value in fields.items():
        group, name = check_field(config, field, preset)
        try:
            group[name] = value
        except (TypeError, ValueError) as error:
            raise UserError(f"{preset}: {field} can't be {value!r}: {first_line(error)}") from None
    return config


def check_field(config: ConfigDict, field: str, preset: str) -> tuple[ConfigDict, str]:
    """Returns the group of a dotted field and its name in it; raises UserError without one."""
    *groups, name = field.split(".")
    group = config
    for part in groups:
        group = group.get(part) if isinstance(group, ConfigDict) else None
    if isinstance(group, ConfigDict) and name in group and not isinstance(group[name], ConfigDict):
        return group, name
    known = [*leaves(config), *ALIASES]
    near = difflib.get_close_matches(field, known, n=1, cutoff=0.5)
    near = near or [path for path in known if path.rpartition(".")[2] == name][:1]
    hint = f"did you mean {near[0]!r}?" if near else "configs/common.py has all fields"
    raise UserError(f"{preset}: there is no field {field!r} for an axis: {hint}")


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of a configuration's fields."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def as_type(config: ConfigDict, field: str, value, preset: str):
    """Returns a value as the type that a field has: 1e6 for a whole number is 1000000."""
    group, name = check_field(config, field, preset)
    kind = group.get_type(name)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return float(value) if kind is float and type(value) is int else value


def steps_of(images: float, fields: Mapping, preset: str) -> int:
    """Returns the steps in which a cell with some fields sees so many images."""
    if type(images) not in (int, float) or images <= 0:
        raise UserError(f"{preset}: 'images' is {images!r}; it must be a number above 0")
    return max(round(images / fields.get("batch_size", configuration(preset).batch_size)), 1)
