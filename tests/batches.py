"""What tests ask of batches."""

import itertools

import numpy as np


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def views(batches):
    return [image.tobytes() for batch in batches for image in batch["images"]]
