"""Runs the cells of a study as processes of train.py, some at a time."""

import contextlib
import dataclasses
import glob
import logging
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from vit_jax.errors import EXIT_PREEMPTED, UserError, first_line
from vit_jax.storage import buckets, lease
from vit_jax.storage.files import open_path
from vit_jax.studies import cells, pages
from vit_jax.studies.cells import ELSEWHERE, FAILED, FINISHED, PRUNED, RUNNING, STOPPED, WAITING

logger = logging.getLogger("vit_jax")

POLL_SECONDS = 0.5
READ_SECONDS = 2.0  # how often the logs of cells are read
ENDED = (FINISHED, FAILED, PRUNED)


def arguments(cell: pages.Cell, root, overrides: dict) -> list[str]:
    """Returns the arguments of train.py that run a cell."""
    fields = [f"--config.{name}={flag_value(value)}" for name, value in overrides.items()]
    return [f"--config={cell.config}", *fields, f"--workdir={cell.folder(root)}"]


def flag_value(value) -> str:
    return value if isinstance(value, str) else repr(value)


def command(study: pages.Study, cell: pages.Cell, root) -> str | None:
    """Returns the command of a cell for a shell in the repository; None: it isn't known yet."""
    chosen = cells.best(root, cell, study)
    if cell.search or (cell.candidates and chosen is None):
        return None
    overrides = cell.overrides(root, chosen)
    return shlex.join(["python", "train.py", *arguments(cell, root, overrides)])


@dataclasses.dataclass
class Active:
    """A cell that runs."""

    cell: pages.Cell
    process: subprocess.Popen
    output: pathlib.Path
    lease: object
    slot: int
    pruned: bool = False
    num_signals: int = 0  # sent to it


class Launch:
    """Runs a study.

    Attributes:
        status: {cell's name: its status}.
        stopping: whether a signal has asked to stop; nothing is started any more then.
    """

    def __init__(self, study: pages.Study, root, workers: int, search=None):
        """Prepares to run the cells of a study.

        Args:
            study: the study.
            root: its folder, on a disk or in a bucket.
            workers: how many cells run at a time.
            search: a `searching.Search`, for studies whose cells draw values.

        Raises:
            UserError: there are fewer GPUs than workers.
        """
        self.study, self.root, self.workers, self.search = study, root, workers, search
        self.gpus = visible_gpus()
        if self.gpus and workers > len(self.gpus):
            raise UserError(f"--workers={workers} is more than the {len(self.gpus)} GPUs here")
        self.active: list[Active] = []
        self.stopping, self.num_signals = False, 0
        self.script = pages.repository() / "train.py"
        self.status, self.unreadable = {}, set()
        for cell in study.cells:
            self.status[cell.name] = self.read_status(cell)
        self.next_try = {}  # of cells that another launch runs, when to look again
        self.tried = set()  # cells whose attempt in this launch has ended

    def read_status(self, cell: pages.Cell) -> cells.Status:
        """Returns a cell's status; the last one known, if its files can't be read."""
        try:
            return cells.status(self.root, cell, self.study)
        except (OSError, ValueError) as error:  # also UserError
            if cell.name not in self.unreadable:
                logger.warning(f"{cell.name} can't be read: {first_line(error)}")
                self.unreadable.add(cell.name)
            return dataclasses.replace(self.status.get(cell.name, cells.Status(WAITING)))

    def run(self, show: Callable[["Launch"], None]) -> None:
        """Runs all cells that aren't finished.

        Args:
            show: called when something may have changed.
        """
        last_read = 0.0
        with self.signals():
            try:
                while self.active or (not self.stopping and self.remaining()):
                    self.pass_on_signals()
                    self.collect_ended()
                    if not self.stopping:
                        self.start_ready()
                    if time.monotonic() - last_read > READ_SECONDS:
                        self.read_logs()
                        last_read = time.monotonic()
                        show(self)
                    time.sleep(POLL_SECONDS)
                self.read_logs()
                show(self)
            finally:
                for active in self.active:
                    active.process.terminate()

    def pass_on_signals(self) -> None:
        """Sends signals that have arrived to the processes, also to those that just began.

        The handler only counts: it may interrupt the start of a process.
        """
        for active in self.active:
            if active.num_signals >= self.num_signals:
                continue
            active.process.kill() if self.num_signals > 1 else active.process.terminate()
            active.num_signals = self.num_signals

    def remaining(self) -> list[pages.Cell]:
        """Returns the cells that can still be run, now or once others are finished."""
        return [
            cell
            for cell in self.study.cells
            if cell.name not in self.tried
            and self.status[cell.name].state not in (FINISHED, PRUNED)
            and not self.lacks(cell)
        ]

    def is_lost(self, cell: pages.Cell) -> bool:
        """Whether a cell won't finish in this launch."""
        if self.status[cell.name].state == FINISHED:
            return False
        return cell.name in self.tried or self.lacks(cell)

    def lacks(self, cell: pages.Cell) -> bool:
        """Whether what a cell needs won't finish; of its candidates, one that does is enough."""
        failed = [c for c in cell.candidates if self.has_failed(c)]
        lost = [c for c in cell.needs if c not in failed and self.is_lost(c)]
        return bool(lost) or len(failed) == len(cell.candidates) > 0

    def has_failed(self, cell: pages.Cell) -> bool:
        return cell.name in self.tried and self.status[cell.name].state == FAILED

    def is_ready(self, cell: pages.Cell) -> bool:
        """Whether all that a cell needs has ended, well enough."""
        left = [c for c in cell.needs if self.status[c.name].state != FINISHED]
        return all(c in cell.candidates and self.has_failed(c) for c in left)

    def start_ready(self) -> None:
        """Starts cells as long as there are workers, and cells whose needs are finished."""
        running = {active.cell.name for active in self.active}
        for cell in self.remaining():
            if len(self.active) >= self.workers or self.stopping:
                return
            if cell.name not in running and self.is_ready(cell):
                self.start(cell)

    def start(self, cell: pages.Cell) -> None:
        """Starts a cell, unless another launch runs it."""
        if time.monotonic() < self.next_try.get(cell.name, 0.0):
            return
        held = self.take(cell)
        if held is False:
            self.leave(cell)
            return
        found = self.read_status(cell)
        if found.state in (FINISHED, PRUNED):  # by another launch, just now
            self.status[cell.name] = found
            release(held)
            return
        try:
            chosen = self.best_candidate(cell)
            drawn = self.search.values(cell) if self.search is not None and cell.search else {}
            overrides = cell.overrides(self.root, chosen, drawn)
        except UserError as error:
            self.end(cell, FAILED, str(error))
            release(held)
            return
        cells.forget(self.root, cell)
        output = self.output_of(cell)
        flags = arguments(cell, self.root, overrides)
        slot = min(set(range(self.workers)) - {active.slot for active in self.active})
        with open(output, "ab") as file:
            process = subprocess.Popen(
                [sys.executable, str(self.script), *flags],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches only this process, which passes it on
                env=self.environment(slot),
            )
        self.active.append(Active(cell, process, output, held, slot))
        self.status[cell.name] = dataclasses.replace(found, state=RUNNING, message="")

    def best_candidate(self, cell: pages.Cell) -> pages.Cell | None:
        """Returns the best of a cell's candidates, and names those that failed."""
        chosen = cells.best(self.root, cell, self.study)
        if cell.candidates and chosen is None:
            raise UserError("a cell that may be the best runs again: the same command goes on")
        if failed := [c.name for c in cell.candidates if self.has_failed(c)]:
            logger.warning(f"{cell.name}: the best without {', '.join(failed)}, which failed")
        return chosen

    def leave(self, cell: pages.Cell) -> None:
        """Leaves a cell to the launch that runs it, for now."""
        self.status[cell.name].state = ELSEWHERE
        self.next_try[cell.name] = time.monotonic() + READ_SECONDS

    def environment(self, slot: int) -> dict[str, str]:
        """Returns the environment of a worker: with several, each has its own GPUs."""
        if self.workers == 1 or not self.gpus:
            return dict(os.environ)
        return {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(self.gpus[slot :: self.workers])}

    def take(self, cell: pages.Cell):
        """Takes the lease of a cell.

        Returns:
            The lease, or None where files can't be locked; False if another launch has it, or if
            its run still goes on, such as after its launch was killed.
        """
        notes, workdir = cells.folder_of_notes(self.root, cell), open_path(self.root) / cell.name
        notes.mkdir(parents=True, exist_ok=True)
        held = None
        try:
            held = lease.acquire(notes)
            if workdir.is_dir():
                release(lease.acquire(workdir))
        except lease.Taken:
            release(held)
            return False
        return held

    def output_of(self, cell: pages.Cell) -> pathlib.Path:
        """Returns the file that gets what a cell prints."""
        if not buckets.is_bucket(self.root):
            return pathlib.Path(cells.folder_of_notes(self.root, cell)) / "output.log"
        name = cell.name.replace("/", "_")
        return pathlib.Path(tempfile.gettempdir()) / f"vit_jax_{os.getpid()}_{name}.log"

    def collect_ended(self) -> None:
        """Notes which processes have ended, and how."""
        for active in [a for a in self.active if a.process.poll() is not None]:
            self.active.remove(active)
            code = active.process.returncode
            found = self.read_status(active.cell)
            self.status[active.cell.name] = found
            if active.pruned:
                self.end(active.cell, PRUNED, "")
            elif found.state == FINISHED:
                self.tried.add(active.cell.name)
            elif code == EXIT_PREEMPTED or code in (-signal.SIGTERM, -signal.SIGINT):
                self.end(active.cell, STOPPED, "")
            elif lease.TAKEN in (line := last_line(active.output)):
                self.leave(active.cell)  # a run whose launch was killed had just begun
            else:
                self.end(active.cell, FAILED, f"exit code {code}: {line}")
            ended = self.status[active.cell.name]
            if self.search is not None and active.cell.search and ended.state != ELSEWHERE:
                self.search.tell(active.cell, ended)
            release(active.lease)

    def end(self, cell: pages.Cell, state: str, message: str) -> None:
        """Notes how the attempt of a cell has ended."""
        self.tried.add(cell.name)
        found = self.status[cell.name]
        found.state, found.message = state, message
        cells.note(self.root, cell, state, message)

    def read_logs(self) -> None:
        """Reads how far cells are; stops those that the search prunes."""
        running = {active.cell.name: active for active in self.active}
        for cell in self.study.cells:
            state = self.status[cell.name].state
            if cell.name not in running and state not in (ELSEWHERE, WAITING, STOPPED):
                continue
            found = self.read_status(cell)
            if active := running.get(cell.name):
                found.state = RUNNING
                if self.search is not None and cell.search and not active.pruned:
                    active.pruned = self.search.prunes(cell, found)
                    if active.pruned:
                        active.process.terminate()
            elif state == ELSEWHERE and found.state != FINISHED:
                found.state = ELSEWHERE
            self.status[cell.name] = found

    @contextlib.contextmanager
    def signals(self):
        """Within the block, SIGTERM and Ctrl-C stop the cells, which save; a second one kills."""

        def stop(number, frame):
            self.num_signals += 1
            self.stopping = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def release(held) -> None:
    if held:
        held.release()


def last_line(path: pathlib.Path) -> str:
    """Returns the last line of a file that isn't empty."""
    try:
        lines = path.read_bytes().decode(errors="replace").splitlines()
    except OSError as error:
        return first_line(error)
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def visible_gpus() -> list[str]:
    """Returns the numbers of the GPUs that processes here may use."""
    if (listed := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [number for number in listed.split(",") if number]
    # CUDA numbers those that there are from 0, whatever their files are called.
    return [str(number) for number in range(len(glob.glob("/dev/nvidia[0-9]*")))]
