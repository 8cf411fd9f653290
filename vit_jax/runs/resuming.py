"""What a run may change when it resumes, and what it must not."""

import json
import logging
import os
from collections.abc import Collection, Sequence

import ml_collections

from vit_jax.errors import UserError
from vit_jax.runs import run_folder

logger = logging.getLogger("vit_jax")

# Fields that may differ when a run is resumed; a group's name covers all its fields.
MAY_CHANGE = (
    # How often the run logs, evaluates and saves, and what it keeps: training doesn't depend on it.
    "log_every_steps",
    "wandb",
    "eval_every_steps",
    "evals",
    "report",
    "checkpoint_every_steps",
    "keep_every_steps",
    "best_metric",
    # Whether the run stops at bad numbers and examples, or skips them from now on.
    "on_nonfinite",
    "dataset.on_error",
    # The machines: the numbers change by rounding. `dataset.parts` is the number of processes in
    # the order "buffer", and changes the order of the examples: `check_config` warns.
    "mesh",
    "dataset.parts",
    "dataset.data_dir",
    "dataset.eval_cache_mb",
    # How the model is computed: the numbers change by rounding.
    "model.attention_impl",
    "model.remat",
    # The text of an error message.
    "init_from_hint",
)
# The learning rate of every step depends on these.
LENGTH = ("total_steps", "num_epochs", "schedule")
# Fields whose values are dictionaries, as opposed to groups of fields.
DICTIONARIES = ("loss_args", "model.resnet", "evals")


def keep_recorded(workdir, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns a configuration with the `dataset.exif` of the run that it resumes, unless it is set.

    A run from before the field thus goes on with the images that it started with.
    """
    config = config.copy_and_resolve_references()
    if config.dataset.exif is None:
        config.dataset.exif = run_folder.recorded(workdir, "dataset", "exif")
    return config


def check_resumable(
    workdir,
    config: ml_collections.ConfigDict,
    train_set,
    changed_fields: Collection[str] = (),
    recover: bool = False,
) -> None:
    """Checks that the run in a folder, if it has checkpoints, can be resumed.

    Args:
        train_set: the training split, a Source.
        workdir, config, changed_fields, recover: see `check_config`.

    Raises:
        UserError: as `check_config`; the dataset has other classes now; or there is a config.json
            that isn't a run's.
    """
    if run_folder.checkpoint_steps(workdir):
        check_config(workdir, config, changed_fields, recover)
        check_class_names(workdir, train_set.class_names, train_set.name)
    else:
        run_folder.read_config(workdir)  # raises if the config.json there isn't a run's


def check_config(
    workdir,
    config: ml_collections.ConfigDict,
    changed_fields: Collection[str] = (),
    recover: bool = False,
) -> None:
    """Checks that a configuration can resume the run in a folder, if it has checkpoints.

    A field that the code gained since the run was recorded must have its default.

    Args:
        workdir: the run's folder.
        config: the configuration, resolved.
        changed_fields: the names of fields whose values aren't the default; see
            `fields_that_differ`.
        recover: whether to accept it unchecked if the recorded one is lost.

    Raises:
        UserError: fields that must not change differ; each is listed with both values. Or the
            recorded configuration is lost.
    """
    steps = run_folder.checkpoint_steps(workdir)
    if not steps:
        return
    try:
        recorded = run_folder.read_config(workdir)
    except run_folder.LostConfigError:
        if not recover:
            raise
        logger.warning(
            f"{workdir}/config.json is lost: the given configuration is taken for the run's, and "
            "isn't checked"
        )
        check_steps(workdir, steps, config.total_steps)
        return
    old, new = as_flat_dict(recorded), as_flat_dict(config)
    changed = [
        field
        for field in fields_that_differ(recorded, config)
        if not is_in(field, MAY_CHANGE) and (field in old or field in changed_fields)
    ]
    if "dataset.name" in changed and has_moved(old, new):
        changed.remove("dataset.name")
        logger.info(f"{workdir}: the dataset is now read from {new['dataset.name']}")
    if changed:
        changes = "; ".join(
            f"{field}: {repr(old[field]) if field in old else 'not recorded'} -> {new.get(field)!r}"
            for field in changed
        )
        message = (
            f"{workdir} holds a run with another configuration (recorded -> given): {changes}. Use "
            "another --workdir, or the recorded values"
        )
        if "dataset.name" in changed:
            message += ". This is another dataset than the run's"
        elif "dataset.fingerprint" in changed:
            message += (
                ". The training set has gained, lost or renamed examples since the run began: "
                f"restore it, or start a new run with --config.init_from={workdir} in another "
                "--workdir"
            )
        elif any(is_in(field, LENGTH) for field in changed):
            message += (
                ". A run can't be extended in place, whether it is finished or not: to continue "
                f"from its parameters, start a new run with --config.init_from={workdir} in "
                "another --workdir"
            )
        raise UserError(message)
    check_steps(workdir, steps, config.total_steps)
    old_parts, new_parts = old.get("dataset.parts"), new.get("dataset.parts")
    if old_parts not in (None, new_parts):
        logger.warning(
            f"{workdir}: the dataset was shuffled in {old_parts} parts, one for each process, and "
            f"from now on in {new_parts}: this epoch repeats some examples and omits others. The "
            "order of ArrayRecord files doesn't depend on the processes"
        )


def has_moved(old: dict, new: dict) -> bool:
    """Whether the dataset of a run is a folder that has another path now.

    Args:
        old, new: the recorded and the given configuration, with dotted names.
    """
    is_folder = os.path.isdir(os.path.expanduser(str(new["dataset.name"])))
    recorded, given = (fields.get("dataset.fingerprint") for fields in (old, new))
    return is_folder and recorded is not None and recorded == given


def check_steps(workdir, steps: Sequence[int], total_steps: int) -> None:
    """Raises UserError if the newest checkpoint is of a step that the run doesn't have."""
    if steps[-1] > total_steps:
        raise UserError(
            f"{workdir} has a checkpoint of step {steps[-1]:,}, but the run ends after "
            f"{total_steps:,} steps (config.total_steps): give the run's own configuration, or "
            "move the checkpoint away if it isn't the run's"
        )


def fields_that_differ(
    first: ml_collections.ConfigDict, second: ml_collections.ConfigDict
) -> list[str]:
    """Returns the dotted names of the fields that differ; a missing field counts as None."""
    first, second = as_flat_dict(first), as_flat_dict(second)
    fields = sorted(first.keys() | second.keys())
    return [field for field in fields if first.get(field) != second.get(field)]


def as_flat_dict(config: ml_collections.ConfigDict) -> dict:
    """Returns {dotted name: value}, with values as JSON has them: tuples are lists."""
    return dict(flatten(json.loads(config.to_json_best_effort())))


def is_in(field: str, names: Sequence[str]) -> bool:
    """Whether a field, or a group that it is in, is among the names."""
    return any(field == name or field.startswith(f"{name}.") for name in names)


def flatten(tree: dict, prefix: str = ""):
    """Yields (dotted name, value) for each field of a configuration."""
    for name, value in tree.items():
        field = prefix + name
        if isinstance(value, dict) and field not in DICTIONARIES:
            yield from flatten(value, f"{field}.")
        else:
            yield field, value


def check_class_names(workdir, class_names: Sequence[str], name: str) -> None:
    """Checks that labels mean to a dataset what they mean to the run in a folder.

    Args:
        workdir: the run's folder.
        class_names: the dataset's classes, in the order of its labels.
        name: the dataset, for the message.

    Raises:
        UserError: the run recorded other classes, or the same in another order.
    """
    recorded = run_folder.read_class_names(workdir)
    if recorded in (None, tuple(class_names)):
        return
    changes = [
        f"{label}: {old!r} -> {new!r}"
        for label, (old, new) in enumerate(zip(recorded, class_names, strict=False))
        if old != new
    ]
    raise UserError(
        f"{name} has other classes than the run in {workdir} recorded ({len(recorded)} -> "
        f"{len(class_names)}; {'; '.join(changes[:3]) or 'the first are the same'}), so its labels "
        "would mean something else: name the classes as in class_names.json"
    )
