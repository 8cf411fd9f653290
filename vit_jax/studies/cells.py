"""Reads the state of a study's cells from its folder.

<root>/<cell>/               the cell's run, as train.py writes it
<root>/.study/<cell>/        what the study notes of it: attempt.json, of the last attempt that
                             didn't finish; output.log, what it printed; and the lease of the
                             launch that runs it
"""

import dataclasses
import json

from vit_jax.errors import UserError
from vit_jax.logs.run_log import read_rows
from vit_jax.runs import resuming, run_folder
from vit_jax.storage.files import open_path, write_atomically
from vit_jax.studies import pages
from vit_jax.training import metrics as known_metrics

WAITING, RUNNING, STOPPED, FINISHED = "waiting", "running", "stopped", "finished"
FAILED, PRUNED, ELSEWHERE = "failed", "pruned", "elsewhere"

# Fields that train.py fills in or that may change, and the paths of runs, which may have moved. Two
# exceptions are in `check_unchanged`: what sets a cell's length, and what it starts from, unless
# that is another cell.
NOT_COMPARED = (
    *resuming.MAY_CHANGE,
    *("total_steps", "num_classes", "dataset.order", "dataset.num_examples", "dataset.exif"),
    *(
        "dataset.parts",
        "dataset.offset",
        "dataset.fingerprint",
        "model.representation_size",
        "init_from",
    ),
)


@dataclasses.dataclass
class Status:
    """A cell's state, one of the above, with what its run has logged.

    Attributes:
        state: see above.
        step, total_steps: of the run; None before it has begun.
        values: {metric: its last value, or that of the best evaluation}, of those that the study
            collects.
        evaluations: ((step, value of the first of them), ...).
        message: why it failed.
    """

    state: str
    step: int | None = None
    total_steps: int | None = None
    values: dict[str, float] = dataclasses.field(default_factory=dict)
    evaluations: tuple[tuple[int, float], ...] = ()
    message: str = ""


def folder_of_notes(root, cell: pages.Cell):
    return open_path(root) / ".study" / cell.name


def status(root, cell: pages.Cell, study: pages.Study) -> Status:
    """Returns a cell's status; never RUNNING or ELSEWHERE, which files don't show.

    A run is finished once its last step is evaluated and saved.
    """
    workdir, collect = open_path(root) / cell.name, study.collect
    found = Status(WAITING)
    if not run_folder.has_config(workdir):
        return noted(root, cell, found)
    found.total_steps = json.loads((workdir / "config.json").read_text()).get("total_steps")
    found.state = STOPPED
    rows = read_rows(workdir) if (workdir / "metrics.jsonl").exists() else []
    is_evaluated = any("val/loss" in row and row["step"] == found.total_steps for row in rows)
    found.step = max((row["step"] for row in rows), default=0)
    evaluated = [row for row in rows if collect[0] in row]
    found.evaluations = tuple((row["step"], row[collect[0]]) for row in evaluated)
    if study.early_stopping and evaluated:
        chosen = better(collect[0])(evaluated, key=lambda row: row[collect[0]])
        rows = [row for row in rows if row["step"] == chosen["step"]]
    for row in rows:
        found.values |= {name: row[name] for name in collect if name in row}
    if is_evaluated and found.total_steps in run_folder.checkpoint_steps(workdir):
        found.state = FINISHED
        return found
    return noted(root, cell, found)


def noted(root, cell: pages.Cell, found: Status) -> Status:
    """Adds to a status what the last attempt noted."""
    path = folder_of_notes(root, cell) / "attempt.json"
    try:
        attempt = json.loads(path.read_text())
        found.state, found.message = attempt["state"], attempt["message"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return found


def note(root, cell: pages.Cell, state: str, message: str = "") -> None:
    """Notes how an attempt ended."""
    folder = folder_of_notes(root, cell)
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"state": state, "message": message}) + "\n"
    write_atomically(folder / "attempt.json", content)


def forget(root, cell: pages.Cell) -> None:
    """Removes what was noted of earlier attempts."""
    (folder_of_notes(root, cell) / "attempt.json").unlink(missing_ok=True)


def best(root, cell: pages.Cell, study: pages.Study) -> pages.Cell | None:
    """Returns the best of a cell's candidates that finished, by the first metric.

    Returns:
        The best; None as long as one of them has neither finished nor failed, or if all failed.

    Raises:
        UserError: a candidate that finished has no such metric.
    """
    found = {c.name: status(root, c, study) for c in cell.candidates}
    if any(s.state not in (FINISHED, FAILED) for s in found.values()):
        return None
    finished = [c for c in cell.candidates if found[c.name].state == FINISHED]
    metric = study.collect[0]
    values = [found[c.name].values.get(metric) for c in finished]
    if None in values:
        raise UserError(
            f"{finished[values.index(None)].name} has no {metric!r}, which decides which cell is "
            "the best: change 'collect' in the study's page"
        )
    return finished[values.index(better(metric)(values))] if finished else None


def better(metric: str):
    """Returns min or max, whichever is the better value of a metric."""
    return min if metric.rpartition("/")[2] in known_metrics.LOWER_IS_BETTER else max


def check_unchanged(root, study: pages.Study) -> None:
    """Raises UserError if cells that have begun had another configuration; names what changed."""
    changed = []
    for cell in study.cells:
        workdir = open_path(root) / cell.name
        if cell.search or not run_folder.has_config(workdir):
            continue
        chosen = best(root, cell, study)
        if cell.candidates and chosen is None:
            continue
        recorded = run_folder.require_config(workdir)
        config = pages.configured(cell.config, cell.overrides(root, chosen))
        old, new = resuming.as_flat_dict(recorded), resuming.as_flat_dict(config)
        compared = {"num_epochs" if new.get("total_steps") is None else "total_steps"}
        # The best may be another one, once a candidate that had failed is finished.
        follows = (*cell.over, "total_steps") if cell.candidates else ()
        if cell.parent is None:
            compared.add("init_from")
        differing = [
            f"{field}: {old[field]!r} -> {new[field]!r}"
            for field in resuming.fields_that_differ(recorded, config)
            if field in old and field in new
            if field in compared or not resuming.is_in(field, NOT_COMPARED)
            if field not in follows
        ]
        if differing:
            changed.append(f"{cell.name} ({', '.join(differing)})")
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"The study has changed under {len(changed)} of its cells in {root}: "
            f"{'; '.join(changed[:3])}{more}. They are kept as they are: use another --root, or "
            "the page as it was"
        )


def strays(root, study: pages.Study) -> list[str]:
    """Returns the names of runs in the folder that are no cells of the study any more."""
    notes = open_path(root) / ".study"
    names = {cell.name for cell in study.cells}
    try:
        known = json.loads((notes / "cells.json").read_text())
    except (OSError, ValueError):
        known = []
    kept = [n for n in known if n not in names and run_folder.has_config(open_path(root) / n)]
    notes.mkdir(parents=True, exist_ok=True)
    write_atomically(notes / "cells.json", json.dumps([*names, *kept], indent=0) + "\n")
    return kept
