"""Commands and files that run a study's cells on a cluster, instead of running them here."""

import difflib
import itertools
import re
import shlex
from collections.abc import Iterator

from vit_jax.errors import UserError
from vit_jax.storage import buckets
from vit_jax.storage.files import open_path, write_atomically
from vit_jax.studies import cells, launching, pages


def unfinished(study: pages.Study, root) -> Iterator[tuple[str, list[pages.Cell]]]:
    """Yields each stage's name and its cells that aren't finished."""
    for stage, group in itertools.groupby(study.cells, key=lambda cell: cell.stage):
        left = [c for c in group if not is_finished(root, c, study)]
        if left:
            yield stage, left


def is_finished(root, cell: pages.Cell, study: pages.Study) -> bool:
    return cells.status(root, cell, study).state == cells.FINISHED


def command(study: pages.Study, cell: pages.Cell, root) -> str:
    """Returns the command that runs a cell, for a shell in the repository.

    If the cell's values depend on other cells, the command looks them up first, and fails if they
    aren't known.
    """
    known = launching.command(study, cell, root)
    found = f'found=$({lookup(study, cell, root)}) && test -n "$found" && eval "$found"'
    return known or found


def command_of(study: pages.Study, name: str, root) -> str:
    """Returns the command of a cell of a study by its name.

    Raises:
        UserError: there is no such cell, or it isn't known yet how it is run.
    """
    cell = next((cell for cell in study.cells if cell.name == name), None)
    if cell is None:
        near = difflib.get_close_matches(name, [c.name for c in study.cells], n=1, cutoff=0)
        raise UserError(f"--command_of is {name!r}, which is no cell: did you mean {near[0]!r}?")
    if cell.search:
        raise UserError(f"--command_of is {name!r}, whose values a launch draws: run the search")
    needed = [] if cells.best(root, cell, study) else list(cell.candidates)
    needed += [cell.parent] if cell.parent else []
    if left := [other.name for other in needed if not is_finished(root, other, study)]:
        raise UserError(
            f"--command_of is {name!r}, which needs {left[0]}, and {len(left)} of the cells that "
            "it needs aren't finished"
        )
    return launching.command(study, cell, root)


def lookup(study: pages.Study, cell: pages.Cell, root) -> str:
    """Returns the command that prints that of a cell whose values depend on others, once it can."""
    page = f"{study.path}:{study.arg}" if study.arg else str(study.path)
    flags = [page, f"--root={root}", f"--command_of={cell.name}"]
    return shlex.join(["python", "-m", "vit_jax.scaling", "run", *flags])


def commands(study: pages.Study, root) -> Iterator[str]:
    """Yields the commands of the cells that aren't finished, those of a stage below a comment."""
    for stage, group in unfinished(study, root):
        if stage:
            needed = sorted({needed.stage for cell in group for needed in cell.needs})
            yield f"# {stage}" + (f", once {' and '.join(needed)} is finished" if needed else "")
        for cell in group:
            yield command(study, cell, root)


def check_search(study: pages.Study) -> None:
    """Raises UserError if a study's values are drawn from the results of earlier cells."""
    if any(cell.search for cell in study.cells):
        raise UserError(
            "A search draws the values of its cells one after the other: run it, with --workers, "
            "instead of --slurm or --xpk"
        )


def slurm_files(study: pages.Study, root, workers: int) -> Iterator[str]:
    """Writes job arrays for Slurm into `<root>/slurm/`; yields how to submit them.

    <stage>.txt has a command a line, <stage>.sh the array, and submit.sh submits the arrays in
    order. The options of each job are those of launch/slurm.sh.
    """
    check_search(study)
    if buckets.is_bucket(root):
        raise UserError(f"--root is {root}; the files of --slurm must be on a disk: use --print")
    options = [
        line
        for line in (pages.repository() / "launch" / "slurm.sh").read_text().splitlines()
        if line.startswith("#SBATCH") and "--job-name" not in line
    ]
    folder = open_path(root) / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    submit = ["#!/usr/bin/env bash", "# Run in the repository's folder.", "set -euo pipefail"]
    for stage, group in unfinished(study, root):
        name = stage or "cells"
        lines = [launching.command(study, c, root) or lookup(study, c, root) for c in group]
        lines = [line.removeprefix("python ") for line in lines]
        write_atomically(folder / f"{name}.txt", "\n".join(lines) + "\n")
        script = [
            "#!/usr/bin/env bash",
            f"#SBATCH --job-name={name}",
            f"#SBATCH --array=1-{len(group)}%{workers}",
            *options,
            "set -euo pipefail",
            f'line=$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {path(folder, name, "txt")})',
            "if [[ $line == -m* ]]; then  # its values depend on cells that are finished now",
            '    line=$(eval "${PYTHON:-.venv/bin/python} $line")',
            "    line=${line#python }",
            "fi",
            "[[ -n $line ]] || exit 2",
            'eval "exec bash launch/slurm.sh $line"',
        ]
        write_atomically(folder / f"{name}.sh", "\n".join(script) + "\n")
        needed = sorted({needed.stage for cell in group for needed in cell.needs})
        after = [f"${{{variable(n)}}}" for n in needed if not stage_is_finished(study, root, n)]
        depends = f"--dependency=afterok:{':'.join(after)} " if after else ""
        script = path(folder, name, "sh")
        submit.append(f"{variable(stage)}=$(sbatch --parsable {depends}{script})")
        yield f"{folder / name}.sh: an array of {len(group)} jobs, {workers} at a time"
    write_atomically(folder / "submit.sh", "\n".join(submit) + "\n")
    yield f"Submit them: bash {folder / 'submit.sh'}"


def path(folder, name: str, suffix: str) -> str:
    """Returns a file's path, quoted for a shell."""
    return shlex.quote(str(folder / f"{name}.{suffix}"))


def stage_is_finished(study: pages.Study, root, stage: str) -> bool:
    return all(is_finished(root, c, study) for c in study.cells if c.stage == stage)


def variable(stage: str) -> str:
    """Returns the name of the shell variable with a stage's job."""
    return "job_" + re.sub(r"\W", "_", stage or "cells")


def xpk_files(study: pages.Study, root) -> Iterator[str]:
    """Writes a script of xpk workloads for each stage into `<root>/xpk/`; yields how to run them.

    Cluster, TPU type, image and a prefix of the workloads' names are variables of the shell.
    Kueue decides how many run at a time.
    """
    check_search(study)
    folder = open_path("xpk" if buckets.is_bucket(root) else f"{root}/xpk")
    folder.mkdir(parents=True, exist_ok=True)
    for stage, group in unfinished(study, root):
        name = stage or "cells"
        lines = [
            "#!/usr/bin/env bash",
            "# All hosts must see the study's folder: a bucket, or a volume of the cluster.",
            "set -euo pipefail",
            ": ${CLUSTER:?} ${TPU_TYPE:?such as v5litepod-16} ${IMAGE:?} ${PREFIX:="
            + tidy(name)
            + "}",
        ]
        for number, cell in enumerate(group, start=1):
            lines.append(
                f'xpk workload create --cluster="$CLUSTER" --tpu-type="$TPU_TYPE" '
                f'--docker-image="$IMAGE" --workload="$PREFIX-{number}" '
                f"--command={shlex.quote(command(study, cell, root))}  # {cell.name}"
            )
        write_atomically(folder / f"{name}.sh", "\n".join(lines) + "\n")
        needed = sorted({needed.stage for cell in group for needed in cell.needs})
        after = f", once {' and '.join(needed)} is finished" if needed else ""
        yield f"{folder / name}.sh: {len(group)} workloads{after}"


def tidy(name: str) -> str:
    """Returns a name as Kubernetes takes it."""
    return re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:20]
