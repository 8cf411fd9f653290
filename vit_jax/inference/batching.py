"""Requests that wait are computed together."""

import concurrent.futures
import queue
import threading
from collections.abc import Callable

import numpy as np


class Batcher:
    """Applies a function of batches to single examples, in a thread of its own.

    While a batch is computed, further examples wait; the next batch takes all of them that fit. An
    example that comes alone waits for no other.
    """

    def __init__(self, function: Callable, max_batch: int, on_batch: Callable = lambda size: None):
        """Starts the thread.

        Args:
            function: arrays (n, ...) -> a result for each, n up to `max_batch`.
            max_batch: the largest number of examples to compute together.
            on_batch: called with the size of each batch.
        """
        self.function, self.max_batch, self.on_batch = function, max_batch, on_batch
        self.waiting = queue.SimpleQueue()  # of (example, future); None: the end
        self.thread = threading.Thread(target=self.run, name="batcher", daemon=True)
        self.thread.start()

    def submit(self, example: np.ndarray) -> concurrent.futures.Future:
        """Returns the future result of an example, or the exception that its batch raised.

        Raises:
            RuntimeError: the thread has ended.
        """
        if not self.is_alive():
            raise RuntimeError("The batcher's thread has ended")
        future = concurrent.futures.Future()
        self.waiting.put((example, future))
        return future

    def is_alive(self) -> bool:
        """Returns whether examples are still computed."""
        return self.thread.is_alive()

    def close(self) -> None:
        """Computes what waits, and ends the thread; `submit` must not be called any more."""
        self.waiting.put(None)
        self.thread.join()

    def run(self) -> None:
        while True:
            batch, is_end = self.next_batch()
            if batch:
                self.compute(batch)
            if is_end:
                return

    def next_batch(self) -> tuple[list, bool]:
        """Waits for an example; returns it with all others that fit, and whether it's the end."""
        batch = []
        while len(batch) < self.max_batch:
            try:
                item = self.waiting.get(block=not batch)
            except queue.Empty:
                break
            if item is None:
                return batch, True
            batch.append(item)
        return batch, False

    def compute(self, batch: list) -> None:
        # From here on, a future can't be cancelled any more.
        batch = [item for item in batch if item[1].set_running_or_notify_cancel()]
        if not batch:
            return
        examples, futures = zip(*batch, strict=True)
        try:
            self.on_batch(len(batch))
            results = self.function(np.stack(examples))
            answers = list(zip(futures, results, strict=True))
        except Exception as error:
            for future in futures:
                future.set_exception(error)
        else:
            for future, result in answers:
                future.set_result(result)
