"""What a run shows and writes down: console, train.log, metrics.jsonl, TensorBoard."""

import contextlib
import errno
import json
import logging
import os
import pathlib
import sys
import time

import jax
import numpy as np
import tqdm

from vit_jax.files import write_atomically
from vit_jax.runs import run_folder
from vit_jax.runs.curves import Curves
from vit_jax.errors import UserError

logger = logging.getLogger("vit_jax")


STEPS_AHEAD = 2  # that the host may start before the device is done with an earlier one


class NonFiniteError(UserError):
    """The loss, the gradient or the parameters stopped being finite numbers."""


class RunLog:
    """Keeps a run's numbers. Only the first process writes; the others count along.

    Numbers stay on the device until a step is logged: until then `record` waits for the step
    two before, never for the one just started.
    """

    MOST_SKIPPED = 100  # steps in a row: a run that drops more won't recover

    def __init__(self, workdir, first_step: int, config):
        """config: of the run; `total_steps`, `batch_size`, `log_every_steps`, `on_nonfinite`."""
        self.workdir = pathlib.Path(workdir)
        self.total_steps, self.batch_size = config.total_steps, config.batch_size
        self.every = config.log_every_steps
        self.skips, self.skipped_in_a_row = config.on_nonfinite == "skip", 0
        self.writes = jax.process_index() == 0
        self.unchecked = []  # (step, metrics on the device) since the last look
        self.clock = Stopwatch(first_step)
        self.evaluated = False  # whether the step that the run begins at was, by an earlier start
        if self.writes:
            self.drop_rows_after(first_step)
            self.rows = open(self.workdir / "metrics.jsonl", "ab", buffering=0)
            self.unwritten = []  # rows, while the disk is full
            self.curves = Curves(workdir, first_step)
        self.bar = tqdm.tqdm(
            total=self.total_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not (self.writes and sys.stderr.isatty()),
        )

    def drop_rows_after(self, step: int) -> None:
        """Forgets the rows that a run taken up again at `step` will write once more."""
        path = self.workdir / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the run was killed in the middle of the line
                continue
            if row["step"] <= step:
                kept.append(line + "\n")
                evaluation = any(name.startswith("val/") for name in row)
                self.evaluated = row["step"] == step and evaluation
        write_atomically(path, "".join(kept))

    def record(self, step: int, metrics: dict) -> None:
        """Takes in a step's metrics; writes them down where the step is due."""
        self.bar.update(1)
        self.unchecked.append((step, metrics))
        if len(self.unchecked) > STEPS_AHEAD:
            jax.block_until_ready(self.unchecked[-STEPS_AHEAD - 1][1])
        if self.due(step):
            self.flush()

    def due(self, step: int) -> bool:
        return step == self.total_steps or bool(self.every and step % self.every == 0)

    def flush(self) -> None:
        """Fetches what is still on the device: checks all of it, writes down what is due.

        Raises:
            NonFiniteError: naming the first step whose numbers aren't finite; where such steps
                are skipped, the last of too many in a row.
        """
        steps, self.unchecked = jax.device_get(self.unchecked), []
        for step, metrics in steps:
            if all(np.isfinite(value) for value in metrics.values()):
                self.skipped_in_a_row = 0
                continue
            self.skipped_in_a_row += 1
            saved = "nothing was saved since"
            if self.skips:
                logger.warning(f"Step {step}: {listed(metrics)}. Its update was dropped")
                saved = f"{self.skipped_in_a_row} updates in a row were dropped"
            if not self.skips or self.skipped_in_a_row == self.MOST_SKIPPED:
                raise NonFiniteError(
                    f"Step {step}: {listed(metrics)}. The run has diverged, and {saved}: lower "
                    "config.schedule.base_lr, lengthen warmup_steps or set grad_clip_norm, in "
                    "another --workdir"
                )
        if steps and self.due(steps[-1][0]):
            self.write_step(*steps[-1])
        if self.writes:
            self.curves.flush()

    def write_step(self, step: int, metrics: dict) -> None:
        rate = self.clock.steps_per_second(step) * self.batch_size
        metrics = {name: float(value) for name, value in metrics.items()}
        self.write(step, "train", metrics | {"images_per_second": rate})
        left = (self.total_steps - step) * self.batch_size / rate if rate else 0
        logger.info(
            f"step {step}/{self.total_steps}  loss {metrics['loss']:.4f}  "
            f"accuracy {metrics['accuracy']:.3f}  lr {metrics['learning_rate']:.2e}  "
            f"{rate / jax.device_count():,.0f} images/s/device  left {duration(left)}"
        )

    def write_evaluation(self, step: int, name: str, values: dict[str, float]) -> None:
        """Writes the metrics of an evaluation set ("val") of a step."""
        self.write(step, name, values)
        title = "evaluation" if name == "val" else f"evaluation {name}"
        logger.info(f"step {step}/{self.total_steps}  {title}: {evaluation_line(values)}")

    @contextlib.contextmanager
    def pause(self):
        """Keeps what happens inside out of images per second."""
        jax.block_until_ready([metrics for _, metrics in self.unchecked[-1:]])
        start = time.perf_counter()
        yield
        self.clock.paused += time.perf_counter() - start

    def write(self, step: int, group: str, values: dict[str, float]) -> None:
        """Adds a row to metrics.jsonl and points to the curves, names prefixed `group/`."""
        if not self.writes:
            return
        values = {f"{group}/{name}": value for name, value in values.items()}
        # NaN is no JSON; an evaluation may overflow where the parameters are finite still.
        values = {name: value for name, value in values.items() if np.isfinite(value)}
        self.unwritten.append(json.dumps({"step": step, **values}) + "\n")
        self.write_rows()
        self.curves.add(step, values)

    def write_rows(self) -> None:
        """All or none of them, with those that couldn't be written before."""
        rows, end = "".join(self.unwritten).encode(), self.rows.seek(0, os.SEEK_END)
        try:
            if self.rows.write(rows) < len(rows):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.unwritten.clear()
        except OSError as error:
            self.rows.truncate(end)
            logger.error(
                f"{self.workdir / 'metrics.jsonl'} can't be written ({error.strerror}): "
                f"{len(self.unwritten)} rows wait, and the run goes on"
            )

    def close(self) -> None:
        self.bar.close()
        if self.writes:
            self.write_rows()
            self.rows.close()
            self.curves.close()


class ConsoleHandler(logging.Handler):
    """Lines above the progress bar, where there is one: warnings on stderr, the rest on stdout."""

    def emit(self, record):
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        with contextlib.suppress(OSError, ValueError):  # the terminal was closed: the file has it
            tqdm.tqdm.write(self.format(record), file=stream)
            stream.flush()  # to a file or a pipe too, as a cluster's logs are


class LogFile(logging.FileHandler):
    """<workdir>/train.log; while the disk is full, the console alone has the lines."""

    def handleError(self, record):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def start_logging(workdir=None) -> None:
    """Sends the lines of the logger "vit_jax" to the console, and to <workdir>/train.log.

    Raises:
        UserError: the folder can't be written to.
    """
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.INFO if jax.process_index() == 0 else logging.ERROR)
    logger.propagate = False
    console = ConsoleHandler()
    console.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(console)
    if workdir is None or jax.process_index() != 0:
        return
    run_folder.make(workdir)
    file = LogFile(pathlib.Path(workdir) / "train.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(file)


class Stopwatch:
    """Steps per second since the last reading, without the pauses."""

    def __init__(self, step: int):
        self.step, self.start, self.paused = step, time.perf_counter(), 0.0

    def steps_per_second(self, step: int) -> float:
        now = time.perf_counter()
        rate = (step - self.step) / max(now - self.start - self.paused, 1e-9)
        self.step, self.start, self.paused = step, now, 0.0
        return rate


def evaluation_line(values: dict[str, float]) -> str:
    """An evaluation as a line of text."""
    return (
        f"loss {values['loss']:.4f}, accuracy {values['accuracy']:.2%}, "
        f"top-5 {values['accuracy_top5']:.2%}"
    )


def listed(metrics: dict) -> str:
    return ", ".join(f"{name} {float(value):g}" for name, value in metrics.items())


def duration(seconds: float) -> str:
    """Seconds as people say them: 45s, 12m05s, 3h20m, 2d04h."""
    seconds = round(seconds)
    for size, unit, below, below_unit in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // below:02d}{below_unit}"
    return f"{seconds}s"
