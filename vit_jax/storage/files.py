"""Atomic writes, where a file is either complete or absent; JSON files; links to nothing."""

import contextlib
import json
import os
from collections.abc import Iterator

from etils import epath

from vit_jax.errors import UserError


@contextlib.contextmanager
def atomic_path(path) -> Iterator[epath.Path]:
    """Yields a temporary path to write to; it replaces `path` if the block succeeds."""
    path = epath.Path(path)
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
