"""A run's folder and the files that describe the run.

<workdir>/config.json             the configuration, with every field filled in
<workdir>/class_names.json        the names of the classes, in the order of the labels
<workdir>/branch.json, changes.json    written by `branch.py` and `resuming.py`
<workdir>/checkpoints/<step>/     written by `checkpoint.py`
<workdir>/compiled/               compiled programs for the next start: `compilation_cache.py`
<workdir>/evaluation/, report.html    written by evaluate.py, and at the end of training
<workdir>/profile/                traces of some steps: `profile.py`
<workdir>/train.log, metrics.jsonl, events.out.tfevents.*    written by `run_log.py`
"""

import contextlib
import errno
import json
import logging
import os
import pathlib
import tempfile
import time
from collections.abc import Sequence

import jax
import ml_collections
from etils import epy

from vit_jax.errors import UserError, first_line
from vit_jax.models import variants
from vit_jax.parallel import distributed
from vit_jax.storage import buckets, files, lease
from vit_jax.storage.files import dangling_target, write_atomically

with epy.lazy_imports():  # takes a second
    import orbax.checkpoint as ocp

logger = logging.getLogger("vit_jax")

# Fields that every run has recorded, and their types.
RECORDED = {
    **dict.fromkeys(("model", "dataset", "augment"), ml_collections.ConfigDict),
    **{"batch_size": int, "dtype": str, "loss": str},
}
FOLDERS, LOGS = ("checkpoints", "corrupt_checkpoints", "compiled"), ("train.log", "metrics.jsonl")
PRINTED = {  # pattern -> what messages call it
    "checkpoints": "checkpoints/",
    **{name: name for name in ("metrics.jsonl", "train.log", "config.json")},
    "events.out.tfevents.*": "TensorBoard events",
}
# Orbax takes the first three for a pattern and leaves a checkpoint unfinished, or finds another
# run's files; TensorStore takes the last for a slash, and writes outside the run's folder.
UNSUITABLE = set("*?[\\") - {os.sep}


class LostConfigError(UserError):
    """A run has checkpoints, but its config.json is missing or can't be read."""


def make(workdir) -> None:
    """Creates a run's folder.

    Raises:
        UserError: the folder, or what is in it, can't be written; or checkpoints can't be kept at
            such a path.
    """
    check_path(workdir)
    if buckets.is_bucket(workdir):
        buckets.check_writable(workdir)
        return
    path = folder = pathlib.Path(workdir)
    try:
        check_links(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder, *(folder / name for name in FOLDERS if (folder / name).exists())):
            tempfile.TemporaryFile(dir=path).close()
        for path in (folder / name for name in LOGS if (folder / name).exists()):
            path.open("ab").close()
    except OSError as error:
        place = "" if path == folder else f"{path}: "
        raise UserError(
            f"The run's folder {workdir} can't be written ({place}{error.strerror}): use another "
            "--workdir"
        ) from None


def check_path(workdir) -> None:
    """Raises UserError if checkpoints can't be kept at such a path."""
    check_characters(str(files.absolute_path(workdir)))
    check_nesting(workdir)


def check_characters(path: str) -> None:
    """Raises UserError if checkpoints can't be written to, or read from, such a path."""
    for character in path:
        if character in UNSUITABLE or "\ud800" <= character <= "\udfff":  # bytes that aren't UTF-8
            raise UserError(
                f"The run's folder {path!r} has {character!r} in its path; checkpoints couldn't be "
                "read again: use another --workdir"
            )


def check_nesting(workdir) -> None:
    """Raises UserError if a folder is among the files of another run, which may remove it."""
    folder = files.absolute_path(workdir)
    for path in (folder, *folder.parents):
        if path.name in FOLDERS and has_config(path.parent):
            raise UserError(
                f"--workdir {workdir} is inside the run {path.parent}, which removes old "
                "checkpoints: use another --workdir. To start from the run's parameters, add "
                f"--config.init_from={path.parent}"
            )


def check_links(folder: pathlib.Path) -> None:
    """Raises OSError if a folder, or one that it is in, is a link to nothing."""
    for path in (folder, *folder.parents):
        if target := dangling_target(path):
            raise OSError(errno.ENOENT, f"{path} is a dangling link to {target}")


def check_shared(workdir) -> None:
    """Raises UserError if the processes don't see the same folder."""
    if jax.process_count() == 1:
        return
    token = files.open_path(workdir) / ".seen_by_all"
    if jax.process_index() == 0:
        token.write_text("")
    distributed.barrier("token of the shared folder written")
    for _ in range(50):  # a network file system may show it late
        if seen := token.exists():
            break
        time.sleep(0.2)
    missing = distributed.any_process(not seen)
    if jax.process_index() == 0:
        token.unlink()
    if missing:
        raise UserError(
            f"--workdir={workdir} isn't the same folder for all processes: use one on a file "
            "system that they share, or in a bucket"
        )


class Lock:
    """A context manager that keeps other programs from training in a run's folder.

    It also makes the folder. Nothing of a run may be read before, since another program may still
    change it.
    """

    def __init__(self, workdir):
        self.workdir, self.lease = workdir, None

    def __enter__(self) -> "Lock":
        """Raises UserError, on every process, if the folder can't be used or is in use."""
        check_path(self.workdir)
        error = None
        if jax.process_index() == 0:
            try:
                make(self.workdir)
                self.lease = lease.acquire(self.workdir)
            except UserError as raised:
                error = raised
        self.raise_everywhere(error)
        return self

    def __exit__(self, *_):
        if self.lease is not None:
            self.lease.release()

    @property
    def is_lost(self) -> bool:
        """Whether this process knows that another program has taken the folder."""
        return self.lease is not None and self.lease.is_lost

    def check(self) -> None:
        """Raises UserError, on every process, if another program has taken the folder.

        That happens in a bucket only, if this program was suspended for long.
        """
        if not buckets.is_bucket(self.workdir):
            return
        error = None
        try:
            if self.lease is not None:
                self.lease.check()
        except UserError as raised:
            error = raised
        self.raise_everywhere(error)

    def raise_everywhere(self, error: UserError | None) -> None:
        if distributed.any_process(error is not None):
            raise error or UserError(f"Process 0 can't use {self.workdir}, as it says")


def checkpoint_steps(workdir) -> list[int]:
    """Returns the steps of the complete checkpoints in a run's folder, in order."""
    folder = files.absolute_path(workdir) / "checkpoints"
    try:
        exists = buckets.has_objects(folder) if buckets.is_bucket(folder) else folder.is_dir()
        return sorted(ocp.utils.checkpoint_steps(folder)) if exists else []
    except PermissionError as error:
        raise UserError(f"{folder} can't be read: {error.strerror}") from None


def is_run(folder) -> bool:
    """Whether a folder is a run's: it has checkpoints, or the configuration of a run."""
    return (files.open_path(folder) / "checkpoints").exists() or has_config(folder)


def has_config(folder) -> bool:
    """Whether the config.json in a folder was written by a run, not by another codebase."""
    try:
        fields = json.loads((files.open_path(folder) / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and fields.keys() >= {"model", "optimizer", "schedule"}


def record(
    workdir, config: ml_collections.ConfigDict, class_names: Sequence[str], remat: str
) -> None:
    """Records a run's configuration and classes; only process 0 writes.

    Args:
        workdir: the run's folder.
        config: the configuration.
        class_names: in the order of the labels.
        remat: what the field `model.remat` has come to, which is recorded instead of "auto".
    """
    if jax.process_index() == 0:
        config = config.copy_and_resolve_references()
        config.model.remat = remat
        write_config(workdir, config)
        write_class_names(workdir, class_names)


def record_if_deleted(
    workdir, config: ml_collections.ConfigDict, class_names: Sequence[str], remat: str
) -> None:
    """Makes and describes a run's folder again, see `record`, if someone deleted it.

    Raises:
        UserError: it can't be made.
    """
    folder = files.open_path(workdir)
    is_local = not buckets.is_bucket(folder)
    if is_local and jax.process_index() == 0 and not (folder / "config.json").exists():
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            record(workdir, config, class_names, remat)
        except OSError as error:
            raise UserError(f"{workdir} is gone, and can't be made: {error.strerror}") from None
        logger.error(
            f"{workdir} was moved or deleted while the run writes to it: its files and checkpoints "
            "from now on are in a new folder of that name"
        )


def list_files(workdir) -> list[str]:
    """Returns what a run's folder has of a run's files, to print."""
    folder = files.open_path(workdir)
    return [text for pattern, text in PRINTED.items() if any(folder.glob(pattern))]


def recorded(workdir, group: str, field: str):
    """Returns a field of the run that would be resumed in a folder, such as ("model", "remat").

    None if there is no such run, or it didn't record the field.
    """
    with contextlib.suppress(LostConfigError):  # `check_config` reports it
        if checkpoint_steps(workdir):
            return read_config(workdir)[group].get(field)
    return None


def write_config(workdir, config: ml_collections.ConfigDict) -> None:
    """Records a run's configuration."""
    text = config.to_json_best_effort(indent=2)
    write_atomically(files.open_path(workdir) / "config.json", text + "\n")


def read_config(workdir) -> ml_collections.ConfigDict | None:
    """Returns the configuration of the run in a folder; None if there is no run.

    Fields that the code has gained since then are missing, unless their default would change the
    run.

    Raises:
        LostConfigError: there are checkpoints, but the file is missing or can't be read.
        UserError: the file can't be read.
    """
    path = files.open_path(workdir) / "config.json"
    try:
        config = ml_collections.ConfigDict(json.loads(path.read_text()))
        check_structure(config)
    except (FileNotFoundError, NotADirectoryError):
        problem = "is missing"
    except (IsADirectoryError, ValueError, TypeError, AttributeError) as error:
        problem = f"can't be read ({first_line(error)})"
    except OSError as error:  # a passing problem, or rights: the file may be whole
        raise UserError(f"{path} can't be read: {error.strerror or first_line(error)}") from None
    except Exception as error:  # of a bucket's client
        if not buckets.is_bucket(path):
            raise
        raise UserError(f"{path} can't be read: {buckets.problem(error)}") from None
    else:
        fill_in_mlp_dim(config)
        if "exif" not in config.dataset:
            config.dataset.exif = False  # nothing read EXIF data then
        if "eval_method" not in config.augment:
            config.augment.eval_method = "bilinear"  # the only one then
        return config
    if checkpoint_steps(workdir):
        raise LostConfigError(
            f"{path} {problem}; the checkpoints are untouched. To write it anew, add "
            "--recover_config to the command that trained this run (train.py with the same "
            "--config, overrides and --workdir)"
        )
    if problem == "is missing":
        return None
    raise UserError(
        f"{path} {problem}: use another folder or, if the file isn't another model's, remove the "
        "file. Weights of another codebase are given as config.init_from, or to pretrained.load"
    )


def require_config(workdir) -> ml_collections.ConfigDict:
    """Returns the configuration of the run in a folder, as `read_config`.

    Raises:
        UserError: there is no run, or its file can't be read.
    """
    config = read_config(workdir)
    if config is None:
        parents = list(files.open_path(workdir).parents)[:2]
        run = next((f"; give {path}" for path in parents if has_config(path)), "")
        raise UserError(f"{workdir} is not a run's folder: it has no config.json{run}")
    return config


def check_structure(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError if a configuration lacks a field that every run records."""
    for field, kind in RECORDED.items():
        if not isinstance(config.get(field), kind):
            found = f"is {config[field]!r}" if field in config else "is missing"
            raise ValueError(f"{field} {found}")


def fill_in_mlp_dim(config: ml_collections.ConfigDict) -> None:
    """Fills in the `mlp_dim` of a configuration from before the field `loss_args`.

    A model with another width than its variant's had the variant's mlp_dim then, if none was set;
    today it has 4 x width.
    """
    model = config.model
    if "loss_args" not in config and model.get("width") and model.get("mlp_dim", 0) is None:
        fields = variants.fields(model.variant)
        if model.width != fields["width"]:
            with config.ignore_type():
                model.mlp_dim = fields["mlp_dim"]


def write_class_names(workdir, class_names: Sequence[str]) -> None:
    """Records the names of a run's classes, in the order of its labels."""
    text = json.dumps(class_names, indent=0)
    write_atomically(files.open_path(workdir) / "class_names.json", text + "\n")


def read_class_names(workdir) -> tuple[str, ...] | None:
    """Returns the names of a run's classes; None if they aren't recorded.

    Raises:
        UserError: the file isn't a list of names.
    """
    path = files.open_path(workdir) / "class_names.json"
    if not path.exists():
        return None
    try:
        names = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is corrupt ({error}): remove it") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} must be a list of names: remove it")
    return tuple(names)
