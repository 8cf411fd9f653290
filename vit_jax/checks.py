"""Checks of user-supplied values; an error is one line with the field, the value and the fix.

The fields of a configuration that are numbers have a range in a table RANGES, in the file that uses
them.
"""

import dataclasses
import math
import numbers
import os
from collections.abc import Iterable, Mapping

from vit_jax.errors import UserError


def check_choice(field: str, value, choices: Iterable) -> None:
    """Raises UserError if `value` is not one of `choices`."""
    if value not in (choices := tuple(choices)):
        *first, last = map(repr, choices)
        known = f"{', '.join(first)} or {last}" if first else last
        raise UserError(f"{field} is {value!r}; it must be {known}")


def lookup(field: str, name, table: Mapping):
    """Returns `table[name]`; raises UserError listing the known names if there is no such name."""
    check_choice(field, name, table)
    return table[name]


@dataclasses.dataclass(frozen=True)
class Range:
    """The valid values of a number: finite, and from `low` to `high`.

    Attributes:
        low, high: the ends. They are valid themselves, unless `above` or `below` is set.
        above: whether values must be above `low`.
        below: whether values must be below `high`.
        whole: whether values must be whole numbers.
        optional: whether None is valid.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False
    optional: bool = False

    def __contains__(self, value) -> bool:
        if value is None:
            return self.optional
        kind = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind) or not is_finite(value):
            return False
        above_low = value > self.low if self.above else value >= self.low
        return above_low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        """Such as "a whole number >= 1"."""
        ends = []
        if self.low > -math.inf:
            ends.append(f"{'>' if self.above else '>='} {self.low:,}")
        if self.high < math.inf:
            ends.append(f"{'<' if self.below else '<='} {self.high:,}")
        noun = "a whole number" if self.whole else "a number" if ends else "a finite number"
        return f"{noun} {' and '.join(ends)}".strip()


FINITE = Range()
NON_NEGATIVE = Range(0)
SHARE = Range(0, 1)
COUNT = Range(1, 2**31 - 1, whole=True)  # what fits int32
COUNT_OR_ZERO = Range(0, 2**31 - 1, whole=True)


def check_range(field: str, value, valid: Range) -> None:
    """Raises UserError if a value isn't a number in a range."""
    if value not in valid:
        raise UserError(f"{field} is {value!r}; it must be {valid}")


def check_ranges(group: str, config: Mapping, ranges: Mapping[str, Range]) -> None:
    """Checks the fields of a group such as "config.optimizer", each with its range.

    Fields that the group lacks, such as one of older code, are skipped.
    """
    for name, valid in ranges.items():
        if name in config:
            check_range(f"{group}.{name}", config[name], valid)


def check_complete(group: str, config: Mapping, fields: Iterable[str]) -> None:
    """Raises UserError if a group such as "config.optimizer" lacks one of its fields."""
    if missing := [field for field in fields if field not in config]:
        raise UserError(
            f"{group} lacks {', '.join(missing)}: start from get_config() of configs/common.py"
        )


def dictionary(field: str, value, example: str) -> dict:
    """Returns a field that is a dictionary, or a ConfigDict, as a dictionary; {} if it is None.

    Raises:
        UserError: it is neither.
    """
    if value is not None and not hasattr(value, "items"):
        raise UserError(f"{field} is {value!r}; it must be a dictionary, such as {example}")
    return dict(value.items()) if value is not None else {}


def check_numbers(field: str, values) -> None:
    """Raises UserError unless `values` is a tuple or a list of numbers."""
    is_sequence = isinstance(values, (tuple, list))
    if not is_sequence or not all(isinstance(value, numbers.Real) for value in values):
        raise UserError(f"{field} is {values!r}; it must be numbers, such as (0.5, 1.0)")


def check_each(field: str, values, count: int, allowed: Range, what: str) -> None:
    """Raises UserError unless `values` are `count` numbers in a range; `what` says which."""
    check_numbers(field, values)
    if len(values) != count or any(value not in allowed for value in values):
        raise UserError(f"{field} is {tuple(values)}; it must be {what}, each {allowed}")


def check_normalization(mean, std, channels: int, group: str = "") -> None:
    """Raises UserError if pixels in [0, 1] can't be normalized by a mean and standard deviation.

    Args:
        mean, std: tuples of one number, or of one per channel.
        channels: how many channels the images have.
        group: what messages put before "mean" and "std", such as "config.augment.".
    """
    for name, values, valid in (
        ("mean", mean, SHARE),
        ("std", std, Range(0, 1, above=True)),
    ):
        check_numbers(f"{group}{name}", values)
        if len(values) not in (1, channels):
            raise UserError(
                f"{group}{name} is {tuple(values)}; it must have one number, or one for each of "
                f"the {channels} channels"
            )
        for number in values:
            check_range(f"{group}{name}, for pixels in [0, 1],", number, valid)


# How images are resized for evaluation; docs/evaluation.md tells whose numbers each reproduces.
EVAL_METHODS = ("bilinear", "bicubic", "area", "bilinear_aliased", "bicubic_aliased")
SQUEEZE = "squeeze"  # `eval_crop`: the whole image, resized without keeping its proportions


def check_eval_view(eval_crop, eval_method, group: str = "") -> None:
    """Raises UserError if images can't be cropped and resized so for evaluation.

    Args:
        eval_crop: the share of the shorter side that is seen, or SQUEEZE.
        eval_method: one of EVAL_METHODS.
        group: what messages put before the fields' names, such as "config.augment.".
    """
    share = Range(0, 1, above=True)
    if eval_crop not in share and eval_crop != SQUEEZE:
        raise UserError(f"{group}eval_crop is {eval_crop!r}; it must be {share}, or {SQUEEZE!r}")
    check_choice(f"{group}eval_method", eval_method, EVAL_METHODS)


def check_class_names(names, num_classes: int) -> None:
    """Raises UserError unless `names` is None, or a list with a name for each class."""
    if names is None:
        return
    if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"class_names is a {type(names).__name__}; it must be a list of names, in the order of "
            "the labels"
        )
    if len(names) != num_classes:
        raise UserError(
            f"class_names has {len(names)} names; it must have one for each of the model's "
            f"{num_classes} classes"
        )


def check_interval(field: str, value) -> None:
    """Raises UserError if `value` is not (low, high) with 0 < low <= high <= 1."""
    check_numbers(field, value)
    ends = tuple(value)
    valid = Range(0, 1, above=True)
    if len(ends) != 2 or any(end not in valid for end in ends) or ends[0] > ends[1]:
        raise UserError(f"{field} is {ends}; it must be (low, high), 0 < low <= high <= 1")


def check_is_config(config) -> None:
    """Raises UserError if `config` isn't a configuration, but a path, say."""
    if not hasattr(config, "items"):
        raise UserError(
            f"config is {config!r}; it must be a ConfigDict, which get_config() of a preset, such "
            "as configs/digits.py, returns"
        )


def check_values(config: Mapping, defaults: Mapping, group: str = "config") -> None:
    """Checks a configuration, or a group of it, against the default one.

    Raises:
        UserError: a field is missing, is a number that isn't finite, or is None though its default
            isn't.
    """
    check_complete(group, config, defaults)
    for name, value in config.items():
        field, default = f"{group}.{name}", defaults.get(name)
        if hasattr(default, "items") and not hasattr(value, "items"):
            raise UserError(f"{field} is {value!r}; it must be a group of fields")
        if hasattr(value, "items"):
            check_values(value, default if hasattr(default, "items") else {}, field)
        elif value is None and default is not None:
            raise UserError(f"{field} is None; it must be set, as in --{field}={default}")
        elif not is_finite(value):
            raise UserError(f"{field} is {value!r}; its numbers must be finite")


def is_finite(value) -> bool:
    """Whether a value, or everything in a sequence, is finite if it is a number."""
    if isinstance(value, (tuple, list)):
        return all(map(is_finite, value))
    return not isinstance(value, numbers.Real) or -math.inf < value < math.inf


def check_png(flag: str, path: str) -> None:
    """Raises UserError if a PNG can't be written to `path`."""
    folder = os.path.dirname(path) or "."
    if not path.endswith(".png") or os.path.isdir(path) or not os.path.isdir(folder):
        raise UserError(f"{flag} is {path!r}; it must be a .png file in an existing folder")
    if os.path.exists(path) and not is_own_picture(path):
        raise UserError(
            f"{flag} is {path!r}, a file that this program didn't write: give another file, which "
            "it may overwrite"
        )
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UserError(f"{flag} is {path!r}, which can't be written: give another file")


PNG_METADATA = {"Software": "vit_jax"}  # of the pictures that are drawn here


def is_own_picture(path: str) -> bool:
    """Whether a file is empty, or a PNG with PNG_METADATA."""
    with open(path, "rb") as file:
        start = file.read(1000)
    return not start or b"Software\0vit_jax" in start


def check_param_tree(params) -> None:
    """Raises UserError for a model's variables in place of its tree of parameters."""
    if not isinstance(params, Mapping) or "params" in params:
        raise UserError("params must be the tree of parameters: variables['params']")


def size_pair(field: str, value) -> tuple[int, int]:
    """Returns (height, width) of a size in pixels: an int, or a pair of them.

    Raises:
        UserError: the value is neither, or a size isn't above 0.
    """
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    is_integer = all(isinstance(side, numbers.Integral) for side in pair)
    if len(pair) != 2 or not is_integer or min(pair) < 1:
        raise UserError(
            f"{field} is {value!r}; it must be a number of pixels above 0, or (height, width)"
        )
    return tuple(int(side) for side in pair)
