"""Runs, prints or submits the cells of a study."""

import argparse
import dataclasses
import fnmatch
import logging
import shlex
import sys
from collections.abc import Iterator

from vit_jax.checks import COUNT, check_range
from vit_jax.errors import EXIT_PREEMPTED, UserError
from vit_jax.runs import run_folder
from vit_jax.scaling import flops
from vit_jax.studies import cells, costs, launching, pages, searching, showing, submitting


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `python -m vit_jax.scaling run`."""
    add = parser.add_argument
    add("study", help="its page, FILE[:ARG], such as configs/scaling/digits.py or ...:quick")
    add("--root", required=True, help="the study's folder, on a disk or in a bucket")
    add("--workers", type=int, help="how many cells run at a time (default: 1)")
    add("--cells", help="only cells whose names match, such as 'depth=2_*'")
    add("--compile_for", help="with --dry_run: predicts the hours on a machine, such as v5e:4x4")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry_run", action="store_true", help="print the cells and what they cost")
    how.add_argument("--print", action="store_true", help="print the cells' commands")
    how.add_argument("--command_of", metavar="CELL", help="print the command of one cell")
    how.add_argument("--slurm", action="store_true", help="write job arrays to ROOT/slurm/")
    how.add_argument("--xpk", action="store_true", help="write xpk workloads to ROOT/xpk/")
    how.add_argument("--status", action="store_true", help="print how far the cells are")


def run(args: argparse.Namespace) -> Iterator[str]:
    """Yields the lines to print.

    Raises:
        UserError: a page that can't be used, a study that changed under its cells, or cells that
            failed.
    """
    for flag in ("dry_run", "print", "command_of", "xpk", "status"):
        if args.workers is not None and getattr(args, flag):
            raise UserError(f"--workers is for running cells and --slurm, not for --{flag}")
    args.workers = 1 if args.workers is None else args.workers
    check_range("--workers", args.workers, COUNT)
    if args.compile_for and not args.dry_run:
        raise UserError("--compile_for predicts hours for --dry_run: add it, or leave it out")
    logging.getLogger("absl").setLevel(logging.ERROR)
    if run_folder.has_config(args.root):
        raise UserError(f"--root is {args.root}, a run's folder: give a folder of the study's own")
    study = pages.load(args.study)
    if args.cells:
        study = selected(study, args.cells)
    if args.dry_run:
        yield from dry_run(study, args.root, args.compile_for)
        return
    if args.command_of and any(cell.name == args.command_of for cell in study.cells):
        study = selected(study, args.command_of)
    cells.check_unchanged(args.root, study)
    if args.command_of:
        yield submitting.command_of(study, args.command_of, args.root)
    elif args.print:
        yield from submitting.commands(study, args.root)
    elif args.slurm:
        yield from submitting.slurm_files(study, args.root, args.workers)
    elif args.xpk:
        yield from submitting.xpk_files(study, args.root)
    elif args.status:
        status = {c.name: cells.status(args.root, c, study) for c in study.cells}
        yield from showing.status_lines(study, status)
    else:
        yield from launch(study, args)


def selected(study: pages.Study, pattern: str) -> pages.Study:
    """Returns a study with the cells whose names match a pattern, and those that they need."""
    chosen = {c.name for c in study.cells if fnmatch.fnmatchcase(c.name, pattern)}
    if not chosen:
        raise UserError(f"--cells is {pattern!r}; no cell matches, such as {study.cells[0].name!r}")
    for cell in reversed(study.cells):
        if cell.name in chosen:
            chosen |= {needed.name for needed in cell.needs}
    return dataclasses.replace(study, cells=tuple(c for c in study.cells if c.name in chosen))


def launch(study: pages.Study, args: argparse.Namespace) -> Iterator[str]:
    """Runs the cells; yields what became of them."""
    for cell in study.cells:  # before any takes hours
        if not cell.search and not cell.over:  # which have other values once they are drawn
            costs.check_cell(cell, args.root)
    if not args.cells and (left := cells.strays(args.root, study)):
        yield f"No longer in the study, and kept: {', '.join(left)}"
    search = None
    if any(cell.search for cell in study.cells):
        search = searching.Search(args.root, study)
    running = launching.Launch(study, args.root, args.workers, search)
    table = showing.Table()
    running.run(table.show)
    if not table.stream.isatty():
        yield from showing.status_lines(study, running.status)
    if search is not None and (name := search.best()):
        yield from best_of(study, search, name, args)
    if running.stopping:
        print("Stopped: the same command goes on", file=sys.stderr)
        sys.exit(EXIT_PREEMPTED)
    failed = [name for name, found in running.status.items() if found.state == cells.FAILED]
    if failed:
        first = running.status[failed[0]].message
        raise UserError(
            f"{len(failed)} of {len(study.cells)} cells failed, {failed[0]} with {first}: fix "
            "that, then run the same command again"
        )
    left = [n for n, s in running.status.items() if s.state not in (cells.FINISHED, cells.PRUNED)]
    if left:
        raise UserError(f"{len(left)} cells aren't finished: the same command goes on with them")
    yield f"Next: python -m vit_jax.scaling fit {args.root}"


def best_of(study: pages.Study, search, name: str, args) -> Iterator[str]:
    """Yields a table of a search's cells, and the command of the best one."""
    fields = {field: None for cell in study.cells for field in cell.search}
    rows = [("cell", "state", *fields, study.collect[0])]
    for cell, trial in search.trials.items():
        values = [trial["values"].get(field) for field in fields]
        shown = [showing.number(v) if isinstance(v, float) else str(v) for v in values]
        rows.append((cell, trial.get("state", ""), *shown, showing.number(trial.get("value"))))
    yield from showing.columns(rows)
    best = next(cell for cell in study.cells if cell.name == name)
    overrides = best.overrides(args.root, drawn=search.trials[name]["values"])
    flags = launching.arguments(best, args.root, overrides)
    yield f"Best: {name}\n  python train.py {shlex.join(flags)}"


def dry_run(study: pages.Study, root, machine: str | None) -> Iterator[str]:
    """Yields a table of what the cells cost, and the sum."""

    def count(model, shape):
        return flops.count_params(model, shape), flops.forward_flops(model, shape)

    found = [costs.cost(cell, root, count) for cell in study.cells]
    heads = "cell", "variant", "parameters", "GFLOPs", "images", "exaFLOPs"
    rows = [heads + (("hours",) if machine else ())]
    total = 0.0
    for cell, row in zip(study.cells, found, strict=True):
        line = (
            *(cell.name, row["variant"], f"{row['params'] / 1e6:,.2f} M"),
            *(showing.number(row[name]) for name in ("gflops", "images", "exaflops")),
        )
        if machine:
            hours = predicted_hours(cell, root, machine, row["steps"])
            total += hours or 0.0
            line += (showing.number(hours),)
        rows.append(line)
    images, exaflops = (sum(row[n] or 0 for row in found) for n in ("images", "exaflops"))
    sums = (f"{len(found)} cells", "", "", "", showing.number(images), showing.number(exaflops))
    yield from showing.columns([*rows, sums + ((showing.number(total),) if machine else ())])
    yield "GFLOPs: of the forward pass of one image. exaFLOPs: three times the forward passes."
    if any(row["images"] is None for row in found):
        yield "?: the size of the dataset decides. The sums are of the other cells."
    if assumed := sorted({row["assumed"] for row in found if row["assumed"]}):
        classes = f"{costs.ASSUMED_CLASSES:,}"
        yield f"Classes of {', '.join(assumed)} aren't known: counted with {classes}."
    if any(cell.search or cell.candidates for cell in study.cells):
        yield "Values that a search draws, or the best cell decides, are counted at the preset's."
    if machine:
        yield (
            f"hours: on {machine}, of training steps alone, as --compile_for predicts; ?: the run "
            "doesn't fit, or its steps aren't known."
        )


def predicted_hours(cell, root, machine: str, steps: int | None) -> float | None:
    """Returns the hours that a cell trains on a machine; None if it doesn't fit."""
    seconds = costs.step_seconds(cell, root, machine)
    return None if seconds is None or steps is None else seconds * steps / 3600
