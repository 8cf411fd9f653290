"""Leases: one program at a time writes to a folder.

On a disk a lease is a file lock, which the system drops when its holder ends. In a bucket it is an
object that its holder writes anew every few seconds; once that stops, another program may take the
lease. Every write has the condition that nobody else has written since.
"""

import contextlib
import datetime
import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid

from etils import epy

from vit_jax.errors import UserError, first_line
from vit_jax.storage import buckets

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

with epy.lazy_imports():
    import tensorstore as ts

logger = logging.getLogger("vit_jax")

NAME = ".lock"
LEASE_SECONDS = 60  # a holder that hasn't written for this long is taken for dead
RENEW_SECONDS = 15
TAKEN = "Another program trains in"  # how the message of `Taken` begins


class Taken(UserError):
    """Another program holds the lease; the message says which."""


def acquire(folder) -> "FileLease | BucketLease | None":
    """Takes the lease of a folder.

    Waits for up to LEASE_SECONDS, in a bucket, if it isn't known whether its holder is alive.

    Returns:
        The lease; None where files can't be locked.

    Raises:
        Taken: another program holds it.
    """
    if buckets.is_bucket(folder):
        with buckets.translated_errors(folder):
            return BucketLease(folder)
    try:
        return FileLease(folder) if fcntl else None
    except OSError:
        logger.warning(f"{folder} is on a file system without locks: start only one program in it")
        return None


class FileLease:
    """The lease of a folder on a disk."""

    is_lost = False

    def __init__(self, folder):
        path = pathlib.Path(folder) / NAME
        self.file = open(path, "a+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise taken(folder, parse(path.read_bytes())) from None
        except OSError:
            self.file.close()
            raise
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
            self.file.truncate(0)
            self.file.write(json.dumps(this_process()))
            self.file.flush()

    def check(self) -> None:
        """Does nothing: nobody can take the lock."""

    def release(self) -> None:
        self.file.close()


class BucketLease:
    """The lease of a folder in a bucket, renewed by a thread."""

    def __init__(self, folder):
        self.folder, self.key = str(folder), uuid.uuid4().hex
        retries = ts.Context({"gcs_request_retries": {"max_retries": 3}})  # by default for minutes
        self.store = ts.KvStore.open(f"{self.folder.rstrip('/')}/", context=retries).result()
        self.lock, self.released = threading.Lock(), threading.Event()
        self.renewals, self.lost_to, self.is_lost = 0, None, False
        self.generation = self.take()
        self.renewed = time.monotonic()
        threading.Thread(target=self.renew_regularly, daemon=True).start()

    def take(self):
        """Writes the object once no other program holds the lease; returns its generation."""
        found = self.store.read(NAME).result()
        deadline, is_said = time.monotonic() + LEASE_SECONDS, False
        while True:
            holder = parse(found.value)
            is_known, is_running = look_up(holder)
            if is_known and is_running:
                raise taken(self.folder, holder)
            if found.state == "missing" or is_known or time.monotonic() > deadline:
                stamp = self.store.write(
                    NAME, self.content(), if_equal=found.stamp.generation
                ).result()
                if stamp.generation:
                    return stamp.generation
                written = self.store.read(NAME).result()
                if parse(written.value).get("key") == self.key:  # the answer got lost
                    return written.stamp.generation
            elif not is_said:
                is_said = True
                logger.info(
                    f"{self.folder} was in use by {describe(holder)}, which isn't known to have "
                    f"ended: waiting up to {LEASE_SECONDS} s for a sign of life"
                )
            time.sleep(min(1, RENEW_SECONDS / 5))
            latest = self.store.read(NAME).result()
            is_alive = latest.stamp.generation != found.stamp.generation
            if is_alive and latest.state != "missing":
                raise taken(self.folder, parse(latest.value))
            found = latest

    def content(self) -> bytes:
        self.renewals += 1
        return json.dumps(
            {**this_process(), "key": self.key, "renewals": self.renewals}, indent=1
        ).encode()

    def renew_regularly(self) -> None:
        while not self.released.wait(RENEW_SECONDS):
            try:
                self.renew()
            except Exception as error:  # the server is gone; it is tried again
                logger.debug(f"The lease of {self.folder} can't be renewed: {first_line(error)}")
            if self.is_lost:
                return

    def renew(self) -> None:
        """Writes the object anew; notes if another program has taken the lease."""
        with self.lock:
            if self.released.is_set() or self.is_lost:
                return
            stamp = self.write(self.generation)
            if not stamp.generation:
                found = self.store.read(NAME).result(LEASE_SECONDS)
                holder = parse(found.value)
                if found.state == "missing":  # removed by hand
                    stamp = self.write(found.stamp.generation)
                elif holder.get("key") == self.key:  # the answer to an earlier request got lost
                    stamp = found.stamp
                if not stamp.generation:
                    self.is_lost, self.lost_to = True, holder
                    return
            self.generation, self.renewed = stamp.generation, time.monotonic()

    def write(self, generation):
        """Writes the object on the condition that it is as it was."""
        return self.store.write(NAME, self.content(), if_equal=generation).result(LEASE_SECONDS)

    def check(self) -> None:
        """Raises Taken if another program has taken the lease, such as after a long suspension."""
        if not self.is_lost and time.monotonic() - self.renewed > LEASE_SECONDS / 2:
            try:
                self.renew()
            except Exception as error:  # the server is gone, and nobody else can write either
                logger.debug(f"The lease of {self.folder} can't be renewed: {first_line(error)}")
        if self.is_lost:
            raise taken(self.folder, self.lost_to)

    def release(self) -> None:
        """Removes the object, so that the next program needn't wait."""
        self.released.set()
        with self.lock:
            if self.is_lost:
                return
            try:
                self.store.write(NAME, None, if_equal=self.generation).result(RENEW_SECONDS)
            except Exception as error:  # the server is gone
                logger.debug(f"The lease of {self.folder} stays: {first_line(error)}")


def taken(folder, holder: dict) -> Taken:
    return Taken(
        f"{TAKEN} {folder}: {describe(holder)}. Wait until it ends, or use another --workdir"
    )


def describe(holder: dict) -> str:
    """Returns who holds a lease, in words."""
    if not holder:
        return "a program that left no name"
    return f"process {holder['process']} on {holder['host']}, since {holder['since']}"


def parse(content: bytes) -> dict:
    """Returns who holds a lease by the content of its file; empty if that is damaged."""
    try:
        holder = json.loads(content)
        return holder if holder.keys() >= {"host", "process", "since"} else {}
    except (ValueError, AttributeError):
        return {}


def this_process() -> dict:
    """Returns what identifies this process."""
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "system": system(),
        "started": start_time(os.getpid()),
    }


def look_up(holder: dict) -> tuple[bool, bool]:
    """Returns whether it is known that a holder is running, and whether it is.

    It is known only of processes of this system.
    """
    if holder.get("system") is None or holder["system"] != system():
        return False, False
    return True, start_time(holder["process"]) == holder.get("started")


def system() -> str | None:
    """Returns what identifies this system's table of processes; None where that isn't known."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def start_time(process: int) -> str | None:
    """Returns when a process of this system started, in its clock; None if it has ended."""
    try:
        fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
