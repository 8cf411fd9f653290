"""A run that is asked to stop: saves, and goes on another time."""

import logging
import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

logger = logging.getLogger("vit_jax")


class Preemption:
    """Listens, inside a `with`, for SIGTERM, SIGINT and the cluster's notice.

    A second SIGINT stops at once. Where processes were joined, a notice to one is one to all, and
    all agree on the step after which they stop: SIGTERM is JAX's to handle then.
    """

    def __init__(self):
        self.joined = jax.distributed.is_initialized()  # with others, or alone in a cluster
        self.asked = False
        self.reached = False
        self.points = 0
        self.previous = {}

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self  # signals are the main thread's
        self.previous[signal.SIGINT] = signal.signal(signal.SIGINT, self.on_signal)
        if not self.joined:
            self.previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self.on_signal)
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def on_signal(self, number, _):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked:
            logger.warning("Asked to stop: saving where it is; Ctrl-C again stops at once")
        self.asked = True
        if self.joined:
            os.kill(os.getpid(), signal.SIGTERM)

    def sync(self) -> bool:
        """Whether the run is to stop here; once so, always. All processes call it equally often."""
        self.points += 1
        if self.joined:
            self.reached |= multihost_utils.reached_preemption_sync_point(self.points)
        else:
            self.reached |= self.asked
        return self.reached
