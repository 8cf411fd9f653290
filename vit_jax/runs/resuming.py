"""What a run may change when it resumes, and what it must not."""

import difflib
import json
import logging
from collections.abc import Collection, Sequence

import jax
import ml_collections

from vit_jax.errors import UserError
from vit_jax.runs import run_folder
from vit_jax.storage.files import open_path, write_atomically
from vit_jax.training.schedules import WITH_COOLDOWN

logger = logging.getLogger("vit_jax")

# Fields that are read only when a run begins. A run that resumes keeps the recorded values.
READ_AT_THE_START = (
    *("init_from", "init_mode", "init_from_depth", "init_from_patch", "init_from_grid"),
    "init_from_resize",
    *("init_from_required", "init_from_hint", "model.head_bias_init"),
)
# Fields that may differ when a run is resumed; a group's name covers all its fields. See also
# `may_change`. What isn't here changes the numbers of training, or those of the run's own
# evaluation (`dataset.eval_split`, `augment.eval_crop`), whose curve would then mean two things.
MAY_CHANGE = (
    *READ_AT_THE_START,
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
    # The machines: the numbers change by rounding.
    "mesh",
    # Where the data are, and what is kept of them; what they are is compared.
    "dataset.data_dir",
    "dataset.eval_cache_mb",
    # How the model is computed: the numbers change by rounding.
    "model.attention_impl",
    "model.remat",
    # The first only determines `total_steps`, and the second follows from `batch_size`: these are
    # compared.
    "num_epochs",
    "dataset.offset",
)
# Fields that the code gained when recipes began to set them, with what runs did before. A run from
# before goes on with it, and with the recorded values of CHANGED_WITH_THEM (or, of one from before
# these too, the values here).
BEFORE = {
    "augment.randaugment_kind": "pillow",
    "augment.crop_distribution": "tensorflow",
    "augment.resize_method": "bilinear",
    "dataset.repeats": 1,
}
CHANGED_WITH_THEM = {"augment.eval_method": "bilinear"}
# What names a dataset. It may differ if the dataset is the same: `is_same_dataset`.
NAMES_OF_DATASET = ("dataset.name", "dataset.train_split")
# What tells datasets apart.
IDENTITY = (*NAMES_OF_DATASET, "dataset.num_examples", "dataset.fingerprint")
CHANGES = "changes.json"  # written by `record_changes`
# The learning rate of every step depends on these.
LENGTH = ("total_steps", "schedule")
# Fields whose values are dictionaries, as opposed to groups of fields.
DICTIONARIES = ("loss_args", "model.resnet", "evals")


def keep_recorded(workdir, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns a configuration with what the run that it resumes has settled, if it resumes one.

    That is `continue_data_order`, and fields that are read only when a run begins: where its
    weights came from stays recorded, whatever is given now. See also `keep_recipe`.

    Raises:
        LostConfigError: the recorded configuration is lost.
    """
    config = config.copy_and_resolve_references()
    steps = run_folder.checkpoint_steps(workdir)
    if not steps:
        return config
    recorded = run_folder.read_config(workdir)
    old, new = as_flat_dict(recorded), as_flat_dict(config)
    ignored = [field for field in READ_AT_THE_START if field in old and old[field] != new[field]]
    with config.ignore_type():
        config.update_from_flattened_dict({field: old[field] for field in ignored})
    if "init_from" in ignored and new["init_from"]:
        logger.warning(
            f"{workdir}: the run began from {old['init_from'] or 'random parameters'}, and goes on "
            f"from its own checkpoint; config.init_from={new['init_from']} isn't read"
        )
    keep_recipe(workdir, old, config)
    return continue_data_order(recorded, steps[-1], config)


def keep_recipe(workdir, old: dict, config: ml_collections.ConfigDict) -> None:
    """Lets a run go on with what its recipe was, if it is from before the fields of BEFORE.

    Args:
        workdir: the run's folder.
        old: its recorded configuration, with dotted names.
        config: the configuration that was given; changes.
    """
    if any(field in old for field in BEFORE):
        return
    new = as_flat_dict(config)
    kept = BEFORE | {field: old.get(field, value) for field, value in CHANGED_WITH_THEM.items()}
    changed = [field for field, value in kept.items() if value != new[field]]
    config.update_from_flattened_dict({field: kept[field] for field in changed})
    if changed:
        settings = ", ".join(f"{field}={kept[field]}" for field in changed)
        logger.warning(
            f"{workdir}: the run is from before its recipe changed, and goes on with {settings}"
        )


def continue_data_order(
    recorded: ml_collections.ConfigDict, step: int, config: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
    """Returns a configuration whose order of examples continues another run's, at a step.

    The position in the order of the examples, counted in examples, goes on where it was, also
    with another batch size: no example of the epoch is left out, and none is repeated. Unless
    `dataset.exif` is set, images are read as they were: a run from before the field ignores it.
    """
    config = config.copy_and_resolve_references()
    old, new = recorded.dataset, config.dataset
    new.offset = old.get("offset", 0) + step * (recorded.batch_size - config.batch_size)
    if new.exif is None:
        new.exif = old.get("exif")
    return config


def check_resumable(
    workdir,
    config: ml_collections.ConfigDict,
    train_set,
    changed_fields: Collection[str] = (),
    recover: bool = False,
    allowed: Collection[str] = (),
) -> list[dict]:
    """Checks that the run in a folder, if it has checkpoints, can be resumed.

    Args:
        train_set: the training split, a Source.
        workdir, config, changed_fields, recover, allowed: see `check_config`.

    Returns:
        See `check_config`.

    Raises:
        UserError: as `check_config`; the dataset has other classes now; or there is a config.json
            that isn't a run's.
    """
    if not run_folder.checkpoint_steps(workdir):
        run_folder.read_config(workdir)  # raises if the config.json there isn't a run's
        return []
    changes = check_config(workdir, config, changed_fields, recover, allowed)
    check_class_names(workdir, train_set.class_names, train_set.name)
    return changes


def check_config(
    workdir,
    config: ml_collections.ConfigDict,
    changed_fields: Collection[str] = (),
    recover: bool = False,
    allowed: Collection[str] = (),
) -> list[dict]:
    """Checks that a configuration can resume the run in a folder, if it has checkpoints.

    A field that the code gained since the run was recorded must have its default.

    Args:
        workdir: the run's folder.
        config: the configuration, resolved.
        changed_fields: the names of fields whose values aren't the default; see
            `fields_that_differ`.
        recover: whether to accept it unchecked if the recorded one is lost.
        allowed: fields, and groups of fields, that may differ too: --allow_changes.

    Returns:
        The changes that only `allowed` allows, see `list_changes`.

    Raises:
        UserError: fields that must not change differ; each is listed with both values. Or the
            recorded configuration is lost.
    """
    steps = run_folder.checkpoint_steps(workdir)
    if not steps:
        return []
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
        return []
    old, new = as_flat_dict(recorded), as_flat_dict(config)
    changes = [
        change
        for change in list_changes(recorded, config, changed_fields)
        if not may_change(change["field"], old, new)
    ]
    if refused := [change for change in changes if not is_in(change["field"], allowed)]:
        raise UserError(describe_refused(workdir, refused))
    check_steps(workdir, steps, config.total_steps)
    if old["dataset.name"] != new["dataset.name"]:
        logger.info(f"{workdir}: the dataset is now read from {new['dataset.name']}")
    return changes


def may_change(field: str, old: dict, new: dict) -> bool:
    """Whether a field may differ when a run resumes.

    Args:
        field: its name.
        old, new: the recorded and the given configuration, with dotted names.
    """
    if field in NAMES_OF_DATASET:
        return is_same_dataset(old, new)
    if field == "dataset.fingerprint":
        return is_same_fingerprint(old.get(field), new[field])
    if field == "dataset.in_memory_mb":  # it only determines the order, which is compared
        return old.get("dataset.order") is not None
    if field == "dataset.shuffle_buffer":
        return old.get("dataset.order") == new.get("dataset.order") == "global"
    if field == "schedule.cooldown_steps":  # earlier code took it with any schedule
        return not {old.get("schedule.name"), new["schedule.name"]} & set(WITH_COOLDOWN)
    return is_in(field, MAY_CHANGE)


def is_same_dataset(old: dict, new: dict) -> bool:
    """Whether two training splits are the same, wherever they are; see `may_change`."""
    same = old.get("dataset.train_split") == new.get("dataset.train_split")
    first, second = old.get("dataset.fingerprint"), new.get("dataset.fingerprint")
    # An earlier fingerprint doesn't tell splits apart.
    return is_same_fingerprint(first, second) and (same or first == second)


def is_same_fingerprint(old: str | None, new: str | None) -> bool:
    """Whether fingerprints are the same; an earlier one of TFDS is the beginning of today's."""
    return old is not None and new is not None and (old == new or new.startswith(f"{old} "))


def describe_refused(workdir, refused: Sequence[dict]) -> str:
    """Returns the message for changes that a run can't be resumed with."""
    fields = [change["field"] for change in refused]
    message = (
        f"{workdir} holds a run with another configuration (recorded -> given): "
        f"{'; '.join(map(describe_change, refused))}. Use another --workdir, or the recorded values"
    )
    branch = f"--config.init_from={workdir} --config.init_mode=continue in another --workdir"
    if "dataset.name" in fields:
        message += ". This is another dataset than the run's, or another version of it"
    elif "dataset.fingerprint" in fields:
        message += (
            ". The training set has gained, lost or renamed examples, or is another version of "
            f"them, since the run began: restore it, or go on with it in a branch: {branch}"
        )
    elif any(is_in(field, LENGTH) for field in fields):
        message += (
            ". A run can't be extended in place, whether it is finished or not: to go on with "
            f"another schedule, start a branch: {branch}"
        )
    return message


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


def list_changes(
    old: ml_collections.ConfigDict,
    new: ml_collections.ConfigDict,
    changed_fields: Collection[str] = (),
) -> list[dict]:
    """Returns what differs from a recorded configuration: {"field", "old", "new"}, for JSON.

    A field that wasn't recorded, which the code has gained since then, has no "old", and counts
    only if it is among `changed_fields`, whose values aren't the default; unless it has the value
    in BEFORE.
    """
    first, second = as_flat_dict(old), as_flat_dict(new)
    return [
        {
            "field": field,
            **({"old": first[field]} if field in first else {}),
            "new": second.get(field),
        }
        for field in fields_that_differ(old, new)
        if field in first or (field in changed_fields and not is_as_before(field, second))
    ]


def is_as_before(field: str, new: dict) -> bool:
    """Whether a field that wasn't recorded has the value in BEFORE."""
    return field in BEFORE and new.get(field) == BEFORE[field]


def describe_change(change: dict) -> str:
    """Returns a change as text, such as "seed: 0 -> 1"."""
    old = repr(change["old"]) if "old" in change else "not recorded"
    return f"{change['field']}: {old} -> {change['new']!r}"


def parse_allowed(names: Sequence[str], config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """Returns the fields that --allow_changes names, without a leading "config.".

    Raises:
        UserError: one is neither a field nor a group of fields of the configuration.
    """
    fields = as_flat_dict(config)
    groups = {field.rpartition(".")[0] for field in fields} - {""}
    names = tuple(name.strip().removeprefix("config.") for name in names)
    for name in names:
        if name not in fields and name not in groups:
            near = difflib.get_close_matches(name, [*fields, *groups], n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise UserError(
                f"--allow_changes names {name!r}, which is no field of configs/common.py{hint}"
            )
    return names


def record_changes(workdir, step: int, changes: Sequence[dict]) -> None:
    """Adds changes that --allow_changes allowed to a run's changes.json, and logs them.

    Only process 0 writes. Called before config.json is written, which has the new values: a run
    that is killed in between finds the same changes again, and doesn't add them twice.

    Args:
        workdir: the run's folder.
        step: the step that the run resumes at.
        changes: what `check_config` returns.
    """
    if not changes or jax.process_index() != 0:
        return
    for change in changes:
        logger.warning(f"Changed from step {step:,} on, as allowed: {describe_change(change)}")
    path = open_path(workdir) / CHANGES
    try:
        recorded = list(json.loads(path.read_text())) if path.exists() else []
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it") from None
    changes = [{"step": step, **change} for change in changes]
    recorded += [change for change in changes if change not in recorded]
    write_atomically(path, json.dumps(recorded, indent=2) + "\n")


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
