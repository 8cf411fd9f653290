"""Notices that a program hangs, and says where."""

import faulthandler
import logging
import tempfile
import threading
import time

logger = logging.getLogger("vit_jax")


class Watchdog:
    """A context manager that logs the stacks of all threads if the program hangs.

    A hang is a time without a call of `beat`. It is logged once, and the program isn't ended: the
    device may still answer.
    """

    def __init__(self, seconds: float):
        """Takes how long is too long, in seconds; 0: nothing is watched."""
        self.seconds = seconds
        self.beat("the start")
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, name="watchdog", daemon=True)

    def __enter__(self):
        self.beat("the start")
        if self.seconds:
            self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        if self.seconds:
            self.thread.join()

    def beat(self, reached: str) -> None:
        """Tells what the program has reached, such as "step 3"."""
        self.last_beat = (time.monotonic(), reached)

    def watch(self) -> None:
        reported = None
        while not self.ended.wait(min(self.seconds / 4, 10)):
            beat = self.last_beat
            if beat is not reported and time.monotonic() - beat[0] > self.seconds:
                reported = beat
                logger.error(
                    f"No progress for {self.seconds:g} s (--hang_seconds) since {beat[1]}; the "
                    f"stacks of all threads:\n{stacks()}"
                )


def stacks() -> str:
    """Returns the stacks of all threads, the newest call first."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")
