"""The order in which training examples are read: a new one each epoch, from the seed alone."""

from __future__ import annotations

import numpy as np

from vit_jax.data import tf
from vit_jax.data.corrupt import describe_unreadable, skips_corrupt
from vit_jax.data.sources import READ_BYTES, RandomAccess, RecordFiles, Source
from vit_jax.errors import UserError

FOREVER = np.iinfo(np.int64).max
MAX_PARTS = 64  # of a split of TFRecord files; up to so many processes read no record twice
MIN_PART = 1_000  # examples
FILES_AT_ONCE = 16  # that all parts together read at once; and each at least
MIN_FILES = 2
MEMORY_FOR_READING = 256 << 20  # bytes in the buffers of open files, of an epoch


def train_examples(source, config, first_step, rows):
    """Returns the dataset of this process's (showing, index, handle), starting at `first_step`.

    See `global_shuffle` for what they are.
    """
    position = dict(
        seed=config.seed,
        batch_size=config.batch_size,
        first_step=first_step,
        offset=config.dataset.offset,
        repeats=config.dataset.repeats,
    )
    if isinstance(source, RandomAccess):
        return global_shuffle(source, **position, rows=rows)
    order, parts = shuffle_order(source, config, config.dataset.order, config.dataset.parts)
    buffers = 1 if order == "buffer" else parts
    return parts_shuffle(
        source,
        **position,
        rows=rows,
        parts=parts,
        same_seed=order == "buffer",
        buffer_size=-(-config.dataset.shuffle_buffer // buffers),
        files_at_once=max(FILES_AT_ONCE // buffers, MIN_FILES),
        ignore_errors=skips_corrupt(config),
    )


def shuffle_order(
    source: Source, config, order: str | None = None, parts: int | None = None
) -> tuple[str, int]:
    """Returns how training examples are shuffled, and in how many parts; a run can't change it.

    "global" is one permutation of the whole split. In "parts", each part of a split of TFRecord
    files is shuffled through its share of the buffer; their number doesn't depend on the
    processes. Runs of earlier versions have a "buffer" of the whole size for each part, and as
    many parts as they began with processes.

    Args:
        source: the training split.
        config: a run's configuration. Used here: `batch_size` and `dataset.in_memory_mb`.
        order, parts: what the run, or the one that it goes on from, has recorded; None: nothing.
    """
    if not is_large(source, config.dataset):
        return "global", 1
    if order == "buffer":
        parts = parts or 1
    if not parts or config.batch_size % parts or parts > source.num_examples:
        return "parts", num_parts(source.num_examples, config.batch_size)
    return order or "parts", parts


def is_large(source: Source, dataset) -> bool:
    """Whether a source's records are read from front to back instead of into memory."""
    return isinstance(source, RecordFiles) and source.num_bytes > dataset.in_memory_mb * 1e6


def load_if_small(source: Source, dataset) -> Source:
    """Reads TFRecord files up to `dataset.in_memory_mb` into memory, for random access."""
    if not isinstance(source, RecordFiles) or is_large(source, dataset):
        return source
    try:
        return source.read_into_memory(ignore_errors=dataset.on_error == "skip")
    except tf.errors.OpError as error:
        raise UserError(describe_unreadable(error, source)) from None


def global_shuffle(
    source: RandomAccess, seed, batch_size, first_step, rows, offset: int = 0, repeats: int = 1
) -> tf.data.Dataset:
    """Returns the endless stream of (showing, index, handle), permuted over the whole split.

    Position p of the global stream is in epoch p // n, at position p % n // repeats of that
    epoch's permutation of the n examples. Permutations are computed per index, not stored, so the
    stream can start anywhere. `showing` is the epoch, if examples aren't repeated, and otherwise
    epoch * repeats + the number of the copy: no two views of an example have the same.

    Args:
        source: the split.
        seed: `config.seed`.
        batch_size: the size of the global batch.
        first_step: the step to start at.
        rows: indices into each global batch: the examples that this process reads.
        offset: the position at which step 0 would begin, if all steps had this batch size.
        repeats: how many times in a row each example comes (arXiv:1902.05509). An epoch still has
            n positions, and so the first of the permutation's examples.
    """
    n, local_batch, rows = source.num_examples, len(rows), tf.constant(rows, tf.int64)

    def example(local_position):
        step = local_position // local_batch
        position = offset + step * batch_size + rows[local_position % local_batch]
        epoch, position_in_epoch = position // n, position % n
        epoch_seed = tf.stack([tf.constant(seed, tf.int64), epoch])
        index = permuted_index(position_in_epoch // repeats, epoch_seed, n)
        return epoch * repeats + position_in_epoch % repeats, index

    return source.with_handles(
        tf.data.Dataset.range(first_step * local_batch, FOREVER).map(example)
    )


def permuted_index(position, seed, n: int) -> tf.Tensor:
    """Returns the index at a position of a permutation of 0 .. n - 1.

    Args:
        position: int64, a scalar or (k,).
        seed: int64 (2,); it decides the permutation.
        n: the number of indices.
    """
    # The operation uses only a few low bits of each word of its seed (half as many as n - 1 has),
    # so the words must be hashes. `tf.random.experimental.index_shuffle`, which wraps it, makes
    # only four rounds.
    words = tf.random.stateless_uniform((3,), seed, None, None, tf.int32)
    return tf.raw_ops.RandomIndexShuffle(
        index=position, seed=words, max_index=tf.constant(n - 1, tf.int64), rounds=8
    )


def num_parts(num_examples: int, batch_size: int) -> int:
    """Returns how many parts a split of TFRecord files is shuffled in, on any number of processes.

    They share each batch equally.
    """
    most = min(MAX_PARTS, max(num_examples // MIN_PART, 1))
    return max(parts for parts in range(1, most + 1) if batch_size % parts == 0)


def parts_shuffle(
    source: RecordFiles,
    seed,
    batch_size,
    first_step,
    rows,
    parts,
    offset: int = 0,
    repeats: int = 1,
    same_seed: bool = False,
    ignore_errors=False,
    **settings,
) -> tf.data.Dataset:
    """Returns this process's rows of the endless stream of (showing, index, handle).

    Each part of the split is shuffled through a buffer of its own, and fills the same rows of each
    batch. The stream thus doesn't depend on the processes. A process reads the parts that its rows
    are from, and no others.

    Args:
        source: the split.
        seed: `config.seed`.
        batch_size: the size of the global batch.
        first_step: the step to start at.
        rows: indices into each global batch, ascending: the examples that this process reads.
        parts: the number of parts; it divides `batch_size`.
        offset, repeats: as in `global_shuffle`, for the epochs of each part.
        same_seed: whether all parts have the same seed, as in runs of earlier versions.
        ignore_errors: as in `RecordFiles`.
        **settings: of each part: `buffer_size`, `files_at_once`.
    """
    rows_of_part = batch_size // parts
    part_of_row, row_in_part = np.divmod(rows, rows_of_part)
    own_parts, stream_of_row = np.unique(part_of_row, return_inverse=True)
    files = settings["files_at_once"] * len(own_parts)
    read_bytes = max(min(READ_BYTES, MEMORY_FOR_READING // files), 1 << 18)

    def stream(part):
        first, last = share_range(source.num_examples, part, parts)
        position = (offset + first_step * batch_size) // parts
        reading = dict(ignore_errors=ignore_errors, read_bytes=read_bytes, **settings)
        reading["repeats"] = repeats
        part_seed = seed if same_seed else fold_in(seed, part)
        records = buffer_shuffle(source, part_seed, position, first=first, last=last, **reading)
        kept = np.isin(np.arange(rows_of_part), row_in_part[part_of_row == part])
        if kept.all():
            return records
        kept = tf.constant(kept)
        chosen = records.enumerate().filter(lambda i, _: kept[i % rows_of_part])
        return chosen.map(lambda _, record: record)

    streams = [stream(part) for part in own_parts]
    choices = tf.data.Dataset.from_tensor_slices(stream_of_row.astype(np.int64)).repeat()
    return tf.data.Dataset.choose_from_datasets(streams, choices)


def fold_in(seed: int, part: int) -> int:
    """Returns a part's seed: parts of equal sizes would otherwise have the same order."""
    words = np.random.SeedSequence([seed, int(part)]).generate_state(2)
    return int(words.view(np.uint64)[0] >> 1)


def buffer_shuffle(
    source: RecordFiles,
    seed,
    first_position: int,
    buffer_size: int,
    first: int,
    last: int,
    repeats: int = 1,
    **reading,
) -> tf.data.Dataset:
    """Returns the endless stream of (showing, index, handle), shuffled through a buffer.

    Even and odd epochs are two streams with a buffer each, so that the next epoch's buffer fills
    while the last `buffer_size` records of an epoch leave theirs.

    Args:
        source: the split.
        seed: `config.seed`; each epoch's order depends on it and on the epoch.
        first_position: how many examples of the stream to skip; those of the first epoch are read.
        buffer_size: the size of the buffer, in records.
        first, last: the stream has examples first .. last - 1.
        repeats: as in `global_shuffle`.
        **reading: further arguments of `RecordFiles.shuffled`.
    """
    n = last - first
    buffer_size = min(buffer_size, n)
    first_epoch, num_skipped = divmod(first_position, n)

    def skipped_in(epoch):
        return tf.where(epoch == first_epoch, np.int64(num_skipped), np.int64(0))

    def epoch_records(epoch):
        """Returns an epoch's records, after an empty one.

        A prefetching stream fills its buffer once its first element is taken: the empty one
        starts the epoch ahead of its first record.
        """
        records = source.shuffled(first, last, seed, epoch, buffer_size, **reading)
        records = repeat_each(records, repeats).take(n) if repeats > 1 else records.map(first_copy)
        starter = tf.data.Dataset.from_tensors((np.int64(0), np.int64(-1), ""))
        records = starter.concatenate(records.skip(skipped_in(epoch)))
        return records.map(lambda copy, index, record: (epoch * repeats + copy, index, record))

    def every_second_epoch(start):
        return tf.data.Dataset.range(start, FOREVER, 2).flat_map(epoch_records).prefetch(1)

    def epoch_choices(epoch):
        """Returns the streams to take from during an epoch: its own, and once the other one."""
        stream = (epoch - first_epoch) % 2
        count = n - skipped_in(epoch)
        in_buffer = tf.minimum(count, buffer_size)
        return (
            repeat(stream, count - in_buffer)
            .concatenate(repeat(1 - stream, 1))  # the next epoch's starter
            .concatenate(repeat(stream, in_buffer))
        )

    streams = [every_second_epoch(first_epoch), every_second_epoch(first_epoch + 1)]
    choices = tf.data.Dataset.range(first_epoch, FOREVER).flat_map(epoch_choices)
    choices = repeat(np.int64(0), 1).concatenate(choices)  # the first epoch's starter
    records = tf.data.Dataset.choose_from_datasets(streams, choices)
    return records.filter(lambda showing, index, record: index >= 0)


def first_copy(index, record):
    return np.int64(0), index, record


def repeat_each(records: tf.data.Dataset, repeats: int) -> tf.data.Dataset:
    """Returns (copy, index, record), each record `repeats` times in a row, for copies from 0."""

    def copies(index, record):
        return (
            tf.range(repeats, dtype=tf.int64),
            tf.fill((repeats,), index),
            tf.fill((repeats,), record),
        )

    return records.map(copies).unbatch()


def repeat(value, count) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensors(value).repeat(count)


def share_range(num_examples: int, share_index: int, num_shares: int) -> tuple[int, int]:
    """Returns (first, last) of a process's examples first .. last - 1.

    The ranges are contiguous, and their sizes differ by one at most.
    """
    first = num_examples * share_index // num_shares
    return first, num_examples * (share_index + 1) // num_shares
