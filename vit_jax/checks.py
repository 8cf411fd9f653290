"""Checks of user-supplied values; an error is one line with the field, the value and the fix."""

import numbers
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


def check_range(field: str, value, low: float = 0, high: float | None = None) -> None:
    """Raises UserError if a number is below `low` or above `high`."""
    if not low <= value or (high is not None and not value <= high):  # NaN is refused too
        expected = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
        raise UserError(f"{field} is {value!r}; it must be {expected}")


def check_interval(field: str, value) -> None:
    """Raises UserError if `value` is not (low, high) with 0 < low <= high <= 1."""
    low_high = tuple(value)
    if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1] <= 1:
        raise UserError(f"{field} is {low_high}; it must be (low, high), 0 < low <= high <= 1")


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
