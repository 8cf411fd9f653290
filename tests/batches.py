"""Helpers to take and compare batches."""

import itertools

import numpy as np


def take(batches, count):
    """Returns a list of the next `count` batches."""
    return list(itertools.islice(batches, count))


def assert_same(batches, others):
    """Asserts that two lists of batches have the same fields with the same values."""
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def views(batches):
    """Returns the bytes of each image in a list of batches."""
    return [image.tobytes() for batch in batches for image in batch["images"]]
