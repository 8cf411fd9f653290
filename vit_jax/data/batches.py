"""Examples -> batches of NumPy arrays."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Iterator

import numpy as np

from vit_jax.data import tf
from vit_jax.data.corrupt import iterate_batches, log_corrupt, mark_corrupt, skips_corrupt
from vit_jax.data.preprocess import image_shape
from vit_jax.data.sources import Source
from vit_jax.errors import UserError


def make_batches(
    examples_from: Callable, view: Callable, source: Source, config, local_batch: int
) -> Iterator[dict]:
    """Maps `view` over examples and batches the results; the last batch may be smaller.

    Args:
        examples_from: batch number, from 0 -> dataset of the examples from that batch on.
        view: an example -> its fields.
        source: the split.
        config: a run's configuration.
        local_batch: the batch size of this process.

    Yields:
        Batches of these fields, with a bool field `corrupt` if corrupt examples are skipped.
    """
    if skips_corrupt(config):
        view = mark_corrupt(view, image_shape(config), source.label_shape)
    # AutoGraph would take seconds to convert functions that already use tf.cond and tf.where.
    view = tf.autograph.experimental.do_not_convert(view)
    views = examples_from(0).map(view, num_parallel_calls=tf.data.AUTOTUNE)
    batches = iterate_batches(
        views.batch(local_batch).prefetch(2),
        source,
        config.dataset.channels,
        lambda batch: examples_from(batch).take(local_batch),
    )
    OPEN_BATCHES.add(batches)
    return log_corrupt(batches, source) if skips_corrupt(config) else batches


# ArrayRecord files are read in Python. If TensorFlow's threads still read while Python shuts down,
# they deadlock.
OPEN_BATCHES = weakref.WeakSet()


@atexit.register
def close_batches() -> None:
    """Closes all batches that are open, which ends their threads."""
    for batches in list(OPEN_BATCHES):
        batches.close()


def check_labels(batches: Iterator[dict], source: Source) -> Iterator[dict]:
    """Passes batches on; raises UserError for a label that isn't among the classes."""
    for batch in batches:
        labels = batch["labels"]
        outside = labels[(labels < 0) | (labels >= source.num_classes)]
        if len(outside):
            raise UserError(
                f"{source.name} has an example with the label {outside[0]}, but its "
                f"{source.num_classes} classes are numbered from 0: use a split with labels"
            )
        yield batch


def pad_batch(batch: dict, size: int) -> dict:
    """Pads a batch with zeros to `size` examples, and adds a mask of the real examples."""
    count = len(batch["labels"])
    good = ~batch.get("corrupt", np.zeros(count, bool))

    def pad(array):
        return np.concatenate([array, np.zeros((size - count, *array.shape[1:]), array.dtype)])

    return {"images": pad(batch["images"]), "labels": pad(batch["labels"]), "mask": pad(good)}


def local_batch_size(batch_size: int, num_shares: int) -> int:
    """Returns the batch size of one process; raises UserError if there is a remainder."""
    if batch_size % num_shares:
        raise UserError(
            f"config.batch_size is {batch_size}; it must be a multiple of the {num_shares} "
            "processes"
        )
    return batch_size // num_shares
