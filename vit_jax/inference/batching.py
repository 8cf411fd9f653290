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
        """Returns the future result of an example, or the exception that its batch raised."""
        future = concurrent.futures.Future()
        self.waiting.put((example, future))
        return future

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
        examples, futures = zip(*batch, strict=True)
        self.on_batch(len(batch))
        try:
            results = self.function(np.stack(examples))
        except Exception as error:
            for future in futures:
                future.set_exception(error)
        else:
            for future, result in zip(futures, results, strict=True):
                future.set_result(result)
