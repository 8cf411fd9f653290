"""In which order examples are read: of every epoch another, decided by seed and epoch alone."""

import numpy as np
import tensorflow as tf

from vit_jax.data.sources import RandomAccess, RecordFiles

FOREVER = np.iinfo(np.int64).max


def globally_shuffled(source: RandomAccess, seed, batch_size, first_step, rows) -> tf.data.Dataset:
    """(epoch, index, handle) of these rows of each batch, from step `first_step` on.

    Position p of the endless stream is in epoch p // n, at place p % n of a permutation of the n
    examples that is computed, not stored.
    """
    n, local_batch, rows = source.num_examples, len(rows), tf.constant(rows, tf.int64)

    def example(local_position):
        step = local_position // local_batch
        position = step * batch_size + rows[local_position % local_batch]
        epoch, place = position // n, position % n
        index = permuted(place, tf.stack([tf.constant(seed, tf.int64), epoch]), n)
        return epoch, index, index

    return tf.data.Dataset.range(first_step * local_batch, FOREVER).map(example)


def permuted(place, seed, n: int) -> tf.Tensor:
    """Where `place` of 0 .. n - 1 goes in a permutation that the seed, int64 (2,), decides.

    `tf.random.experimental.index_shuffle` looks at a few low bits of each of the seed's words, as
    many as the numbers below n have, halved: the words have to be hashes, and four rounds are few.
    """
    words = tf.random.stateless_uniform((3,), seed, None, None, tf.int32)
    return tf.raw_ops.RandomIndexShuffle(
        index=place, seed=words, max_index=tf.constant(n - 1, tf.int64), rounds=8
    )


def buffer_shuffled(
    source: RecordFiles, seed, first_position, buffer_size, first, last, tolerant=False
) -> tf.data.Dataset:
    """(epoch, index, handle) of the records first .. last - 1, through a buffer seeded per epoch.

    Begins at `first_position` of the endless stream; what lies before is read and skipped. While
    the last `buffer_size` records of an epoch leave the buffer, a second one fills with the next.
    """
    n = last - first
    buffer_size = min(buffer_size, n)
    first_epoch, offset = divmod(first_position, n)

    def epoch_records(epoch):
        """A starter before the records: a prefetching stream fills its buffer once asked for it."""
        records = source.shuffled(first, last, seed, epoch, buffer_size, tolerant)
        records = records.skip(tf.where(epoch == first_epoch, np.int64(offset), np.int64(0)))
        starter = tf.data.Dataset.from_tensors((np.int64(-1), ""))
        return starter.concatenate(records).map(lambda *record: (epoch, *record))

    def every_second_epoch(start):
        return tf.data.Dataset.range(start, FOREVER, 2).flat_map(epoch_records).prefetch(1)

    def turns(epoch):
        """Which stream gives next: an epoch's own, and once the other's starter."""
        own = (epoch - first_epoch) % 2
        count = n - tf.where(epoch == first_epoch, np.int64(offset), np.int64(0))
        draining = tf.minimum(count, buffer_size)
        return (
            repeated(own, count - draining)
            .concatenate(repeated(1 - own, 1))
            .concatenate(repeated(own, draining))
        )

    streams = [every_second_epoch(first_epoch), every_second_epoch(first_epoch + 1)]
    choices = tf.data.Dataset.range(first_epoch, FOREVER).flat_map(turns)
    choices = repeated(np.int64(0), 1).concatenate(choices)  # the first epoch's starter
    records = tf.data.Dataset.choose_from_datasets(streams, choices)
    return records.filter(lambda epoch, index, record: index >= 0)


def repeated(value, count) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensors(value).repeat(count)


def process_part(num_examples: int, index: int, count: int) -> tuple[int, int]:
    """The contiguous range of examples that is this process's; sizes differ by one at most."""
    return num_examples * index // count, num_examples * (index + 1) // count
