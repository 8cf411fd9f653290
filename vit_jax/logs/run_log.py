"""What a run logs: the console, train.log, metrics.jsonl, and curves for TensorBoard."""

import contextlib
import errno
import json
import logging
import logging.handlers
import os
import sys
import time
from collections.abc import Iterable

import jax
import numpy as np
import tqdm

from vit_jax.checks import COUNT_OR_ZERO, check_range
from vit_jax.errors import UserError, first_line
from vit_jax.logs import tracking
from vit_jax.logs.curves import Curves
from vit_jax.models import predicts_classes
from vit_jax.parallel import distributed
from vit_jax.runs import run_folder
from vit_jax.storage.files import open_path, write_atomically
from vit_jax.storage.mirror import Mirror

logger = logging.getLogger("vit_jax")

# What a resumed run goes on with.
FILES = ("train.log", "metrics.jsonl", "earlier_metrics.jsonl", "corrupt_metrics.jsonl", "wandb_id")
STEPS_AHEAD = 2  # steps that are dispatched before an earlier one must have finished
MAX_SKIPPED_IN_A_ROW = 100  # a run that drops this many updates won't recover


class NonFiniteError(UserError):
    """The loss, the gradient or the parameters are no longer finite."""


def check(config) -> None:
    """Raises UserError if `config.log_every_steps` or `config.wandb` can't be used."""
    check_range("config.log_every_steps", config.log_every_steps, COUNT_OR_ZERO)
    tracking.check(config)


class RunLog:
    """Logs a run's metrics. Every process checks them; only process 0 writes.

    Metrics stay on the device until a step is logged. Until then `record` waits for the step two
    before, never for the one just dispatched.

    Attributes:
        writes: whether this process writes.
        start_step: the step that the run began at.
        step: the last step that was dispatched.
        evaluated: the groups of metrics, such as "val", that metrics.jsonl already has of
            `first_step`.
    """

    def __init__(
        self,
        files: Mirror,
        first_step: int,
        config,
        start_step: int = 0,
        peak_images_per_second: float | None = None,
    ):
        """Opens the logs of a run, without the rows after `first_step`.

        Args:
            files: the run's folder, as `start_logging` returns it.
            first_step: the step that the run starts or resumes at.
            config: the run's configuration; `total_steps`, `batch_size`, `log_every_steps`,
                `on_nonfinite`, `objective` and `wandb` are used.
            start_step: the step that the run began at: 0, unless it is a branch.
            peak_images_per_second: what all devices would train on if the model's matrix products
                took no longer than their peak allows; None: unknown, and no MFU is logged.
        """
        self.files = files
        self.total_steps, self.batch_size = config.total_steps, config.batch_size
        self.log_every_steps = config.log_every_steps
        self.peak_images_per_second = peak_images_per_second
        self.evaluation_title = "evaluation"
        if not predicts_classes(config):
            self.evaluation_title += " of masked patches"
        self.skip_nonfinite, self.skipped_in_a_row = config.on_nonfinite == "skip", 0
        self.writes = jax.process_index() == 0
        self.pending = []  # (step, metrics on the device) since the last flush
        self.step, self.stopwatch = first_step, Stopwatch(first_step)
        self.evaluated = set()
        self.start_step, is_new = start_step, first_step == start_step
        if self.writes:
            self.truncate_rows(first_step, is_new)
            self.rows_file = self.open_rows()
            self.unwritten_rows = []  # until the disk has room for them
            self.curves = [Curves(files.folder, first_step)]
            if config.wandb:
                self.curves.append(tracking.Tracking(files, is_new, config))
        self.progress_bar = tqdm.tqdm(
            total=self.total_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not (self.writes and sys.stderr.isatty()),
        )

    def truncate_rows(self, step: int, is_new: bool) -> None:
        """Removes the rows after `step`, which a resumed run writes again; all if it is new.

        Lines that aren't rows are moved to corrupt_metrics.jsonl. If the run starts anew, rows of
        an earlier start, maybe of another configuration, are moved to earlier_metrics.jsonl.
        """
        path, place = (root / "metrics.jsonl" for root in (self.files.folder, self.files.remote))
        if not path.exists():
            return
        kept, removed, corrupt = [], [], {}
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
            row = parse_row(line)
            if row is not None and row["step"] <= step and not is_new:
                kept.append(line.rstrip() + b"\n")
                if row["step"] == step:
                    self.evaluated |= {name.partition("/")[0] for name in row if "/" in name}
            elif row is not None:
                removed.append(line.rstrip() + b"\n")
            elif line.endswith(b"\n") or not line.startswith(b"{"):
                corrupt[number] = line.rstrip() + b"\n"
            # Or the run was killed while writing the last line.
        if removed and is_new:
            self.append("earlier_metrics.jsonl", removed)
            logger.warning(
                f"{place}: {len(removed)} rows are of an earlier start that left no checkpoint; "
                "moved to earlier_metrics.jsonl"
            )
        if corrupt:
            self.append("corrupt_metrics.jsonl", corrupt.values())
            logger.warning(
                f"{place}: {len(corrupt)} lines aren't rows of a run, the first in line "
                f"{min(corrupt)}; moved to corrupt_metrics.jsonl"
            )
        write_atomically(path, b"".join(kept))

    def append(self, name: str, lines: Iterable[bytes]) -> None:
        """Appends lines to a file in the run's folder."""
        with open(self.files.folder / name, "ab") as file:
            file.write(b"".join(lines))

    def record(self, step: int, metrics: dict) -> None:
        """Takes the metrics of a step, still on the device; flushes if the step is to be logged."""
        self.step = step
        self.progress_bar.update(1)
        self.pending.append((step, metrics))
        if len(self.pending) > STEPS_AHEAD:
            with self.wait("device"):
                jax.block_until_ready(self.pending[-STEPS_AHEAD - 1][1])
        if self.is_logged(step):
            self.flush()

    def is_logged(self, step: int) -> bool:
        """Whether the metrics of a step are logged."""
        every = self.log_every_steps
        return step == self.total_steps or bool(every and step % every == 0)

    def flush(self) -> None:
        """Fetches and checks the pending metrics; logs the last step's if they are to be logged.

        Raises:
            NonFiniteError: metrics of a step aren't finite; with `on_nonfinite="skip"`, of the
                last of too many steps in a row.
        """
        with self.wait("device"):
            steps, self.pending = jax.device_get(self.pending), []
        for step, metrics in steps:
            self.check_finite(step, metrics)
        if steps and self.is_logged(steps[-1][0]):
            self.write_step(*steps[-1])
        if self.writes:
            self.curves[0].flush()

    def check_finite(self, step: int, metrics: dict) -> None:
        """Raises NonFiniteError if metrics aren't finite, unless the step's update was skipped."""
        if all(np.isfinite(value) for value in metrics.values()):
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        values = ", ".join(f"{name} {float(value):g}" for name, value in metrics.items())
        if self.skip_nonfinite:
            logger.warning(f"Step {step}: {values}. Its update was skipped")
            if self.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
                return
            consequence = f"{self.skipped_in_a_row} updates in a row were skipped"
        else:
            consequence = "nothing has been saved since"
        raise NonFiniteError(
            f"Step {step}: {values}. The run has diverged, and {consequence}: lower "
            "config.schedule.base_lr, lengthen config.schedule.warmup_steps or set "
            "config.grad_clip_norm lower (0: gradients aren't clipped), in another --workdir"
        )

    def write_step(self, step: int, metrics: dict) -> None:
        """Writes the metrics of a training step, with speed and waits since the last one."""
        speed = self.stopwatch.read(step)
        rate = speed["steps_per_second"] * self.batch_size
        metrics = {name: float(value) for name, value in metrics.items()}
        speed["images_per_second"] = rate
        if self.peak_images_per_second:
            speed["mfu"] = rate / self.peak_images_per_second
        self.write(step, "train", metrics | speed)
        mfu = f"MFU {speed['mfu']:.1%}  " if "mfu" in speed else ""
        accuracy = "".join(
            f"{name.replace('_', ' ')} {metrics[name]:.3f}  "
            for name in ("accuracy", "patch_accuracy")
            if name in metrics
        )
        left = (self.total_steps - step) * self.batch_size / rate if rate else 0
        logger.info(
            f"step {step}/{self.total_steps}  loss {metrics['loss']:.4f}  "
            f"{accuracy}lr {metrics['learning_rate']:.2e}  "
            f"{rate / jax.device_count():,.0f} images/s/device  {mfu}"
            f"waits {speed['input_wait']:.0%} input {speed['device_wait']:.0%} device  "
            f"left {duration(left)}"
        )

    def write_evaluation(self, step: int, name: str, values: dict[str, float]) -> None:
        """Writes the metrics of an evaluation set at a step; the run's own is named "val"."""
        self.write(step, name, values)
        title = self.evaluation_title if name == "val" else f"evaluation {name}"
        logger.info(f"step {step}/{self.total_steps}  {title}: {evaluation_line(values)}")

    @contextlib.contextmanager
    def pause(self):
        """Excludes the time spent in the block from images per second."""
        with self.wait("device"):
            jax.block_until_ready([metrics for _, metrics in self.pending[-1:]])
        start = time.perf_counter()
        yield
        self.stopwatch.paused += time.perf_counter() - start

    @contextlib.contextmanager
    def wait(self, what: str):
        """Counts the time spent in the block as waiting for "input" or "device"."""
        start = time.perf_counter()
        yield
        self.stopwatch.waited[what] += time.perf_counter() - start

    def write(self, step: int, group: str, values: dict[str, float]) -> None:
        """Adds a row to metrics.jsonl and points to the curves, with names `<group>/<name>`."""
        if not self.writes:
            return
        values = {f"{group}/{name}": value for name, value in values.items()}
        # JSON has no NaN. An evaluation may overflow even if the parameters are finite.
        values = {name: value for name, value in values.items() if np.isfinite(value)}
        self.unwritten_rows.append(json.dumps({"step": step, **values}) + "\n")
        self.write_rows()
        for curves in self.curves:
            curves.add(step, values)

    def open_rows(self):
        return open(self.files.folder / "metrics.jsonl", "ab", buffering=0)

    def reopen_rows(self) -> None:
        """Opens metrics.jsonl again if it was moved or deleted; logs that."""
        path = self.files.folder / "metrics.jsonl"
        if path.exists() and os.path.samestat(path.stat(), os.fstat(self.rows_file.fileno())):
            return
        file, self.rows_file = self.rows_file, self.open_rows()  # raises if the folder is gone
        logger.error(f"{path} was moved or deleted; the rows from now on are in a new one")
        file.close()

    def write_rows(self) -> None:
        """Appends the unwritten rows to metrics.jsonl: all of them, or none if the disk is full."""
        with contextlib.suppress(OSError):  # the folder is gone, as the next checkpoint says
            self.reopen_rows()
        rows, end = "".join(self.unwritten_rows).encode(), self.rows_file.seek(0, os.SEEK_END)
        try:
            if self.rows_file.write(rows) < len(rows):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.unwritten_rows.clear()
        except OSError as error:
            self.rows_file.truncate(end)
            logger.error(
                f"{self.files.remote / 'metrics.jsonl'} can't be written ({error.strerror}): the "
                f"run continues, and {len(self.unwritten_rows)} rows wait to be written"
            )

    def upload(self) -> bool:
        """Sends what was written so far to the bucket, if the run is in one.

        Returns:
            Whether it is there, on every process.

        Raises:
            UserError: another program has taken the run's folder.
        """
        if self.files.is_local:
            return True
        if self.files.lock is not None:
            self.files.lock.check()
        if self.writes:
            self.write_rows()
        return not distributed.any_process(not self.files.upload())

    def close(self) -> None:
        """Writes the rows that are left, and closes the files."""
        self.progress_bar.close()
        if self.writes:
            self.write_rows()
            self.rows_file.close()
            for curves in self.curves:
                curves.close()
            self.files.upload()
        else:
            self.files.close()  # process 0 logs further lines


def parse_row(line: bytes) -> dict | None:
    """Returns a row of metrics.jsonl; None if the line isn't one."""
    try:
        row = json.loads(line.decode())
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def read_rows(workdir) -> list[dict]:
    """Returns the rows of a run's metrics.jsonl, in order; lines that aren't rows are left out.

    Raises:
        UserError: the folder has no such file, or it can't be read.
    """
    path = open_path(workdir) / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or first_line(error)}") from None
    return [row for row in map(parse_row, lines) if row is not None]


class ConsoleHandler(logging.Handler):
    """Prints above the progress bar: warnings and errors to stderr, the rest to stdout."""

    def emit(self, record):
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        with contextlib.suppress(OSError, ValueError):  # a closed terminal; train.log has the line
            tqdm.tqdm.write(self.format(record), file=stream)
            stream.flush()  # clusters redirect it to a file or a pipe


class LogFile(logging.handlers.WatchedFileHandler):
    """Writes train.log, anew if it was deleted; a full disk leaves lines on the console only."""

    def __init__(self, files: Mirror):
        super().__init__(files.folder / "train.log")
        self.files = files

    def emit(self, record):
        with contextlib.suppress(OSError):  # its folder was deleted
            super().emit(record)

    def close(self):
        super().close()
        self.files.close()

    def handleError(self, record):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def start_logging(workdir=None, lock: run_folder.Lock | None = None) -> Mirror | None:
    """Sends what the logger "vit_jax" logs to the console, and to <workdir>/train.log if given.

    Args:
        workdir: the run's folder, which exists.
        lock: its lock.

    Returns:
        The run's folder to write to; None without one.

    Raises:
        UserError: the folder can't be written.
    """
    stop_logging()
    logger.setLevel(logging.INFO if jax.process_index() == 0 else logging.ERROR)
    logger.propagate = False
    console = ConsoleHandler()
    console.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(console)
    if workdir is None:
        return None
    if jax.process_index() != 0:
        return Mirror(workdir, lock=lock)  # all processes check the lock together
    files = Mirror(workdir, existing=FILES, lock=lock)
    file = LogFile(files)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(file)
    return files


def stop_logging() -> None:
    """Closes the files of `start_logging`, and uploads what is left if they are in a bucket."""
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()


class Stopwatch:
    """Measures steps per second, without pauses, and what the program waits for.

    Attributes:
        paused: seconds since the last reading that don't count.
        waited: seconds since the last reading that the program has waited: {what for: seconds}.
    """

    def __init__(self, step: int):
        self.reset(step)

    def reset(self, step: int) -> None:
        self.step, self.start = step, time.perf_counter()
        self.paused, self.waited = 0.0, {"input": 0.0, "device": 0.0}

    def read(self, step: int) -> dict[str, float]:
        """Returns the speed since the last call, and the waits as shares of the time."""
        seconds = max(time.perf_counter() - self.start - self.paused, 1e-9)
        speed = {"steps_per_second": (step - self.step) / seconds}
        speed |= {f"{what}_wait": waited / seconds for what, waited in self.waited.items()}
        self.reset(step)
        return speed


def evaluation_line(values: dict[str, float]) -> str:
    """Returns the metrics of an evaluation as text."""
    names = {"accuracy_top5": "top-5", "patch_accuracy": "patch accuracy"}
    return ", ".join(
        f"{names.get(name, name)} {value:{'.2%' if 'accuracy' in name else '.4f'}}"
        for name, value in values.items()
    )


def duration(seconds: float) -> str:
    """Returns a number of seconds as 45s, 12m05s, 3h20m or 2d04h."""
    seconds = round(seconds)
    for size, unit, smaller, smaller_unit in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // smaller:02d}{smaller_unit}"
    return f"{seconds}s"
