"""Tables of a study's cells: what they are, how far they are, and what they cost."""

import collections
import math
import shutil
import sys
from collections.abc import Iterator, Sequence

from vit_jax.studies import cells, pages

ABOVE = "\x1b[{}A\x1b[J"  # moves up so many lines and clears what is below


def number(value: float | None, digits: int = 4) -> str:
    """Returns a number with about so many digits; "?" for None."""
    if value is None:
        return "?"
    size = 0 if value == 0 else math.floor(math.log10(abs(value)))
    if size >= 9 or size < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(digits - 1 - size, 0)}f}"


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yields the lines of a table, its first column aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        aligned = map(str.rjust, others, widths[1:])
        yield "  ".join([first.ljust(widths[0]), *aligned]).rstrip()


def status_lines(study: pages.Study, status: dict[str, cells.Status]) -> Iterator[str]:
    """Yields a table of the state, step and metrics of every cell, and a line that sums it up."""
    rows = [("cell", "state", "step", *study.collect)]
    for cell in study.cells:
        found = status[cell.name]
        steps = [f"{n:,}" for n in (found.step, found.total_steps) if n is not None]
        step = "" if found.step is None else "/".join(steps)
        values = [found.values.get(name) for name in study.collect]
        rows.append(
            (cell.name, found.state, step, *("" if v is None else f"{v:.4f}" for v in values))
        )
    yield from columns(rows)
    yield summary(status)


def summary(status: dict[str, cells.Status]) -> str:
    """Returns how many cells are in which state."""
    counts = collections.Counter(found.state for found in status.values())
    return f"{len(status)} cells: " + ", ".join(f"{n} {state}" for state, n in counts.items())


class Table:
    """The live table of a launch: redrawn in place on a terminal, otherwise a line per change."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stdout
        self.drawn, self.states = 0, {}

    def show(self, launch) -> None:
        """Shows the status of every cell of a `launching.Launch`."""
        if not self.stream.isatty():
            self.write_changes(launch.status)
            return
        width, height = shutil.get_terminal_size()
        lines = [line[: width - 1] for line in status_lines(launch.study, launch.status)]
        if len(lines) > height - 1:
            lines = [*lines[: height - 3], "...", lines[-1]]
        self.stream.write(
            (ABOVE.format(self.drawn) if self.drawn else "") + "\n".join(lines) + "\n"
        )
        self.stream.flush()
        self.drawn = len(lines)

    def write_changes(self, status: dict[str, cells.Status]) -> None:
        for name, found in status.items():
            if self.states.get(name, cells.WAITING) != found.state:
                values = ", ".join(f"{n} {v:.4f}" for n, v in found.values.items())
                what = found.message or values
                self.stream.write(f"{name}: {found.state}{f' ({what})' if what else ''}\n")
                self.states[name] = found.state
        self.stream.flush()
