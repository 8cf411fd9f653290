"""Files that a program appends to, kept in a folder on a disk or in a bucket."""

import contextlib
import logging
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Collection, Iterator

from vit_jax.errors import UserError
from vit_jax.storage import buckets, files

logger = logging.getLogger("vit_jax")

UPLOAD_SECONDS = 60  # between two uploads: a bucket accepts one write of an object per second
LEFT_OUT = "wandb"  # a folder of Weights & Biases, uploaded once at the end


class Mirror:
    """A folder to append files to; if it is in a bucket, a local copy whose files are uploaded.

    Objects can't be appended to, so that a file that has changed is uploaded as a whole, once a
    minute, by `upload` and by `close`.

    Attributes:
        folder: the local folder to write to.
    """

    def __init__(self, folder, existing: Collection[str] = (), lock=None):
        """Opens a folder.

        Args:
            folder: its path, local or in a bucket.
            existing: the names of the files to go on with, where they exist.
            lock: the folder's lock, which may get lost (`is_lost`): nothing is uploaded then.

        Raises:
            UserError: the bucket can't be read.
        """
        self.lock = lock
        self.is_local = not buckets.is_bucket(folder)
        self.remote = files.open_path(folder)
        if self.is_local:
            self.folder = pathlib.Path(folder)
            return
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="vit_jax_"))
        self.uploaded = {}  # path -> (size, time) of what the bucket has
        self.is_failing = False
        self.uploading, self.closed = threading.Lock(), threading.Event()
        with buckets.translated_errors(folder):
            for name in existing:
                self.download(name)
        self.thread = threading.Thread(target=self.upload_regularly, daemon=True)
        self.thread.start()

    def download(self, name: str) -> None:
        """Gets a file from the bucket, if it is there."""
        try:
            content = (self.remote / name).read_bytes()
        except FileNotFoundError:
            return
        path = self.folder / name
        path.write_bytes(content)
        self.uploaded[path] = version(path)

    def upload_regularly(self) -> None:
        while not self.closed.wait(UPLOAD_SECONDS):
            self.upload()

    def upload(self) -> bool:
        """Uploads the files that have changed; logs the first of several failures.

        Returns:
            Whether the folder has all files as they are.
        """
        if self.is_local:
            return True
        if self.lock is not None and self.lock.is_lost:
            return False
        with self.uploading, buckets.says_if_waiting(f"write the logs in {self.remote}"):
            try:
                for path in files_in(self.folder):
                    if path.parts[0] != LEFT_OUT or self.closed.is_set():
                        self.upload_file(self.folder / path, self.remote / path)
            except Exception as error:  # of many kinds
                if not self.is_failing:
                    logger.error(
                        f"The logs in {self.remote} can't be written: {buckets.problem(error)}. "
                        "The run continues, and tries again"
                    )
                self.is_failing = True
                return False
            if self.is_failing:
                logger.info(f"The logs in {self.remote} are written again")
            self.is_failing = False
            return True

    def upload_file(self, path: pathlib.Path, target) -> None:
        """Uploads a file if it has changed since it was uploaded last."""
        try:
            current, content = version(path), path.read_bytes()
        except FileNotFoundError:  # a temporary file, renamed since it was listed
            return
        if self.uploaded.get(path) != current and path.suffix != ".tmp":
            target.write_bytes(content)
            self.uploaded[path] = current

    def close(self) -> None:
        """Uploads what is left, and removes the local copy; keeps it if the bucket is gone."""
        if self.is_local or self.closed.is_set():
            return
        self.closed.set()
        self.thread.join()
        if self.upload():
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            logger.error(f"The last lines of the logs are only in {self.folder} on this machine")


def version(path: pathlib.Path) -> tuple[int, int]:
    """Returns what changes when a file is written to."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def check_out(folder) -> None:
    """Checks that files can be written to a folder, which needn't exist; makes nothing.

    Args:
        folder: the path that is, or would be, the value of a flag --out.

    Raises:
        UserError: they can't.
    """
    if buckets.is_bucket(folder):
        buckets.check_writable(files.open_path(folder))
        return
    path = pathlib.Path(folder).absolute()
    existing = next(path for path in (path, *path.parents) if path.exists())
    problem = f"{existing} is a file"
    if existing.is_dir():
        try:
            tempfile.TemporaryFile(dir=existing).close()
            return
        except OSError as error:
            problem = error.strerror
    raise UserError(f"{folder} can't be written ({problem}): give another folder, by --out")


@contextlib.contextmanager
def written_folder(folder) -> Iterator[pathlib.Path]:
    """Yields a local folder to write files to; they are in `folder` once the block succeeds.

    Args:
        folder: its path, made if it doesn't exist; or a bucket's.

    Raises:
        OSError: it can't be written.
        UserError: it is in a bucket, which can't be written.
    """
    if not buckets.is_bucket(folder):
        path = pathlib.Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    remote = files.open_path(folder)
    with tempfile.TemporaryDirectory(prefix="vit_jax_") as name:
        local = pathlib.Path(name)
        yield local
        with buckets.says_if_waiting(f"write {folder}"), buckets.translated_errors(folder):
            for path in files_in(local):
                (remote / path).write_bytes((local / path).read_bytes())


def files_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files below a folder, relative to it, in order."""
    return [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
