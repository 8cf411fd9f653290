"""Examples that wait are computed together."""

import threading

import numpy as np
import pytest

from vit_jax.inference.batching import Batcher


def test_what_waits_is_computed_together_and_before_the_end():
    started, proceed, sizes = threading.Event(), threading.Event(), []

    def double(batch):
        started.set()
        assert proceed.wait(60)
        return 2 * batch

    batcher = Batcher(double, 4, sizes.append)
    futures = [batcher.submit(np.array(0))]
    assert started.wait(60)
    futures += [batcher.submit(np.array(i)) for i in range(1, 7)]
    proceed.set()
    batcher.close()
    assert [int(future.result(timeout=0)) for future in futures] == [0, 2, 4, 6, 8, 10, 12]
    assert sizes == [1, 4, 2]


def test_a_batch_that_fails_does_not_end_the_others():
    def reciprocal(batch):
        if not batch.all():
            raise ZeroDivisionError
        return 1 / batch

    batcher = Batcher(reciprocal, 1)
    bad, good = batcher.submit(np.array(0.0)), batcher.submit(np.array(4.0))
    with pytest.raises(ZeroDivisionError):
        bad.result(timeout=60)
    assert good.result(timeout=60) == 0.25
    batcher.close()
