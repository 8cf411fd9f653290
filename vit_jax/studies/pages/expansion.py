"""Expands a stage of a page to its cells."""

import itertools
import re
from collections.abc import Iterator, Mapping

from vit_jax.errors import UserError
from vit_jax.studies.pages.cell import Cell
from vit_jax.studies.pages.presets import ALIASES, as_type, configuration, steps_of


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
