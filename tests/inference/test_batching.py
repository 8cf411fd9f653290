"""Examples that wait are computed together."""

import threading

import numpy as np
import pytest

from vit_jax.inference.batching import Batcher


def blocked_batcher():
    """Returns a batcher that doubles, the events of its start and its release, and its sizes."""
    started, proceed, sizes = threading.Event(), threading.Event(), []

    def double(batch):
        started.set()
        assert proceed.wait(60)
        return 2 * batch

    return Batcher(double, 4, sizes.append), started, proceed, sizes


def test_what_waits_is_computed_together_and_before_the_end():
    batcher, started, proceed, sizes = blocked_batcher()
    futures = [batcher.submit(np.array(0))]
    assert started.wait(60)
    futures += [batcher.submit(np.array(i)) for i in range(1, 7)]
    proceed.set()
    batcher.close()
    assert [int(future.result(timeout=0)) for future in futures] == [0, 2, 4, 6, 8, 10, 12]
    assert sizes == [1, 4, 2]


def test_what_is_cancelled_is_not_computed_and_ends_nothing():
    batcher, started, proceed, sizes = blocked_batcher()
    first = batcher.submit(np.array(0))
    assert started.wait(60)
    assert not first.cancel()  # it is being computed
    alone, kept = batcher.submit(np.array(1)), batcher.submit(np.array(2))
    assert alone.cancel()
    proceed.set()
    assert [int(future.result(timeout=60)) for future in (first, kept)] == [0, 4]
    assert sizes == [1, 1]
    batcher.close()
    with pytest.raises(RuntimeError, match="thread has ended"):
        batcher.submit(np.array(3))


def test_a_batch_that_fails_does_not_end_the_others():
    def reciprocal(batch):
        if not batch.all():
            raise ZeroDivisionError
        return 1 / batch

    batcher = Batcher(reciprocal, 1)
    bad, scalar = batcher.submit(np.array(0.0)), batcher.submit("not an array")
    good = batcher.submit(np.array(4.0))
    with pytest.raises(ZeroDivisionError):
        bad.result(timeout=60)
    with pytest.raises(TypeError):
        scalar.result(timeout=60)
    assert good.result(timeout=60) == 0.25
    batcher.close()
