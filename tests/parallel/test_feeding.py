"""When batches are produced, transferred and handed over."""

import itertools
import threading

import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.parallel import feeding


def test_a_ready_batch_is_handed_over_before_later_ones_are_produced(one_device):
    """The host makes the third batch only once the first is in use."""
    first_in_use = threading.Event()

    def batches():
        yield dict(x=np.zeros(1))
        yield dict(x=np.ones(1))
        assert first_in_use.wait(timeout=60), "the first batch waits for the third"
        yield dict(x=np.full(1, 2.0))

    stream = feeding.to_devices(batches(), one_device)
    assert next(stream)["x"] == 0
    first_in_use.set()
    assert [float(batch["x"][0]) for batch in stream] == [1, 2]


def test_few_batches_are_ahead_and_they_are_in_order(one_device):
    produced = []

    def batches():
        for i in itertools.count():
            produced.append(i)
            yield dict(x=np.full(1, i))

    stream = feeding.to_devices(batches(), one_device, ahead=2)
    for i in range(20):
        assert next(stream)["x"] == i
        assert len(produced) <= i + 1 + 2
    stream.close()


def test_an_error_is_raised_in_place_of_its_batch(one_device):
    """The batches before it are used first: a run saves what it learns from them."""

    def batches():
        yield from (dict(x=np.full(1, i)) for i in range(2))
        raise UserError("an example is corrupt")

    stream = feeding.to_devices(batches(), one_device)
    assert [int(next(stream)["x"][0]) for _ in range(2)] == [0, 1]
    with pytest.raises(UserError, match="an example is corrupt"):
        next(stream)
