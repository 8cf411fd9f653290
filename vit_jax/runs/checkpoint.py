"""Checkpoints of a run, written with Orbax: saving, resuming, and loading parameters.

<workdir>/checkpoints/<step>/       one checkpoint, a folder for each item: `params`,
                                    `opt_state`, `ema_params` (if the run keeps an average),
                                    and `metrics`, of an evaluation of this step; its metadata
                                    has the state's counters
<workdir>/corrupt_checkpoints/      checkpoints that couldn't be read

A run needs nothing else to resume: randomness and the order of the examples follow from the seed
and the step. Every field of `TrainState` is stored. In an older checkpoint, which lacks it, a new
field has its initial value, or 0 if it is a counter.
"""

import contextlib
import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Callable

import jax
import numpy as np
from etils import epath, epy

from vit_jax.checks import COUNT_OR_ZERO, check_choice, check_ranges
from vit_jax.errors import Unreachable, UserError, first_line
from vit_jax.models import predicts_classes
from vit_jax.parallel import distributed
from vit_jax.runs import run_folder
from vit_jax.runs.checkpoint_items import (
    CorruptCheckpoint,
    lists_item,
    read_item,
    silence_unfinished_tasks,
    stored_counters,
)
from vit_jax.runs.checkpoint_paths import parse_step
from vit_jax.storage import buckets, files
from vit_jax.storage.buckets import says_if_waiting
from vit_jax.storage.files import write_atomically
from vit_jax.training import metrics
from vit_jax.training.train_state import TrainState

with epy.lazy_imports():  # takes a second
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers

logger = logging.getLogger("vit_jax")

REQUIRED_ITEMS = ("params", "opt_state")  # every checkpoint has them


def check(config) -> None:
    """Raises UserError if `config.best_metric` or the intervals of saving can't be used."""
    intervals = ("eval_every_steps", "checkpoint_every_steps", "keep_every_steps")
    check_ranges("config", config, dict.fromkeys(intervals, COUNT_OR_ZERO))
    saves = [config.checkpoint_every_steps]
    if config.best_metric:  # every evaluation saves too
        saves.append(config.eval_every_steps)
    if config.keep_every_steps and not any(n and config.keep_every_steps % n == 0 for n in saves):
        raise UserError(
            f"config.keep_every_steps is {config.keep_every_steps}; it must be a multiple of "
            f"config.checkpoint_every_steps, {config.checkpoint_every_steps}"
        )
    if config.best_metric:
        names = metrics.NAMES if predicts_classes(config) else metrics.MASKED_NAMES
        check_choice("config.best_metric", config.best_metric, names)


class Checkpoints:
    """The checkpoints of a run.

    Keeps the latest two, the best, and optionally every n-th. Saving is asynchronous and
    atomic: a folder <step> exists only once it is complete.
    """

    def __init__(self, workdir, best_metric: str | None = None, keep_every_steps: int = 0):
        """Opens the checkpoints in a run's folder.

        Args:
            workdir: the run's folder.
            best_metric: the evaluation metric that decides which checkpoint is the best; the
                lowest "loss" is the best, and the highest value of other metrics.
            keep_every_steps: keeps every checkpoint whose step is a multiple of it; 0: none.

        Raises:
            UserError: there are checkpoints, and the metadata of all of them is corrupt.
        """
        self.folder = files.absolute_path(workdir) / "checkpoints"
        self.saving_step = None  # the step given to Orbax last, which may be still being saved
        self.last_step = 0  # the last step that was to be saved
        self.failed_step = None  # the last step that couldn't be saved
        self.abandoned = False
        silence_unfinished_tasks()
        self.move_unreadable_metadata()
        # Two of the latest, in case the newest turns out to be corrupt.
        policies = [checkpoint_managers.LatestN(2)]
        options = {}
        if keep_every_steps:
            policies.append(checkpoint_managers.EveryNSteps(keep_every_steps))
        if best_metric:
            sign = -1.0 if best_metric in metrics.LOWER_IS_BETTER else 1.0

            def score(values):  # checkpoints of before the metric existed come last
                return sign * values[best_metric] if best_metric in values else -math.inf

            options = dict(best_fn=score, best_mode="max")
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False
                )
            )
        self.manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
                **options,
            ),
        )
        # Orbax (0.12.8) removes unfinished checkpoints in a thread, which its `close` doesn't wait
        # for: it could remove what another manager of this program is writing by then.
        getattr(self.manager, "_maybe_await_cleanup_tmp_directory", lambda: None)()
        # Preemption notices are left to `Preemption`. JAX expects one increasing series of sync
        # points from a program. Orbax would pass the step to the same series, and the point at
        # which the processes agreed to stop could then be missed.
        self.manager.reached_preemption = lambda step: False

    def save(self, step: int, state: TrainState, values: dict | None = None) -> None:
        """Starts saving, and returns once the state is copied off the devices.

        Does nothing if the step is saved already. If the disk is full, logs that; the existing
        checkpoints stay.

        Args:
            step: the step of the state.
            state: the state to save.
            values: the metrics of an evaluation of this state, for `best_metric`.
        """
        self.finish_saving()
        if step in self.manager.all_steps():
            return
        self.last_step = step
        if not self.disk_has_room(state):
            return
        items = {name: ocp.args.StandardSave(tree) for name, tree in stored_items(state).items()}
        self.saving_step = step
        with self.log_write_errors():
            self.manager.save(
                step,
                args=ocp.args.Composite(**items),
                metrics=values,
                custom_metadata={**counters(state), "step": step},
            )

    def add_evaluation(self, step: int, values: dict) -> None:
        """Adds the metrics of an evaluation to a checkpoint that was saved without them."""
        self.finish_saving()
        folder = self.folder / str(step)
        if jax.process_index() == 0 and folder.exists():
            (folder / "metrics").mkdir(exist_ok=True)
            write_atomically(folder / "metrics" / "metrics", json.dumps(values))
        distributed.barrier("evaluation added")
        self.manager.reload()

    def finish_saving(self) -> None:
        """Waits until the checkpoint being saved is complete."""
        if self.abandoned:
            return
        place = self.folder / str(self.saving_step)
        with self.log_write_errors(), says_if_waiting(f"write checkpoint {place}", 60):
            self.manager.wait_until_finished()
        if self.failed_step is not None and not buckets.is_bucket(self.folder):
            # Its partial files take up space.
            for unfinished in self.folder.glob("*.orbax-checkpoint-tmp*"):
                with contextlib.suppress(OSError):  # still written to: the next save removes it
                    unfinished.rmtree(missing_ok=True)

    def abandon(self) -> None:
        """Gives up the checkpoint being saved: nothing waits for it any more."""
        self.abandoned = True

    def disk_has_room(self, state: TrainState) -> bool:
        """Whether the disk has room for a state; logs it if not.

        Processes agree before any of them writes: a failure of one alone would end the run.
        """
        if buckets.is_bucket(self.folder):
            return True
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        try:
            free = shutil.disk_usage(self.folder).free
        except FileNotFoundError:
            raise UserError(
                f"{self.folder} is gone: was the run's folder moved or deleted? The run can't save "
                "anything more"
            ) from None
        if not distributed.any_process(free < needed):
            return True
        mebibyte = 2**20
        self.log_failure(
            f"it needs {needed / mebibyte:,.1f} MiB, and the disk has {free / mebibyte:,.1f} MiB "
            "free",
            self.last_step,
        )
        return False

    @contextlib.contextmanager
    def log_write_errors(self):
        """Logs errors of writing a checkpoint instead of raising them.

        With several processes they are raised: each process knows only its own errors.
        """
        try:
            yield
        except Exception as error:  # raised by Orbax, TensorStore or the operating system
            if jax.process_count() > 1:
                raise
            self.log_failure(first_line(error)[:200], self.saving_step)
            with contextlib.suppress(Exception):  # the bucket is gone
                self.manager.reload()  # so that it forgets the failed step

    def log_failure(self, reason: str, step: int) -> None:
        """Logs that a step couldn't be saved, and remembers it."""
        self.last_step = max(self.last_step, step)
        self.failed_step = max(self.failed_step or 0, step)
        if jax.process_index() == 0:
            logger.error(
                f"Checkpoint {self.folder / str(step)} can't be written: {reason}. The "
                "run continues, and tries again at the next checkpoint; existing ones are kept"
            )

    def restore_latest(self, shapes: TrainState, init) -> TrainState | None:
        """Returns the newest checkpoint that can be read; None if there are no checkpoints.

        Newer ones that can't be read are logged and moved to <workdir>/corrupt_checkpoints.

        Args:
            shapes: the state's shapes with shardings.
            init: () -> the initial state, called if the checkpoint was saved before the code
                stored one of the state's items: that item starts at its initial value.

        Raises:
            UserError: there are checkpoints, but none can be read, or one belongs to a different
                model.
        """
        corrupt = []
        for step in sorted(self.manager.all_steps(), reverse=True):
            items = None
            try:
                items = read_items(self.folder / str(step), shapes)
            except CorruptCheckpoint as error:
                logger.warning(str(error))
            # Each process reads only its own part.
            if distributed.any_process(items is None):
                if items is not None:
                    logger.warning(
                        f"Checkpoint {self.folder / str(step)} can't be read by another process"
                    )
                corrupt.append(step)
                continue
            self.move_corrupt(corrupt)
            if corrupt:
                self.manager.reload()
            return as_state(self.folder / str(step), items, shapes, init)
        if corrupt:
            raise self.none_readable(corrupt)
        return None

    def move_unreadable_metadata(self) -> None:
        """Moves checkpoints whose JSON files are corrupt: Orbax can't start with them."""
        steps = [int(path.name) for path in self.folder.glob("*") if path.name.isdigit()]
        corrupt = [step for step in steps if not self.has_readable_metadata(step)]
        if corrupt and len(corrupt) == len(steps):
            raise self.none_readable(corrupt)
        self.move_corrupt(corrupt)

    def has_readable_metadata(self, step: int) -> bool:
        """Whether the JSON files of a checkpoint can be parsed; logs it if not."""
        folder = self.folder / str(step)
        for name in ("_CHECKPOINT_METADATA", "metrics/metrics"):
            try:
                if (folder / name).exists():
                    json.loads((folder / name).read_text())
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                logger.warning(f"Checkpoint {folder} can't be read: {name}: {error}")
                return False
        return True

    def none_readable(self, steps: list[int]) -> UserError:
        """Returns the error for a run without a readable checkpoint."""
        return UserError(
            f"None of the checkpoints in {self.folder} can be read (steps {sorted(steps)}): "
            "start in another --workdir, or remove this one"
        )

    def move_corrupt(self, steps: list[int]) -> None:
        """Moves checkpoints to <workdir>/corrupt_checkpoints; their steps can be saved again."""
        distributed.barrier("checkpoints checked")
        for step in steps if jax.process_index() == 0 else ():
            target = self.folder.parent / "corrupt_checkpoints" / str(step)
            target.parent.mkdir(exist_ok=True)
            if target.exists():
                target.rmtree()
            files.move_folder(self.folder / str(step), target)
            logger.warning(f"Moved checkpoint {step} to {target}")
        distributed.barrier("corrupt checkpoints moved")

    def close(self) -> None:
        """Waits until the checkpoint being saved is complete, and closes the manager.

        Raises:
            UserError: the last checkpoint couldn't be saved.
        """
        self.finish_saving()
        if not self.abandoned:
            try:
                self.manager.close()
            except Exception:  # Orbax may raise again what `finish_saving` has logged
                if self.failed_step is None:
                    raise
        if self.failed_step is not None and self.failed_step == self.last_step:
            if buckets.is_bucket(self.folder):
                raise Unreachable(
                    f"The last checkpoint, of step {self.failed_step}, couldn't be written to "
                    f"{self.folder}: the same command resumes once it can be reached"
                )
            raise UserError(
                f"The last checkpoint, of step {self.failed_step}, couldn't be written to "
                f"{self.folder}: free some space, and start the same command again"
            )


def read_items(folder: epath.Path, shapes: TrainState) -> dict:
    """Returns the items of a checkpoint, {name: tree}, without those it was saved without.

    Args:
        folder: <workdir>/checkpoints/<step>.
        shapes: the state's shapes with shardings.

    Raises:
        CorruptCheckpoint, UserError: as `read_item`.
    """
    return {
        name: read_item(folder / name, item_shapes)
        for name, item_shapes in stored_items(shapes).items()
        if name in REQUIRED_ITEMS or lists_item(folder, name)
    }


def as_state(folder: epath.Path, items: dict, shapes: TrainState, init) -> TrainState:
    """Returns the state of a checkpoint; items that it lacks start at their initial value."""
    new = sorted(stored_items(shapes).keys() - items.keys())
    initial = init() if new else None
    for name in new:
        logger.info(
            f"Checkpoint {folder} was saved without {name}, which starts at its initial value"
        )
    wrapped = [name for name, shape in fields(shapes).items() if is_single_array(shape)]
    items |= {name: items[name][SINGLE_ARRAY] for name in wrapped if name in items}
    items |= {name: getattr(initial, name) for name in new}
    stored = {"step": int(folder.name), **stored_counters(folder)}
    if stored["step"] != int(folder.name):
        raise UserError(f"Checkpoint {folder} was saved as step {stored['step']}: rename it back")
    for name, shape in fields(shapes).items():
        if is_counter(shape):
            value = np.int32(stored.get(name, 0))
            items[name] = jax.make_array_from_callback(
                (), shape.sharding, lambda _, value=value: value
            )
    return shapes.replace(**items)


SINGLE_ARRAY = "array"  # Orbax stores only trees: a field that is one array is wrapped


def stored_items(state: TrainState) -> dict:
    """Returns the items that store a state, or those of its shapes: {name: tree of arrays}."""
    return {
        name: {SINGLE_ARRAY: value} if is_single_array(value) else value
        for name, value in fields(state).items()
        if value is not None and not is_counter(value)
    }


def is_single_array(value) -> bool:
    """Whether a field is one array that the metadata doesn't hold."""
    return value is not None and not is_counter(value) and jax.tree_util.all_leaves([value])


def counters(state: TrainState) -> dict[str, int]:
    """Returns the fields of a state that are single whole numbers, which the metadata has."""
    return {name: int(value) for name, value in fields(state).items() if is_counter(value)}


def is_counter(value) -> bool:
    """Whether a field is an int32 scalar rather than a tree of arrays."""
    return getattr(value, "shape", None) == () and value.dtype == np.int32


def fields(state: TrainState) -> dict:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def restore_params(workdir, step: int | str | None = None, item: str | None = None):
    """Returns a run's configuration and parameters, on the first device of this machine.

    Needs neither the dataset nor the devices that the run had.

    Args:
        workdir, step, item: see `read_params`.

    Returns:
        (config as a ConfigDict, the tree of parameters).

    Raises:
        UserError: the folder has no run, or no readable checkpoint of that step.
    """
    config, params, _ = read_params(workdir, step, item)
    return config, params


def read_params(
    workdir,
    step: int | str | None = None,
    item: str | None = None,
    shapes: Callable | None = None,
):
    """Reads a run's parameters.

    Args:
        workdir: the run's folder.
        step: the step of the checkpoint, or "best"; "latest" or None: the latest that can be read.
        item: "params" or "ema_params", their moving average; None: the one that the run
            evaluates, which is the average if it keeps one.
        shapes: config -> the expected shapes with shardings, on a mesh; None: they are put on the
            first device.

    Returns:
        (config as a ConfigDict, the tree of parameters, the step of the checkpoint).

    Raises:
        UserError: the folder has no run, no readable checkpoint of that step, or one of another
            model.
    """
    config = run_folder.require_config(workdir)
    folder = files.absolute_path(workdir) / "checkpoints"
    candidates = [find_step(workdir, step)]
    if step in (None, "latest"):
        candidates = list(reversed(run_folder.checkpoint_steps(workdir)))
    if item == "ema_params" and not config.ema_decay:
        raise UserError(
            f"{workdir} has no average of its parameters (config.ema_decay is unset): leave out "
            "ema_params"
        )
    item = item or ("ema_params" if config.ema_decay else "params")
    for candidate in candidates:
        try:
            params = read_item(folder / str(candidate) / item, shapes and shapes(config))
        except CorruptCheckpoint as error:
            logger.warning(str(error))
            continue
        if candidate != candidates[0]:
            logger.warning(f"Using the checkpoint of step {candidate} instead")
        return config, params, candidate
    raise UserError(f"No checkpoint in {folder} can be read (steps {sorted(candidates)})")


def find_step(workdir, step: int | str | None) -> int:
    """Returns the step that a name stands for; see `read_params`.

    Raises:
        UserError: there is no such checkpoint.
    """
    step = "latest" if step is None else parse_step(step)
    if step == "best":
        step = best_step(workdir)
        logger.info(f"{workdir}: the best checkpoint is that of step {step:,}")
        return step
    steps = run_folder.checkpoint_steps(workdir)
    if not steps or step not in (*steps, "latest"):
        wanted = "" if step == "latest" else f" of step {step}"
        folder = files.absolute_path(workdir) / "checkpoints"
        found = f"its steps are {steps}" if steps else "there is none yet"
        raise UserError(f"No checkpoint{wanted} in {folder}; {found}")
    return steps[-1] if step == "latest" else step


def best_step(workdir) -> int:
    """Returns the step of the checkpoint whose evaluation was the best, by `config.best_metric`.

    Raises:
        UserError: the folder has no run, or none of its checkpoints was evaluated.
    """
    config = run_folder.require_config(workdir)
    metric = config.get("best_metric") or ("accuracy" if predicts_classes(config) else "loss")
    folder, values = files.absolute_path(workdir) / "checkpoints", {}
    for step in run_folder.checkpoint_steps(workdir):
        with contextlib.suppress(OSError, ValueError, KeyError):  # not evaluated
            path = folder / str(step) / "metrics" / "metrics"
            values[step] = json.loads(path.read_text())[metric]
    values = {step: value for step, value in values.items() if math.isfinite(value)}
    if not values:
        raise UserError(
            f"None of the checkpoints in {folder} was evaluated, so none is the best: name one "
            "by its step, or the latest"
        )
    sign = -1.0 if metric in metrics.LOWER_IS_BETTER else 1.0
    return max(values, key=lambda step: sign * values[step])
