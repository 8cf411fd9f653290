"""What a page has, and messages that tell where it has something else.

A page has `get_config(arg)`, like any preset, and `get_study(arg)`, which returns a dictionary:

    collect     the metrics of a cell to show, such as ("val/accuracy",); the first decides which
                cell is the best
    early_stopping    whether a cell counts with its best evaluation instead of its last
    stages      {name: stage}, each run after those before it; or the keys of a single stage

A stage is a dictionary, all of whose keys are optional:

    axes        {axis: values}: a grid
    cells       [{axis: value}]: a list; each entry is combined with the whole grid
    set         {axis: value} of every cell, which isn't in its name
    config      "FILE[:ARG]" of the cells; default: the page itself
    after       an earlier stage: each cell is run for each cell of that stage, and text in its
                values may have "{parent}", that cell's folder, such as in "init_from"
    inherit     axes whose values are taken from that cell
    best        an earlier stage, and
    over        some of its axes: there is a cell for each combination of the other axes, with the
                values that the best cell of the combination has for these
    search      {axis: {"log_uniform": (low, high)}, {"uniform": (low, high)} or {"choices": (...)}}
    trials      how many cells a search has

An axis is a dotted field of the configuration, a name in ALIASES of presets.py, ":key" for a key
of the preset's argument, or any name whose values are a dictionary {label: {axis: value}}.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vit_jax.errors import UserError

DISTRIBUTIONS = ("log_uniform", "uniform", "choices")


class Key(NamedTuple):
    """What a key of a stage must be.

    Attributes:
        kind: its type. A sequence isn't text, and a number is above 0.
        shown: the same in an error message.
        items: the type of its items, if it is a sequence.
        needs: the key that must be there too.
        excludes: keys that mustn't be.
    """

    kind: type
    shown: str
    items: type = object
    needs: str = ""
    excludes: tuple[str, ...] = ()


NAMES = "a sequence of axes, such as ('lr',)"
STAGE_KEYS = {
    "axes": Key(Mapping, "a dictionary {axis: values}"),
    "cells": Key(Sequence, "a list of dictionaries {axis: value}", Mapping),
    "set": Key(Mapping, "a dictionary {axis: value}"),
    "config": Key(str, "FILE or FILE:ARG"),
    "after": Key(str, "the name of an earlier stage"),
    "inherit": Key(Sequence, NAMES, str, needs="after"),
    "best": Key(
        str,
        "the name of an earlier stage",
        excludes=("axes", "cells", "after", "inherit", "search", "trials"),
    ),
    "over": Key(Sequence, NAMES, str, needs="best"),
    "search": Key(Mapping, "a dictionary {axis: distribution}"),
    "trials": Key(int, "a whole number above 0", needs="search"),
}


def plain(value):
    """Returns a value of a page with NumPy's scalars and arrays as Python's numbers and lists."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if isinstance(value, Mapping):
        return {plain(name): plain(content) for name, content in value.items()}
    return value


def is_a(value, kind: type, items: type = object) -> bool:
    """Whether a value of a page is of a kind, see `Key`; a dictionary's keys must be text."""
    if kind is int:
        return type(value) is int and value > 0
    if kind is Sequence:
        is_sequence = isinstance(value, Sequence) and not isinstance(value, str)
        return is_sequence and all(is_a(item, items) for item in value)
    keys = value if isinstance(value, Mapping) else ()
    return isinstance(value, kind) and all(isinstance(key, str) for key in keys)


def check_stage(file: str, name: str, stage, earlier: Mapping) -> dict:
    """Returns a stage without keys that are None.

    Raises:
        UserError: it isn't as described above.
    """
    if not isinstance(stage, Mapping):
        raise UserError(f"{file}: stage {name!r} is {stage!r}; it must be a dictionary")
    for key in stage:
        if key not in STAGE_KEYS:
            near = difflib.get_close_matches(key, STAGE_KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"keys: {', '.join(STAGE_KEYS)}"
            raise UserError(f"{file}: unknown key {key!r} in a stage: {hint}")
    stage = {key: value for key, value in stage.items() if value is not None}
    for key, value in stage.items():
        known = STAGE_KEYS[key]
        if not is_a(value, known.kind, known.items):
            raise UserError(f"{file}: {key!r} is {value!r}; it must be {known.shown}")
        if known.needs and known.needs not in stage:
            raise UserError(f"{file}: {key!r} needs {known.needs!r} in the same stage")
        if others := [other for other in known.excludes if other in stage]:
            raise UserError(f"{file}: a stage can't have both {key!r} and {others[0]!r}")
    for axis, values in stage.get("axes", {}).items():
        check_axis(file, axis, values)
    for axis, way in stage.get("search", {}).items():
        check_distribution(axis, way)
    for key in ("after", "best"):
        if key in stage and stage[key] not in earlier:
            raise UserError(f"{file}: {key!r} is {stage[key]!r}, which is no earlier stage")
    return stage


def check_axis(file: str, axis: str, values) -> None:
    """Raises UserError unless the values of an axis are a sequence or {label: {axis: value}}."""
    if not isinstance(values, Mapping):
        if not is_a(values, Sequence):
            raise UserError(
                f"{file}: {axis!r} is {values!r}; it must be a sequence, such as (1, 2)"
            )
        return
    for label, fields in values.items():
        if not is_a(fields, Mapping):
            raise UserError(
                f"{file}: {axis!r} has {fields!r} for {label!r}; it must be a dictionary "
                "{axis: value}"
            )


def check_distribution(field: str, way) -> None:
    """Raises UserError unless the distribution of a search is valid."""
    kind = next(iter(way)) if isinstance(way, Mapping) and len(way) == 1 else None
    if kind not in DISTRIBUTIONS:
        raise UserError(
            f"The search over {field} is {way!r}; it must have one of {', '.join(DISTRIBUTIONS)}, "
            "such as {'log_uniform': (1e-4, 1e-2)}"
        )
    values = way[kind]
    if kind == "choices":
        if not is_a(values, Sequence) or not values:
            raise UserError(f"The search over {field} has no choices: give a sequence")
        return
    is_pair = is_a(values, Sequence) and [type(x) in (int, float) for x in values] == [True, True]
    if not is_pair or not values[0] < values[1] or (kind == "log_uniform" and values[0] <= 0):
        above = "0 < low < high" if kind == "log_uniform" else "low < high"
        raise UserError(f"The search over {field} is {way!r}; it must be (low, high), {above}")
