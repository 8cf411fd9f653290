"""Telling the user that the program waits."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def if_longer_than(seconds: float, action: Callable, *args, **kwargs) -> Iterator[None]:
    """Calls `action` with the arguments, in a thread, if the block takes longer than `seconds`."""
    timer = threading.Timer(seconds, action, args, kwargs)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
