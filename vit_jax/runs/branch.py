"""Branches: runs that go on from a checkpoint of another run, in a folder of their own.

With `config.init_mode = "continue"`, a new run starts with the parameters, the optimizer's state,
the average and the step of the checkpoint in `config.init_from`, and with the examples that come
next. The schedule, the duration, the mesh, the batch, the dataset and more may be others:
docs/branches.md.

<workdir>/branch.json    the run and the step that it left, and the fields that differ
"""

import contextlib
import json
import logging
from collections.abc import Collection
from typing import NamedTuple

import jax
import ml_collections
from etils import epath

from vit_jax import models
from vit_jax.checks import check_choice
from vit_jax.errors import UserError
from vit_jax.parallel import distributed
from vit_jax.runs import checkpoint, resuming, run_folder
from vit_jax.runs.checkpoint_items import CorruptCheckpoint, check_item
from vit_jax.runs.checkpoint_paths import parse_run_path
from vit_jax.storage.files import absolute_path, open_path, read_json_object, write_atomically
from vit_jax.training import schedules, train_state
from vit_jax.training.train_state import TrainState

logger = logging.getLogger("vit_jax")

FILE = "branch.json"
MODES = ("weights", "continue")
# Fields of a model that a branch may change; `scan` would stack the parameters.
MODEL_MAY_CHANGE = tuple(name for name in models.FIELDS_OF_TRAINING if name != "scan")
# (item, what it belongs to, fields that may be at fault if its arrays have other shapes)
CAUSES = (
    ("params", "model", ("image_size", "dataset.channels", "masked_patches")),
    ("opt_state", "optimizer", ("optimizer", "grad_clip_norm")),
)
# What may change without being listed: the numbers of training stay the same, or almost.
NOT_LISTED = tuple(field for field in resuming.MAY_CHANGE if field not in ("mesh", "on_nonfinite"))


class Origin(NamedTuple):
    """The checkpoint that a branch leaves.

    Attributes:
        workdir: the folder of its run.
        step: its step.
        config: the configuration of its run.
    """

    workdir: epath.Path
    step: int
    config: ml_collections.ConfigDict

    def __str__(self) -> str:
        return f"step {self.step:,} of {self.workdir}"

    @property
    def folder(self) -> epath.Path:
        return absolute_path(self.workdir) / "checkpoints" / str(self.step)

    @property
    def num_seen(self) -> int:
        """The number of examples that the run had seen: its position in their order."""
        return self.config.dataset.get("offset", 0) + self.step * self.config.batch_size


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError if `config.init_mode` is unknown, or doesn't go with the other fields."""
    if config.dataset.offset != 0:
        raise UserError(
            f"config.dataset.offset is {config.dataset.offset!r}; it must be 0: branches set it"
        )
    check_choice("config.init_mode", config.init_mode, MODES)
    if config.init_mode != "continue":
        return
    if not config.init_from:
        raise UserError(
            "config.init_mode is 'continue', which needs --config.init_from=RUN/checkpoints/STEP"
        )
    for field in ("init_from_depth", "init_from_patch", "init_from_grid"):
        if config[field] is not None:
            raise UserError(
                f"config.{field} is {config[field]!r}, which adapts weights to another model; with "
                "config.init_mode='continue' the model stays: leave one of them out"
            )


def find(config: ml_collections.ConfigDict, workdir) -> Origin | None:
    """Returns the checkpoint that a run starts from; None if it resumes, or is no branch.

    A branch that was killed before its first checkpoint starts from the same step again, though
    `config.init_from` may name the latest or the best, which may be another by then.

    Args:
        config: the run's configuration.
        workdir: the run's folder.

    Raises:
        UserError: `config.init_from` isn't a run's checkpoint, or is in the run's own folder.
    """
    if config.init_mode != "continue":
        return None
    path = parse_run_path(config.init_from)
    if path is not None and absolute_path(path.workdir) == absolute_path(workdir):
        raise UserError(
            f"config.init_from is in --workdir, {workdir}: a branch needs a folder of its own"
        )
    if run_folder.checkpoint_steps(workdir):
        return None
    if path is None or path.item is not None:
        raise UserError(
            f"config.init_from is {config.init_from!r}; with config.init_mode='continue' it must "
            "be a run's folder or RUN/checkpoints/STEP, where STEP may be 'best' or 'latest'"
        )
    source = path.workdir
    recorded = run_folder.require_config(source)
    started, step = read(workdir) or {}, path.step
    if not isinstance(step, int) and started.get("run") == str(absolute_path(source)):
        is_there = started["step"] in run_folder.checkpoint_steps(source)
        step = started["step"] if is_there else step
    # If the other run is still going on, its processes may see different checkpoints.
    step = distributed.agree(checkpoint.find_step(source, step))
    return Origin(source, step, recorded)


def inherit(
    origin: Origin | None, workdir, config: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
    """Returns a run's configuration with what it inherits from the run that it goes on with.

    Args:
        origin: the checkpoint that it leaves; None: it goes on with its own, if there is one.
        workdir: the run's folder.
        config: the configuration that was given.
    """
    if origin is not None:
        return resuming.continue_data_order(origin.config, origin.step, config)
    try:
        return resuming.keep_recorded(workdir, config)
    except run_folder.LostConfigError:  # `resuming.check_config` reports it
        config = config.copy_and_resolve_references()
        if left := read(workdir):
            config.dataset.offset = left["examples_seen"] - left["step"] * config.batch_size
        return config


def check_resumable(
    origin: Origin | None,
    config: ml_collections.ConfigDict,
    train_set,
    changed_fields: Collection[str],
    shapes: TrainState,
) -> None:
    """Checks that a branch's configuration can go on from a checkpoint; reads no array.

    Args:
        origin: the checkpoint; None: there is nothing to check.
        config: the branch's configuration, resolved.
        train_set: its training split, a Source.
        changed_fields: see `resuming.list_changes`.
        shapes: the shapes of its state.

    Raises:
        UserError: it ends before it begins, or has another model, other classes or an optimizer
            with another state.
    """
    if origin is not None:
        check_compatible(origin, config)
        resuming.check_class_names(origin.workdir, train_set.class_names, train_set.name)
        check_shapes(origin, list_changes(origin, config, changed_fields), shapes)


def check_compatible(origin: Origin, config: ml_collections.ConfigDict) -> None:
    """Raises UserError if a branch ends before it begins, or has another model."""
    if config.total_steps <= origin.step:
        raise UserError(
            f"config.total_steps is {config.total_steps:,}; it counts from the first step of "
            f"{origin.workdir}, so it must be above {origin.step:,}, where the branch begins"
        )
    objectives = [given.get("objective", models.CLASSES) for given in (origin.config, config)]
    if len(set(objectives)) > 1:
        old, new = objectives
        raise refusal(origin, "objective", [{"field": "objective", "old": old, "new": new}])
    ours, theirs = models.from_config(config), models.from_config(origin.config)
    changes = [
        {
            "field": "num_classes" if name == "num_classes" else f"model.{name}",
            "old": old,
            "new": new,
        }
        for name in models.FIELDS
        if name not in MODEL_MAY_CHANGE
        and (old := getattr(theirs, name)) != (new := getattr(ours, name))
    ]
    if changes:
        raise refusal(origin, "model", changes)


def check_shapes(origin: Origin, changes: list[dict], shapes: TrainState) -> None:
    """Raises UserError if a checkpoint has other shapes than a branch's state.

    The message lists those of the changes that may be the cause.
    """
    for item, noun, fields in CAUSES:
        try:
            check_item(origin.folder / item, getattr(shapes, item))
        except CorruptCheckpoint as error:
            raise UserError(f"{error}: branch from another step") from None
        except UserError:
            causes = [change for change in changes if resuming.is_in(change["field"], fields)]
            if not causes:
                raise
            raise refusal(origin, noun, causes) from None


def refusal(origin: Origin, noun: str, changes: list[dict]) -> UserError:
    """Returns the error for a branch that can't go on with what the checkpoint has."""
    return UserError(
        f"config.init_mode is 'continue', but {origin} can't go on with another {noun} (recorded "
        f"-> given): {'; '.join(map(resuming.describe_change, changes))}. Use the recorded values, "
        "or leave init_mode out to start anew from its parameters"
    )


def restore(origin: Origin, shapes: TrainState, init) -> TrainState:
    """Returns the state of a checkpoint, sharded as a branch's.

    An average that the run didn't keep starts at its parameters.

    Args:
        origin: the checkpoint.
        shapes, init: see `Checkpoints.restore_latest`.

    Raises:
        UserError: it can't be read.
    """
    try:
        items = checkpoint.read_items(origin.folder, shapes)
        if shapes.ema_params is not None and "ema_params" not in items:
            items["ema_params"] = train_state.copy(items["params"])
        return checkpoint.as_state(origin.folder, items, shapes, init)
    except CorruptCheckpoint as error:
        raise UserError(f"{error}: branch from another step") from None


def describe(origin: Origin, config: ml_collections.ConfigDict, changes: list[dict]) -> list[str]:
    """Returns what a branch's log says about its beginning."""
    old, new = origin.config, config
    seen, epoch = origin.num_seen, origin.num_seen // new.dataset.num_examples + 1
    examples = f"{seen:,} were seen; goes on with the next, in epoch {epoch:,}"
    if new.batch_size != old.batch_size:
        examples += f", in batches of {new.batch_size} instead of {old.batch_size}"
    if any(change["field"] in resuming.IDENTITY for change in changes):
        examples += " of another dataset"
    if new.seed != old.seed:
        examples += f", in the order of seed {new.seed}"
    lines = [
        f"Branch       of {origin.workdir}, step {origin.step:,}",
        f"Changed      {'; '.join(map(resuming.describe_change, changes)) or 'nothing'}",
        f"Examples     {examples}",
    ]
    with contextlib.suppress(UserError):  # its schedule is from before a field
        theirs, ours = (
            float(schedules.create(run.schedule, run.total_steps)(origin.step))
            for run in (old, new)
        )
        lines.append(f"Rate         {ours:.3g} at this step, and {theirs:.3g} in the run it leaves")
    return lines


def list_changes(origin: Origin, config, changed_fields: Collection[str]) -> list[dict]:
    """Returns the fields in which a branch differs; see `resuming.list_changes`."""
    old, new = resuming.as_flat_dict(origin.config), resuming.as_flat_dict(config)
    ignored = NOT_LISTED
    if resuming.is_same_dataset(old, new):
        ignored += resuming.IDENTITY
    changes = resuming.list_changes(origin.config, config, changed_fields)
    return [change for change in changes if not resuming.is_in(change["field"], ignored)]


def record(workdir, origin: Origin | None, config, changed_fields: Collection[str]) -> None:
    """Records what a new run branched from, and logs it; only process 0 writes.

    Args:
        workdir: the run's folder.
        origin, config, changed_fields: see `check_resumable`.
    """
    if jax.process_index() != 0:
        return
    path = open_path(workdir) / FILE
    if origin is None:
        path.unlink(missing_ok=True)  # of an earlier start that left no checkpoint
        return
    recorded, changes = origin.config, list_changes(origin, config, changed_fields)
    for line in describe(origin, config, changes):
        logger.info(line)
    content = {
        "run": str(absolute_path(origin.workdir)),
        "step": origin.step,
        "examples_seen": origin.num_seen,
        **{field: recorded[field] for field in ("seed", "batch_size", "total_steps")},
        "changes": changes,
    }
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def read(workdir) -> dict | None:
    """Returns what `record` wrote; None if the run is no branch."""
    path = open_path(workdir) / FILE
    return read_json_object(path) if path.exists() else None


def start_step(workdir, origin: Origin | None) -> int:
    """Returns the step that a run begins or, if it resumes, began at: 0, unless it is a branch.

    Args:
        workdir: the run's folder.
        origin: the checkpoint that it leaves now, or None.
    """
    if origin is not None:
        return origin.step
    recorded = read(workdir) if run_folder.checkpoint_steps(workdir) else None
    return recorded["step"] if recorded else 0
