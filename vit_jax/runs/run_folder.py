"""A run's folder: what is in it, beside what the run writes as it goes.

<workdir>/config.json             the run's configuration, every field resolved
<workdir>/class_names.json        the names of its classes, in the order of the labels
<workdir>/checkpoints/<step>/     as `checkpoint.py` has them
<workdir>/compiled/               programs, for the next start (`program.keeping_compiled`)
<workdir>/train.log, metrics.jsonl, TensorBoard events    as `run_log.py` has them
"""

import json
import logging
import pathlib
import tempfile
import time
from collections.abc import Sequence

import jax
import ml_collections
import orbax.checkpoint as ocp
from etils import epath

from vit_jax.parallel import distributed
from vit_jax.errors import UserError
from vit_jax.files import write_atomically

logger = logging.getLogger("vit_jax")

# Fields that may differ when a run is taken up again: they change what is shown or stored, or
# where it runs, but not which numbers come out.
MAY_CHANGE = (
    "checkpoint_every_steps",
    "keep_every_steps",
    "best_metric",
    "log_every_steps",
    "eval_every_steps",
    "on_nonfinite",
    "dataset.data_dir",
    "dataset.on_error",
    "dataset.parts",
    "mesh",
)


def make(workdir) -> None:
    """Makes a run's folder.

    Raises:
        UserError: it, or a file in it that is added to, can't be written.
    """
    if "://" in str(workdir):
        raise UserError(
            f"--workdir={workdir}: logs are appended to and checkpoints renamed, which buckets "
            "don't do; name a folder, which all processes see if there are several"
        )
    folder = pathlib.Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        for path in (folder / "train.log", folder / "metrics.jsonl"):
            if path.exists():
                path.open("ab").close()
    except OSError as error:
        raise UserError(
            f"The run's folder {workdir} can't be written ({error.strerror}): "
            "name another with --workdir"
        ) from None


def read_config(workdir) -> ml_collections.ConfigDict | None:
    """The configuration of the run in a folder; None where there is no run."""
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        return None
    try:
        return ml_collections.ConfigDict(json.loads(path.read_text()))
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): start in another --workdir") from None


def checkpoint_steps(workdir) -> list[int]:
    """The steps of the checkpoints in a run's folder, in order; complete ones alone."""
    folder = epath.Path(workdir).resolve() / "checkpoints"
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []


def check_config(workdir, config: ml_collections.ConfigDict) -> None:
    """Checks a configuration against that of the checkpoints in the folder, where there are any.

    Raises:
        UserError: they differ in fields that change the run; each is listed, old and new.
    """
    recorded = read_config(workdir)
    if recorded is None or not checkpoint_steps(workdir):
        return
    old, new = (dict(flat(json.loads(c.to_json_best_effort()))) for c in (recorded, config))
    changes = [
        f"{field}: {old[field]!r} -> {new.get(field)!r}"
        for field in sorted(old)  # one that is new since then didn't exist for that run
        if old[field] != new.get(field) and not may_change(field)
    ]
    if changes:
        raise UserError(
            f"{workdir} holds a run with another configuration (there -> here): "
            f"{'; '.join(changes)}. Take another --workdir, or the old values"
        )
    there, here = old.get("dataset.parts"), new["dataset.parts"]
    if there not in (None, here):
        logger.warning(
            f"{workdir}: the dataset was read in parts, one for each of {there} processes, and is "
            f"for {here} from here on: of this epoch some examples come twice, and some don't. "
            "ArrayRecord files have an order that doesn't depend on the processes"
        )


def check_shared(workdir) -> None:
    """Raises UserError where the processes don't see the same folder."""
    if jax.process_count() == 1:
        return
    token = epath.Path(workdir) / ".seen_by_all"
    if jax.process_index() == 0:
        token.touch()
    distributed.barrier("the folder's token was written")
    for _ in range(50):  # a network's file system may be late
        if seen := token.exists():
            break
        time.sleep(0.2)
    missing = distributed.any_process(not seen)
    if jax.process_index() == 0:
        token.unlink()
    if missing:
        raise UserError(
            f"--workdir={workdir} isn't the same folder for all processes: name one on a file "
            "system that all of them see"
        )


def write_config(workdir, config: ml_collections.ConfigDict) -> None:
    """Records a run's configuration."""
    text = config.to_json_best_effort(indent=2)
    write_atomically(epath.Path(workdir) / "config.json", text + "\n")


def write_class_names(workdir, class_names: Sequence[str]) -> None:
    """Records the names of a run's classes, in the order of its labels."""
    text = json.dumps(class_names, indent=0)
    write_atomically(epath.Path(workdir) / "class_names.json", text + "\n")


def read_class_names(workdir) -> tuple[str, ...] | None:
    """The names of a run's classes; None where it has none recorded."""
    path = epath.Path(workdir) / "class_names.json"
    if not path.exists():
        return None
    try:
        names = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} holds no list of names: remove it")
    return tuple(names)


def may_change(field: str) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in MAY_CHANGE)


def flat(tree: dict, prefix: str = ""):
    """Pairs (dotted name, value) of nested dicts."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
