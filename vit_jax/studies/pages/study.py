"""Loads a study: its page, checked, and the cells of its stages."""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence

from vit_jax.errors import UserError
from vit_jax.studies.pages.cell import Cell
from vit_jax.studies.pages.expansion import expand
from vit_jax.studies.pages.modules import call, import_page
from vit_jax.studies.pages.presets import check_field, configuration, configured
from vit_jax.studies.pages.schema import check_stage, is_a, plain


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
        UserError: there is no such page, its code fails, it isn't as schema.py says, an axis
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
