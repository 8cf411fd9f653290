"""Paths on disks and in buckets, atomic writes, and JSON files."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator

from etils import epath

from vit_jax.errors import UserError
from vit_jax.storage import buckets

COMMIT_MARK = "commit_success.txt"  # Orbax's


def open_path(path) -> epath.Path:
    """Returns a path, on a disk or in a bucket, ready for use.

    Raises:
        UserError: it is in a bucket of a kind that isn't supported, or whose client isn't
            installed.
    """
    if not buckets.is_bucket(path):
        return epath.Path(path)
    buckets.check(path)
    return epath.Path(str(path).rstrip("/"))


def absolute_path(path) -> epath.Path:
    """Returns what `open_path` does; a path on a disk is absolute, and without links."""
    path = open_path(path)
    return path if buckets.is_bucket(path) else path.resolve()


@contextlib.contextmanager
def atomic_path(path) -> Iterator[epath.Path]:
    """Yields a temporary path to write to; it replaces `path` if the block succeeds.

    For a path in a bucket it is a local one, which is uploaded.
    """
    path = epath.Path(path)
    if buckets.is_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            local = epath.Path(folder) / path.name
            yield local
            path.write_bytes(local.read_bytes())
        return
    unfinished = path.with_name(path.name + ".tmp")
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)  # on a full disk it would take up the rest
        raise


def write_atomically(path, content: str | bytes) -> None:
    """Writes a file so that a reader, or a restart after a kill, never sees half of it."""
    content = content.encode() if isinstance(content, str) else content
    with atomic_path(path) as unfinished:
        unfinished.write_bytes(content)


def move_folder(source: epath.Path, target: epath.Path) -> None:
    """Moves a folder to a path where nothing is.

    In a bucket, where its objects are moved one by one, what Orbax takes for the mark of a complete
    checkpoint goes first.
    """
    if not buckets.is_bucket(source):
        source.rename(target)
        return
    import fsspec

    (source / COMMIT_MARK).unlink(missing_ok=True)
    system, path = fsspec.core.url_to_fs(str(source))
    objects = system.find(path)
    system.copy(objects, [f"{target}{name.removeprefix(path)}" for name in objects])
    system.rm(objects)


def read_json_object(path: epath.Path) -> dict:
    """Reads a JSON file that holds an object; raises UserError for another, or a damaged one."""
    try:
        content = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; it must hold an object")
    return content


def dangling_target(path) -> str | None:
    """Returns what a symbolic link points to if that doesn't exist; None for any other path."""
    return os.readlink(path) if os.path.islink(path) and not os.path.exists(path) else None
