"""Reading the items of a checkpoint: each is a tree of arrays in a folder of its own."""

import contextlib
import functools
import io
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable

import jax
from etils import epath, epy

from vit_jax.errors import UserError, first_line
from vit_jax.paths import differing_shapes, path_name

with epy.lazy_imports():  # takes a second
    import orbax.checkpoint as ocp


FAILED_READ = "Encountered error while reading array index"  # Orbax, with the cause chained


class CorruptCheckpoint(Exception):
    """A checkpoint can't be read; the message names it and the reason."""


def read_item(path: epath.Path, shapes=None):
    """Returns one item of a checkpoint.

    Args:
        path: <workdir>/checkpoints/<step>/<item>.
        shapes: the expected shapes with shardings; None: the stored shapes, on the first device.

    Raises:
        CorruptCheckpoint: files are missing, cut short or not Orbax's.
        UserError: stored shapes differ from `shapes`; the first difference is named. Or the path
            has a backslash, or can't be read for lack of permission.
    """
    with open_item(path) as (checkpointer, stored):
        if shapes is None:
            shapes = on_first_device(stored)
        check_shapes(path, stored, shapes)
        # Read in the stored structure, whose empty nodes may be others: optax has some for what
        # is turned off, such as weight decay.
        restored = checkpointer.restore(path, by_name(shapes, stored))
        return by_name(restored, shapes)


def by_name(leaves, structure):
    """Returns a tree with the leaves of one tree, by their names, in the structure of another."""
    named = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(leaves)}
    return jax.tree.map_with_path(lambda path, _: named[path_name(path)], structure)


def check_item(path: epath.Path, shapes) -> None:
    """Checks that an item has the expected shapes; reads no array. Raises as `read_item`."""
    with open_item(path) as (_, stored):
        check_shapes(path, stored, shapes)


@contextlib.contextmanager
def open_item(path: epath.Path):
    """Yields (checkpointer, the stored shapes) of an item; raises as `read_item`."""
    if os.sep == "/" and "\\" in str(path):
        raise UserError(
            f"Checkpoint {path} can't be read: TensorStore takes the backslash in its path for a "
            "slash; rename the folder"
        )
    for folder in (path.parent, path):
        if os.path.exists(folder) and not os.access(folder, os.R_OK | os.X_OK):
            raise UserError(f"Checkpoint {folder} can't be read: permission denied")
    try:
        with quiet_orbax(), local_checkpointer() as checkpointer:
            metadata = checkpointer.metadata(path).item_metadata
            if metadata is None:
                raise ValueError("files are missing or cut short")
            yield checkpointer, metadata.tree
    except UserError:
        raise
    except Exception as error:  # Orbax raises exceptions of many types for corrupt files
        reason = first_line(error)[:200]
        if FAILED_READ in reason and error.__cause__ is not None:
            detail = first_line(error.__cause__)[:200]
            reason = f"a file is missing, damaged or cut short ({detail})"
        raise CorruptCheckpoint(f"Checkpoint {path} can't be read: {reason}") from error


def lists_item(checkpoint: epath.Path, item: str) -> bool:
    """Whether a checkpoint was saved with an item, as its metadata tells; True without metadata."""
    items = read_metadata(checkpoint).get("item_handlers")
    return item in items if isinstance(items, dict) else True


def stored_counters(checkpoint: epath.Path) -> dict[str, int]:
    """Returns the counters of the state that a checkpoint's metadata has; {} without metadata."""
    return read_metadata(checkpoint).get("custom_metadata") or {}


def read_metadata(checkpoint: epath.Path) -> dict:
    """Returns the metadata of a checkpoint, {} without; raises CorruptCheckpoint."""
    path = checkpoint / "_CHECKPOINT_METADATA"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise CorruptCheckpoint(f"Checkpoint {path} can't be read: {error}") from error


def local_checkpointer() -> "ocp.StandardCheckpointer":
    """Returns a checkpointer that doesn't wait for other processes, where reading may fail."""
    process = jax.process_index()
    if jax.process_count() == 1:
        return ocp.StandardCheckpointer()
    options = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"only{process}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=options)


def on_first_device(tree):
    """Returns the shapes of a tree with a sharding that puts all of it on one device."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), tree
    )


def check_shapes(path: epath.Path, stored, expected) -> None:
    """Raises UserError if the names or shapes of two trees differ."""

    def shapes(tree):
        return {path_name(p): tuple(leaf.shape) for p, leaf in jax.tree.leaves_with_path(tree)}

    for name, stored_shape, shape in differing_shapes(shapes(stored), shapes(expected)):
        raise UserError(
            f"Checkpoint {path} belongs to a different model: {name} is {stored_shape} in the "
            f"checkpoint and {shape} in the configured model"
        )


@contextlib.contextmanager
def quiet_orbax():
    """Silences Orbax, except for the exception that it raises.

    It warns that a single item isn't a whole checkpoint. If one array can't be read, every
    unfinished read prints a traceback from its own thread, or whenever Python frees its task.
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
                silence_unfinished_tasks()
                time.sleep(1)  # lets the other reads fail while stderr is redirected
                raise
        sys.stderr.write(stderr.getvalue())
    finally:
        absl_logger.setLevel(level)


def silence_unfinished_tasks() -> None:
    """Drops what Python reports about Orbax's other reads or writes after one of them failed."""
    logging.getLogger("asyncio").addFilter(is_not_of_orbax)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    if getattr(sys.unraisablehook, "func", None) is not report_others:
        sys.unraisablehook = functools.partial(report_others, sys.unraisablehook)


def is_not_of_orbax(record: logging.LogRecord) -> bool:
    """Whether a record of asyncio's logger isn't about a task of Orbax."""
    return "orbax" not in record.getMessage()


def report_others(hook: Callable, unraisable) -> None:
    """Passes an exception to `hook`, a sys.unraisablehook, unless it is of an unfinished task."""
    error = str(unraisable.exc_value)
    if "Event loop is closed" not in error and FAILED_READ not in error:
        hook(unraisable)
