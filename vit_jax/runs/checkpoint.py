"""Checkpoints of a run, through Orbax: save, resume, restore for other uses.

<workdir>/checkpoints/<step>/     one folder a checkpoint, with the items `params`,
                                  `opt_state`, `ema_params` (where on) and `metrics`
"""

import contextlib
import io
import json
import logging
import shutil
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from vit_jax.parallel import distributed
from vit_jax.runs import run_folder
from vit_jax.training import metrics
from vit_jax.checks import check_choice
from vit_jax.errors import UserError, first_line
from vit_jax.files import write_atomically
from vit_jax.paths import differing_shapes, path_name
from vit_jax.training.train_state import TrainState

logger = logging.getLogger("vit_jax")


def check(config) -> None:
    """Raises UserError for a `config.best_metric` that isn't one of the metrics or ""."""
    if config.best_metric:
        check_choice("config.best_metric", config.best_metric, metrics.NAMES)


class Manager(ocp.CheckpointManager):
    """Orbax's, without its own look at the cluster's notice.

    JAX counts one series of points at which a program may stop, and `Preemption` has it: a step
    of Orbax's in between, larger or smaller, would move the stop to a point that never comes.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """A run's checkpoints: the latest two, the best, and on request every n-th are kept.

    Saving is asynchronous and atomic: a folder <step> exists only when complete.
    """

    def __init__(self, workdir, best_metric: str | None = None, keep_every_steps: int = 0):
        """`best_metric`: an evaluation's name, best where largest; losses where smallest."""
        self.folder = epath.Path(workdir).resolve() / "checkpoints"
        self.saving = None  # the step that was saved last
        self.failed = None  # the last one that couldn't be
        self.set_aside_unreadable()
        # Two: the newest may turn out to be damaged.
        policies = [checkpoint_managers.LatestN(2)]
        options = {}
        if keep_every_steps:
            policies.append(checkpoint_managers.EveryNSteps(keep_every_steps))
        if best_metric:
            sign = -1.0 if best_metric.endswith("loss") else 1.0
            options = dict(best_fn=lambda values: sign * values[best_metric], best_mode="max")
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=options["best_fn"], n=1, keep_checkpoints_without_metrics=False
                )
            )
        self.manager = Manager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
                **options,
            ),
        )

    def save(self, step: int, state: TrainState, values: dict | None = None) -> None:
        """Starts saving; returns once the state is copied off the devices.

        values: an evaluation of this state, for `best_metric`. A step is saved once. Where the
        disk is full, that is logged, and the checkpoints there are stay.
        """
        self.finish_saving()
        if step not in self.manager.all_steps():
            items = {name: ocp.args.StandardSave(tree) for name, tree in items_of(state).items()}
            self.saving = step
            if not self.has_room(state):
                return
            with self.failures_logged():
                self.manager.save(
                    step,
                    args=ocp.args.Composite(**items),
                    metrics=values,
                    custom_metadata={"skipped": int(state.skipped)},
                )

    def add_evaluation(self, step: int, values: dict) -> None:
        """Gives a checkpoint the evaluation that it was saved without."""
        self.finish_saving()
        folder = self.folder / str(step)
        if jax.process_index() == 0 and folder.exists():
            (folder / "metrics").mkdir(exist_ok=True)
            write_atomically(folder / "metrics" / "metrics", json.dumps(values))
        distributed.barrier("the evaluation was written")
        self.manager.reload()

    def finish_saving(self) -> None:
        """Waits until what is being saved is saved."""
        with self.failures_logged():
            self.manager.wait_until_finished()
        if self.failed is not None:  # what there is of it takes room
            for unfinished in self.folder.glob("*.orbax-checkpoint-tmp*"):
                with contextlib.suppress(OSError):  # written to meanwhile: the next save removes it
                    unfinished.rmtree(missing_ok=True)

    def has_room(self, state: TrainState) -> bool:
        """Whether the disk has room for a state; where not, that is logged.

        Looked at by all processes before any begins: one that fails by itself ends the run.
        """
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if not distributed.any_process(free < needed):
            return True
        needed, free = needed / 2**20, free / 2**20
        self.log_failure(f"it takes {needed:,.1f} MiB, and {free:,.1f} MiB of the disk are free")
        return False

    @contextlib.contextmanager
    def failures_logged(self):
        """Logs that a checkpoint can't be written.

        Of several processes each would know of its own part alone: there the run ends.
        """
        try:
            yield
        except Exception as error:  # of Orbax, TensorStore or the system
            if jax.process_count() > 1:
                raise
            self.log_failure(first_line(error)[:200])
            self.manager.reload()  # it counts the one that failed

    def log_failure(self, reason: str) -> None:
        self.failed = self.saving
        if jax.process_index() == 0:
            logger.error(
                f"Checkpoint {self.folder / str(self.saving)} can't be written: {reason}. The run "
                "goes on, and tries again at the next one; those there are stay"
            )

    def restore_latest(self, state: TrainState, init=None) -> TrainState | None:
        """The newest checkpoint that can be read, placed as `state` says (shapes with shardings).

        A damaged one is said and set aside, and the one before is taken. None where there is
        no checkpoint at all.

        Raises:
            UserError: there are checkpoints, but none can be read, or one is of another model.
        """
        damaged = []
        for step in sorted(self.manager.all_steps(), reverse=True):
            restored = None
            try:
                restored = self.restore(step, state)
            except Damaged as error:
                logger.warning(str(error))
            if distributed.any_process(restored is None):  # each process reads its own part
                if restored is not None:
                    logger.warning(
                        f"Checkpoint {self.folder / str(step)} can't be read by another process"
                    )
                damaged.append(step)
                continue
            self.set_aside(damaged)
            if damaged:
                self.manager.reload()
            return restored
        if damaged:
            raise self.all_damaged(damaged)
        return None

    def restore(self, step: int, state: TrainState) -> TrainState:
        """The checkpoint of that step, placed as `state` says."""
        items = {
            name: read_item(self.folder / str(step) / name, shapes)
            for name, shapes in items_of(state).items()
        }
        custom = self.manager.metadata(step).custom_metadata or {}
        step, skipped = (  # by each process alone: another may have failed above
            jax.make_array_from_callback((), state.step.sharding, lambda _, n=n: np.int32(n))
            for n in (step, custom.get("skipped", 0))
        )
        return TrainState(
            step, items["params"], items["opt_state"], items.get("ema_params"), skipped
        )

    def set_aside_unreadable(self) -> None:
        """Sets aside checkpoints whose JSON files are damaged: Orbax fails to start on them."""
        steps = [int(p.name) for p in self.folder.glob("*") if p.name.isdigit()]
        unreadable = [step for step in steps if not self.has_readable_json(step)]
        if unreadable and len(unreadable) == len(steps):
            raise self.all_damaged(unreadable)
        self.set_aside(unreadable)

    def has_readable_json(self, step: int) -> bool:
        for name in ("_CHECKPOINT_METADATA", "metrics/metrics"):
            path = self.folder / str(step) / name
            try:
                if path.exists():
                    json.loads(path.read_text())
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                logger.warning(
                    f"Checkpoint {self.folder / str(step)} can't be read: {name}: {error}"
                )
                return False
        return True

    def all_damaged(self, steps: list[int]) -> UserError:
        return UserError(
            f"None of the checkpoints in {self.folder} can be read (steps {sorted(steps)}): "
            "start in another --workdir, or remove this one"
        )

    def set_aside(self, steps: list[int]) -> None:
        """Moves damaged checkpoints out of the way, so that their steps can be saved again."""
        distributed.barrier("checkpoints were looked at")
        for step in steps if jax.process_index() == 0 else ():
            target = self.folder.parent / "damaged_checkpoints" / str(step)
            target.parent.mkdir(exist_ok=True)
            if target.exists():
                target.rmtree()
            (self.folder / str(step)).rename(target)
            logger.warning(f"Moved it to {target}")
        distributed.barrier("checkpoints were set aside")

    def close(self) -> None:
        """Waits until what is being saved is saved.

        Raises:
            UserError: the last one couldn't be.
        """
        self.finish_saving()
        self.manager.close()
        if self.failed is not None and self.failed == self.saving:
            raise UserError(
                f"The last checkpoint, of step {self.failed}, couldn't be written to "
                f"{self.folder}: make room, and start the same command again"
            )


def items_of(state: TrainState) -> dict:
    """The parts of a state that are stored, each under its own name."""
    items = {"params": state.params, "opt_state": state.opt_state}
    return items if state.ema_params is None else items | {"ema_params": state.ema_params}


class Damaged(Exception):
    """A checkpoint can't be read; the message says which, and why."""


def read_item(path: epath.Path, shapes=None):
    """One item of a checkpoint, placed as `shapes` says; None: as stored, on the first device.

    Raises:
        Damaged: files are missing, cut short, or no checkpoint's.
        UserError: the arrays are other ones than in `shapes`; the first difference is named.
    """
    try:
        with quiet_orbax(), reader() as checkpointer:
            metadata = checkpointer.metadata(path).item_metadata
            if metadata is None:
                raise ValueError("files are missing or cut short")
            stored = metadata.tree
            if shapes is None:
                device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
                shapes = jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
                    stored,
                )
            check_shapes(path, stored, shapes)
            return checkpointer.restore(path, shapes)
    except UserError:
        raise
    except Exception as error:  # Orbax raises many kinds for damaged files
        reason = first_line(error)[:200]
        raise Damaged(f"Checkpoint {path} can't be read: {reason}") from error


def reader() -> ocp.StandardCheckpointer:
    """Each process reads its own part by itself: one may fail where the others don't."""
    process = jax.process_index()
    if jax.process_count() == 1:
        return ocp.StandardCheckpointer()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"only{process}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


def check_shapes(path: epath.Path, stored, shapes) -> None:
    def named(tree):
        return {path_name(p): tuple(leaf.shape) for p, leaf in jax.tree.leaves_with_path(tree)}

    for name, there, here in differing_shapes(named(stored), named(shapes)):
        raise UserError(
            f"Checkpoint {path} is of another model: {name} is {there} there and {here} here"
        )


def restore_params(workdir, step: int | None = None, item: str | None = None):
    """A run's configuration and parameters (the average, where the run keeps one).

    Needs neither the dataset nor the devices the run had: arrays come to the first device here.

    Args:
        workdir: the run's folder.
        step: of the checkpoint; None: the latest that can be read.
        item: "params" for those that were trained, "ema_params" for their average; None: what the
            run evaluates.

    Returns:
        (config as a ConfigDict, the tree of parameters).

    Raises:
        UserError: no run, or no readable checkpoint of that step, in the folder.
    """
    config = run_folder.read_config(workdir)
    if config is None:
        raise UserError(f"{workdir} is not a run's folder: it has no config.json")
    folder = epath.Path(workdir).resolve() / "checkpoints"
    steps = run_folder.checkpoint_steps(workdir)
    if not steps or (step is not None and step not in steps):
        wanted = "" if step is None else f" of step {step}"
        raise UserError(f"No checkpoint{wanted} in {folder}; there are {steps or 'none'}")
    if item == "ema_params" and not config.ema_decay:
        raise UserError(f"{workdir} keeps no average of its parameters: leave ema_params out")
    item = item or ("ema_params" if config.ema_decay else "params")
    for candidate in [step] if step is not None else reversed(steps):
        try:
            return config, read_item(folder / str(candidate) / item)
        except Damaged as error:
            logger.warning(str(error))
    tried = steps if step is None else [step]
    raise UserError(f"No checkpoint in {folder} can be read (steps {tried})")


@contextlib.contextmanager
def quiet_orbax():
    """Keeps Orbax to its exception.

    It warns that an item alone is no whole checkpoint; and where one array can't be read, each
    read still under way prints a traceback of its own, from its own thread.
    """
    absl_logger = logging.getLogger("absl")
    level = absl_logger.level
    absl_logger.setLevel(logging.CRITICAL)
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            try:
                yield
            except Exception:
                time.sleep(1)  # the other reads end
                raise
        sys.stderr.write(stderr.getvalue())
    finally:
        absl_logger.setLevel(level)
