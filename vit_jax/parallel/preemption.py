"""Handles requests to stop a run: SIGTERM, Ctrl-C, a closed terminal, a preemption notice."""

import logging
import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

logger = logging.getLogger("vit_jax")


class Preemption:
    """A context manager that listens for requests to stop.

    With several processes, a request to one stops all, after a step that they agree on. JAX then
    handles SIGTERM. A second Ctrl-C stops at once.

    Attributes:
        stopping: whether `sync` has returned True.
    """

    def __init__(self):
        self.joined = jax.distributed.is_initialized()  # true for a single process in a cluster too
        self.requested = False
        self.stopping = False
        self.sync_points = 0
        self.previous_handlers = {}

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread can handle signals
        handlers = self.previous_handlers
        handlers[signal.SIGINT] = signal.signal(signal.SIGINT, self.on_signal)
        hangup = getattr(signal, "SIGHUP", None)  # not on Windows
        if hangup and signal.getsignal(hangup) != signal.SIG_IGN:  # as it is under nohup
            handlers[hangup] = signal.signal(hangup, self.on_signal)
        if not self.joined:
            handlers[signal.SIGTERM] = signal.signal(signal.SIGTERM, self.on_signal)
        return self

    def __exit__(self, *_):
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def on_signal(self, number, frame):
        if self.requested and number == signal.SIGINT:
            if callable(previous := self.previous_handlers[number]):
                previous(number, frame)
            raise KeyboardInterrupt
        if not self.requested:
            logger.warning("Stop requested: saving a checkpoint; Ctrl-C again stops at once")
        self.requested = True
        if self.joined:  # JAX passes SIGTERM on to the other processes
            os.kill(os.getpid(), signal.SIGTERM)

    def sync(self) -> bool:
        """Returns whether to stop here; all processes must call it the same number of times."""
        self.sync_points += 1
        if self.joined:
            self.stopping |= multihost_utils.reached_preemption_sync_point(self.sync_points)
        else:
            self.stopping |= self.requested
        return self.stopping
