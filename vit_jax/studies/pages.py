"""Pages of studies: Python files that are a preset and say which runs of it to compare.

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

An axis is a dotted field of the configuration, a name in ALIASES, ":key" for a key of the preset's
argument, or any name whose values are a dictionary {label: {axis: value}}.
"""

import dataclasses
import difflib
import functools
import importlib.util
import inspect
import itertools
import pathlib
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vit_jax.errors import UserError, first_line

ALIASES = {
    "variant": "model.variant",
    "resolution": "image_size",
    "examples": "dataset.examples",
    "images": "total_steps",  # images seen: total_steps x batch_size
    "lr": "schedule.base_lr",
}
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


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        name: its folder, below the study's.
        axes: {axis: label}, for tables.
        config: FILE[:ARG] of its preset.
        args: {":key": value} of that argument, by which the cell's differs from the stage's.
        fields: {dotted field: value} that override the preset's.
        parent: the cell whose folder "{parent}" stands for.
        candidates: cells of which the best gives the fields in `over`.
        over: see `candidates`.
        search: {field: distribution} that the cell's values are drawn from; empty: none are.
        images: images seen, which with the batch size give total_steps; None: it is set otherwise.
    """

    name: str
    axes: dict[str, str]
    config: str
    args: dict[str, object]
    fields: dict[str, object]
    parent: "Cell | None" = None
    candidates: tuple["Cell", ...] = ()
    over: tuple[str, ...] = ()
    search: dict[str, dict] = dataclasses.field(default_factory=dict)
    images: float | None = None

    @property
    def needs(self) -> tuple["Cell", ...]:
        """The cells that must be finished first."""
        return (*self.candidates, *filter(None, [self.parent]))

    @property
    def stage(self) -> str:
        return self.name.rpartition("/")[0]

    def folder(self, root) -> str:
        """Returns the folder of its run, for a study in the folder `root`."""
        return f"{str(root).rstrip('/')}/{self.name}"

    def overrides(
        self, root, best: "Cell | None" = None, drawn: Mapping = types.MappingProxyType({})
    ) -> dict[str, object]:
        """Returns {field: value} for a study in the folder `root`.

        Args:
            root: the study's folder.
            best: the best of `candidates`.
            drawn: {field: value} that a search has drawn.
        """
        fields, images = dict(self.fields), self.images
        if best is not None:
            fields |= {name: best.fields[name] for name in self.over}
            images = best.images if "total_steps" in self.over else images
        fields |= drawn
        if images is not None and "total_steps" not in drawn:
            fields["total_steps"] = steps_of(images, fields, self.config)
        if self.parent is None:
            return fields
        folder = self.parent.folder(root)
        return {
            name: value.replace("{parent}", folder) if isinstance(value, str) else value
            for name, value in fields.items()
        }


@dataclasses.dataclass(frozen=True)
class Study:
    """A study: its page, its argument, the metrics to collect, and its cells in order."""

    path: pathlib.Path
    arg: str
    collect: tuple[str, ...]
    cells: tuple[Cell, ...]
    early_stopping: bool = False


def load(name: str) -> Study:
    """Loads a study.

    Args:
        name: FILE[:ARG].

    Raises:
        UserError: there is no such page, its code fails, it isn't as described above, an axis
            isn't a field, or two cells have the same name.
    """
    file, _, arg = name.partition(":")
    page = import_page(file)
    study = call(page, "get_study", arg)
    if not isinstance(study, Mapping):
        raise UserError(f"{file}: get_study returns {study!r}; it must return a dictionary")
    study = plain(study)
    collect = study.pop("collect", ("val/accuracy",))
    if not is_a(collect, Sequence, str) or not collect:
        raise UserError(
            f"{file}: 'collect' is {collect!r}; it must be a sequence of metrics, such as "
            "('val/accuracy',)"
        )
    early_stopping = study.pop("early_stopping", False)
    if not isinstance(early_stopping, bool):
        raise UserError(f"{file}: 'early_stopping' is {early_stopping!r}; it must be True or False")
    stages = study.pop("stages", None)
    if stages is not None and not is_a(stages, Mapping):
        raise UserError(f"{file}: 'stages' is {stages!r}; it must be a dictionary {{name: stage}}")
    if stages is not None and study:
        raise UserError(f"{file}: beside 'stages' there is {', '.join(study)}; put it in a stage")
    stages = {"": study} if stages is None else stages
    cells = {}
    for stage, content in stages.items():
        content = check_stage(file, stage, content, cells)
        cells[stage] = list(expand(stage, content, cells, file, arg))
    found = tuple(itertools.chain.from_iterable(cells.values()))
    check_names(file, found)
    for cell in found:
        for field in cell.search:
            check_field(configuration(cell.config), field, cell.config)
        configured(cell.config, cell.fields)
        texts = [value for value in cell.fields.values() if isinstance(value, str)]
        if cell.parent is None and any("{parent}" in value for value in texts):
            raise UserError(f"{file}: {cell.name} has '{{parent}}', but its stage has no 'after'")
    return Study(pathlib.Path(file), arg, tuple(collect), found, early_stopping)


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


def check_names(file: str, cells: Sequence[Cell]) -> None:
    """Raises UserError if two cells have the same name, or there is none."""
    if not cells:
        raise UserError(f"{file}: the study has no cells: give 'axes', 'cells' or 'search'")
    seen = {}
    for cell in cells:
        if other := seen.get(cell.name):
            differing = {
                name
                for name in cell.fields.keys() | other.fields.keys()
                if cell.fields.get(name) != other.fields.get(name)
            }
            what = (
                f"they differ in {', '.join(sorted(differing))}" if differing else "they are equal"
            )
            raise UserError(f"{file}: two cells have the name {cell.name!r}: {what}")
        seen[cell.name] = cell


def expand(stage: str, content: Mapping, earlier: Mapping, file: str, arg: str) -> Iterator[Cell]:
    """Yields the cells of a stage; `earlier` are those of the stages before it."""
    preset = content.get("config", f"{file}:{arg}" if arg else file)
    groups = [dict(entry) for entry in content.get("cells", [{}])]
    axes = content.get("axes", {})
    grid = [
        dict(zip(axes, values, strict=True))
        for values in itertools.product(*(labels(axes[axis]) for axis in axes))
    ]
    if content.get("best"):
        yield from best_cells(stage, content, earlier, preset)
        return
    search = {ALIASES.get(axis, axis): way for axis, way in content.get("search", {}).items()}
    trials = range(content.get("trials", 20)) if search else [None]
    parents = earlier[content["after"]] if content.get("after") else [None]
    for parent, group, point, trial in itertools.product(parents, groups, grid, trials):
        chosen = {**group, **point}
        inherited = {}
        for axis in content.get("inherit", ()):
            inherited[axis] = inherited_value(parent, axis, file)
        shown = {**(parent.axes if parent else {}), **{a: text(v) for a, v in chosen.items()}}
        if trial is not None:
            shown["trial"] = f"{trial:03d}"
        values = inherited | content.get("set", {}) | chosen
        config, args, fields, images = settle(preset, values, axes)
        parts = [parent.name.rpartition("/")[2]] if parent else []
        own = {axis: text(value) for axis, value in chosen.items()}
        own |= {"trial": shown["trial"]} if trial is not None else {}
        name = "_".join([*parts, *(f"{short(axis)}={label}" for axis, label in own.items())])
        yield Cell(
            name=f"{stage}/{name or 'run'}".lstrip("/"),
            axes=shown,
            config=config,
            args=args,
            fields=fields,
            parent=parent,
            search=search,
            images=images,
        )


def best_cells(stage: str, content: Mapping, earlier: Mapping, preset: str) -> Iterator[Cell]:
    """Yields a cell for each combination of the axes that `over` leaves of an earlier stage."""
    over = content.get("over", ())
    groups = {}
    for cell in earlier[content["best"]]:
        kept = {axis: label for axis, label in cell.axes.items() if axis not in over}
        groups.setdefault(tuple(kept.items()), []).append(cell)
    for kept, cells in groups.items():
        first, names = cells[0], tuple(ALIASES.get(axis, axis) for axis in over)
        if missing := [name for name in names if name not in first.fields]:
            raise UserError(f"stage {stage!r}: 'over' has {missing[0]!r}, which is no axis there")
        others = {name: value for name, value in first.fields.items() if name not in names}
        if first.images is not None and "total_steps" in others:
            del others["total_steps"]
            others["images"] = first.images
        chosen = {**first.args, **others, **content.get("set", {})}
        config, args, fields, images = settle(preset, chosen, {})
        name = "_".join(f"{short(axis)}={label}" for axis, label in kept) or "run"
        yield Cell(
            name=f"{stage}/{name}".lstrip("/"),
            axes=dict(kept),
            config=config,
            args=args,
            fields=fields,
            parent=first.parent,
            candidates=tuple(cells),
            over=names,
            images=images,
        )


def labels(values) -> list:
    """Returns the values of an axis: those of a sequence, or (label, fields) of a dictionary."""
    return list(values.items()) if isinstance(values, Mapping) else list(values)


def inherited_value(parent: Cell | None, axis: str, file: str):
    """Returns the value of one of the parent's axes."""
    known = {} if parent is None else parent.fields | parent.args
    if axis == "images" and parent is not None and parent.images is not None:
        return parent.images
    if axis == "images" and "total_steps" in known:
        raise UserError(f"{file}: 'inherit' has 'images'; the stage in 'after' sets 'total_steps'")
    field = ALIASES.get(axis, axis)
    if field not in known:
        raise UserError(f"{file}: 'inherit' has {axis!r}, which the stage in 'after' doesn't set")
    return known[field]


def settle(preset: str, chosen: Mapping, axes: Mapping) -> tuple[str, dict, dict, float | None]:
    """Returns a cell's `config`, `args`, `fields` and `images` for the values of axes.

    Of `images` and `total_steps`, the one that comes last counts.

    Raises:
        UserError: an axis isn't a field, or its value has another type.
    """
    values = {}
    for axis, value in chosen.items():
        if isinstance(axes.get(axis), Mapping):
            values |= value[1]
        else:
            values[axis] = value
    file, _, arg = preset.partition(":")
    args = {axis: value for axis, value in values.items() if axis.startswith(":")}
    keys = [f"{axis[1:]}={value}" for axis, value in args.items()]
    arg = ",".join([*keys, *filter(None, [arg])])
    preset = f"{file}:{arg}" if arg else file
    fields = {a: v for a, v in values.items() if not a.startswith(":") and a != "images"}
    fields = {ALIASES.get(axis, axis): value for axis, value in fields.items()}
    config = configuration(preset)
    for name, value in fields.items():
        fields[name] = as_type(config, name, value, preset)
    lengths = [axis for axis in values if axis in ("images", "total_steps")]
    if lengths[-1:] != ["images"]:
        return preset, args, fields, None
    images = values["images"]
    fields["total_steps"] = steps_of(images, fields, preset)
    return preset, args, fields, images


def steps_of(images: float, fields: Mapping, preset: str) -> int:
    """Returns the steps in which a cell with some fields sees so many images."""
    if type(images) not in (int, float) or images <= 0:
        raise UserError(f"{preset}: 'images' is {images!r}; it must be a number above 0")
    return max(round(images / fields.get("batch_size", configuration(preset).batch_size)), 1)


def as_type(config: ConfigDict, field: str, value, preset: str):
    """Returns a value as the type that a field has: 1e6 for a whole number is 1000000."""
    group, name = check_field(config, field, preset)
    kind = group.get_type(name)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return float(value) if kind is float and type(value) is int else value


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


@functools.cache
def import_page(file: str):
    """Returns the module of a page or a preset.

    Raises:
        UserError: there is no such file, or its code fails.
    """
    path = pathlib.Path(file).expanduser()
    if not path.is_file() and (repository() / file).is_file():
        path = repository() / file
    if path.suffix != ".py" or not path.is_file():
        folder = repository() / "configs" / "scaling"
        known = sorted(p.name for p in folder.glob("*.py") if p.stem != "__init__")
        raise UserError(f"There is no study {file}; {folder} has {', '.join(known) or 'none'}")
    if str(repository()) not in sys.path:
        sys.path.insert(0, str(repository()))  # pages import `configs`
    spec = importlib.util.spec_from_file_location(f"study_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{file} fails: {type(error).__name__}: {first_line(error)}") from None
    return module


def call(module, function: str, arg: str):
    """Calls a page's function of an argument."""
    place = pathlib.Path(inspect.getfile(module)).name
    if not hasattr(module, function):
        raise UserError(f"{place} has no function {function}: a study's page needs it")
    try:
        return getattr(module, function)(arg or None)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{place}, {function}: {type(error).__name__}: {first_line(error)}"
        ) from None


def repository() -> pathlib.Path:
    """Returns the folder of train.py.

    Raises:
        UserError: the library is installed without the scripts.
    """
    folder = pathlib.Path(__file__).resolve().parents[2]
    if not (folder / "train.py").is_file():
        raise UserError(f"There is no {folder / 'train.py'}: run studies from a clone")
    return folder


def short(axis: str) -> str:
    """Returns an axis as names of cells have it: the last part of a field."""
    return axis.lstrip(":").rpartition(".")[2]


def text(value) -> str:
    """Returns a value as names of cells have it: B-16, 1e9, 0.003."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Mapping):
        value = value[0]
    if isinstance(value, float) or (type(value) is int and abs(value) >= 1_000_000):
        shown = f"{value:.6g}"
        return re.sub(r"e([+-])0*", lambda sign: "e" + sign[1].strip("+"), shown)
    return re.sub(r"[^\w.+-]+", "-", str(value)).strip("-") or "none"
