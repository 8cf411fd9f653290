"""A cell: one run of a study."""

import dataclasses
import types
from collections.abc import Mapping

from vit_jax.studies.pages.presets import steps_of


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        name: its folder, below the study's.
        axes: {axis: label}, for tables.
        config: FILE[:ARG] of its preset.
        args: {":key": value}, the keys of the preset's argument that this cell sets.
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
