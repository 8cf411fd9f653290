"""Buckets: folders such as gs://bucket/runs/b16, which have objects instead of files.

An object is written as a whole: it can't be appended to or renamed, and a reader never sees half of
one. Objects are read and written by gcsfs, through etils' epath, and checkpoints by TensorStore.
"""

import contextlib
import importlib.util
import logging
import os
import re
import uuid

from etils import epath

from vit_jax.errors import Unreachable, UserError, first_line
from vit_jax.storage.waiting import if_longer_than

logger = logging.getLogger("vit_jax")

SCHEME = "gs"
CLIENT = "gcsfs"
UNREACHABLE = "its server can't be reached"
SILENT_SECONDS = 10  # until an access that waits says so
# Text of the clients' errors, and what is wrong then.
PROBLEMS = {
    r"credential|\b401\b|unauthenticated|anonymous caller|refresh": (
        "the credentials are missing or wrong: run `gcloud auth application-default login`, or set "
        "GOOGLE_APPLICATION_CREDENTIALS to a key file"
    ),
    r"forbidden|\b403\b|permission": "the account may not read and write objects there",
    r"bucket.*not exist|not found|\b404\b": "there is no such bucket",
}


class Unsupported(UserError):
    """A path is in a kind of storage that isn't supported."""


def is_bucket(path) -> bool:
    """Whether a path is in a bucket rather than on a disk."""
    return "://" in str(path)


def check(path) -> None:
    """Gets ready to access a path in a bucket.

    Raises:
        UserError: it is in a kind of bucket that isn't supported, or the client isn't installed.
    """
    scheme, _, name = str(path).partition("://")
    if scheme != SCHEME or not name.partition("/")[0]:
        raise Unsupported(f"{path} can't be used: it must be a folder, or {SCHEME}://BUCKET/FOLDER")
    if importlib.util.find_spec(CLIENT) is None:
        raise UserError(
            f"{path} is in a bucket, whose client isn't installed: pip install {CLIENT}"
        )
    prepare_client()


def prepare_client() -> None:
    """Selects one client for all of a program, which sees what others write at once."""
    # Or epath uses TensorFlow's client if TensorFlow is installed, and imports it.
    os.environ.setdefault("EPATH_USE_TF", "false")
    if cached := getattr(epath.gpath, "_is_tf_installed", None):  # TFDS may have asked before
        cached.cache_clear()
    # gcsfs's support of other kinds of buckets looks for a gRPC endpoint and credentials.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec

    for name in ("gcs", "gs"):
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
    gcsfs_logger = logging.getLogger("gcsfs")
    if not any(isinstance(handler, RetriesHandler) for handler in gcsfs_logger.handlers):
        gcsfs_logger.addHandler(RetriesHandler())
        gcsfs_logger.setLevel(logging.DEBUG)
        gcsfs_logger.propagate = False


class RetriesHandler(logging.Handler):
    """Logs the first of gcsfs's retries; its other messages end up in an exception anyway."""

    is_first = True

    def emit(self, record):
        _, is_retry, reason = record.getMessage().partition("retrying after exception:")
        if is_retry and self.is_first:
            self.is_first = False
            logger.warning(
                f"The bucket's server answered with an error ({reason.strip()[:100]}): the request "
                "is repeated, after a pause. Further repetitions aren't reported"
            )


def list_objects(folder) -> list[str]:
    """Returns the names of all objects in a folder, relative to it, in order.

    Raises:
        UserError: the bucket can't be read.
    """
    import fsspec

    with says_if_waiting(f"list {folder}"), translated_errors(folder):
        system, path = fsspec.core.url_to_fs(str(folder))
        return sorted(name.removeprefix(f"{path}/") for name in system.find(path))


def has_objects(folder) -> bool:
    """Whether a folder has any object.

    Raises:
        UserError: the bucket can't be read. gcsfs's own `isdir` is False then.
    """
    import fsspec

    with translated_errors(folder):
        system, path = fsspec.core.url_to_fs(str(folder))
        try:
            return bool(system.ls(path, detail=False))
        except FileNotFoundError:
            return False


def read_object(path: str) -> bytes:
    """Returns the contents of an object, gs://BUCKET/NAME."""
    import fsspec

    system, name = fsspec.core.url_to_fs(path)
    return system.cat_file(name)


def check_writable(folder) -> None:
    """Writes and removes an object in a folder.

    Raises:
        UserError: the bucket doesn't exist or can't be written or reached.
    """
    token = epath.Path(folder) / f".writable_{uuid.uuid4().hex[:8]}"
    with says_if_waiting(f"access {folder}"), translated_errors(folder):
        token.write_text("")
        token.unlink()


@contextlib.contextmanager
def translated_errors(path):
    """Raises UserError for the clients' errors of accessing a path."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of many kinds
        raise refusal(path, error) from None


def refusal(path, error: Exception) -> UserError:
    """Returns the UserError for a client's error of accessing a path."""
    text = problem(error)
    kind = Unreachable if text.startswith(UNREACHABLE) else UserError
    return kind(f"{path} can't be used: {text}")


def is_client_error(error: Exception) -> bool:
    """Whether an exception is one of the clients' own."""
    return type(error).__module__.partition(".")[0] in ("gcsfs", "aiohttp", "google", "requests")


def problem(error: Exception) -> str:
    """Returns what is wrong, of a client's error, and how to mend it."""
    reason = first_line(error)[:200]
    if isinstance(error, FileNotFoundError):
        return PROBLEMS[r"bucket.*not exist|not found|\b404\b"]
    for pattern, text in PROBLEMS.items():
        if re.search(pattern, f"{type(error).__name__} {error}", re.IGNORECASE):
            return text
    return f"{UNREACHABLE} ({reason})"


@contextlib.contextmanager
def says_if_waiting(what: str, seconds: int = SILENT_SECONDS):
    """Logs a line if the block, which reads or writes files, takes long.

    Args:
        what: such as "write gs://bucket/run"; it completes the line "Still waiting to ...".
        seconds: how long that is.
    """
    with if_longer_than(seconds, logger.warning, f"Still waiting to {what}, after {seconds} s"):
        yield
