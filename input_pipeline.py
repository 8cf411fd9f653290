"""Dataset -> batches of uint8 images and integer labels, in an order that the seed decides.

The examples of step N depend on (seed, N) alone and every random choice on an example on
(seed, epoch, index), so a run can begin at any step. Knows TensorFlow and NumPy but no model;
which process this is, and of how many, are arguments.
"""

import os
import re
from collections.abc import Iterator

# Before TensorFlow is imported: no start-up notes, and kernels that compute the same everywhere.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import numpy as np
import tensorflow as tf

import preprocess
from sources import RandomAccess, RecordFiles, Source, open_source
from vit_jax.errors import UserError

tf.config.set_visible_devices([], "GPU")  # the accelerators are JAX's

__all__ = [
    "check",
    "eval_batches",
    "image_shape",
    "open_source",
    "open_splits",
    "train_batches",
]


def image_shape(config) -> tuple[int, int, int]:
    """(height, width, channels) the model sees; `config.image_size` is an int or a pair."""
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return height, width, config.dataset.channels


def open_splits(dataset) -> tuple[Source, Source]:
    """The training and the evaluation split of `config.dataset`, with the same classes."""
    where = (dataset.name, dataset.data_dir)
    train_set = open_source(*where, dataset.train_split)
    return train_set, open_source(*where, dataset.eval_split, train_set.class_names)


def check(config) -> None:
    """Raises UserError for an image size or an augmentation that can't be."""
    size = config.image_size
    sides = (size,) if isinstance(size, int) else size
    if not isinstance(sides, (tuple, list)) or len(sides) != 1 + (sides is size):
        raise UserError(f"config.image_size is {size!r}; it takes pixels, or (height, width)")
    if not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"config.image_size is {size!r}; it takes whole numbers above 0")
    channels = config.dataset.channels
    if channels not in (1, 3, 4):
        raise UserError(f"config.dataset.channels is {channels}; it can be 1, 3, 4")
    for name in ("mean", "std"):
        values = config.augment[name]
        if len(values) not in (1, channels):
            raise UserError(
                f"config.augment.{name} {tuple(values)} takes one number, or one for each of the "
                f"{channels} channels (config.dataset.channels)"
            )
    preprocess.check(config.augment)


def train_batches(
    source: Source,
    config,
    *,
    first_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless training batches, from the one of step `first_step` on.

    Args:
        source: the training split.
        config: of a run; `seed`, `batch_size`, `image_size`, `dataset` and `augment` count here.

    Yields:
        This process's part: images uint8 (batch_size / process_count, H, W, C), labels int32.

    Raises:
        UserError: a batch the processes can't share, or an image that can't be decoded, by name.
    """
    *size, channels = image_shape(config)
    seed, local_batch = config.seed, local_batch_size(config.batch_size, process_count)
    process = (process_index, process_count)

    def examples_from(step):
        if isinstance(source, RandomAccess):
            return globally_shuffled(source, seed, config.batch_size, step, *process)
        part = process_part(source.num_examples, *process)
        if part[0] == part[1]:
            raise UserError(f"{source.name}: {process_count} processes, fewer examples")
        buffer_size = config.dataset.shuffle_buffer
        return buffer_shuffled(source, seed, step * local_batch, buffer_size, *part)

    def view(epoch, index, encoded, label):
        fold_in = tf.random.fold_in
        image_seed = fold_in(fold_in(tf.constant([seed, 0], tf.int64), epoch), index)
        image = preprocess.train_image(
            encoded, image_seed, size=size, channels=channels, augment=config.augment
        )
        return {"images": image, "labels": tf.cast(label, tf.int32)}

    views = examples_from(first_step).map(view, num_parallel_calls=tf.data.AUTOTUNE)
    batches = views.batch(local_batch, drop_remainder=True).prefetch(2)

    def examples_after(done):
        examples = examples_from(first_step + done).take(local_batch)
        return examples.map(lambda _, *example: example)

    return decoded(batches, source, channels, examples_after)


def eval_batches(
    source: Source,
    config,
    *,
    batch_size: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example of the split once, in order; the rest of the last batch is padding.

    `batch_size` of all processes together; None: config.batch_size.

    Yields:
        This process's part of each batch: images uint8 (batch_size / process_count, H, W, C),
        labels int32 and mask bool, False for padding. Every process yields as many batches.
    """
    *size, channels = image_shape(config)
    local_batch = local_batch_size(batch_size or config.batch_size, process_count)
    first, last = process_part(source.num_examples, process_index, process_count)

    def view(index, encoded, label):
        keep = config.augment.eval_crop
        image = preprocess.eval_image(encoded, size=size, channels=channels, keep=keep)
        return {"images": image, "labels": tf.cast(label, tf.int32)}

    views = source.in_order(first, last).map(view, num_parallel_calls=tf.data.AUTOTUNE)
    batches = decoded(
        views.batch(local_batch).prefetch(2),
        source,
        channels,
        lambda done: source.in_order(first + done * local_batch, last).take(local_batch),
    )
    empty = {
        "images": np.zeros((0, *size, channels), np.uint8),
        "labels": np.zeros((0,), np.int32),
    }
    largest_part = -(-source.num_examples // process_count)
    for _ in range(-(-largest_part // local_batch)):
        yield padded(next(batches, empty), local_batch)


def globally_shuffled(
    source: RandomAccess, seed, batch_size, first_step, process_index, process_count
) -> tf.data.Dataset:
    """(epoch, index, encoded, label) of this process's slice of each batch.

    Position p of the endless stream is in epoch p // n, at place p % n of a permutation of the n
    examples that is computed, not stored.
    """
    n, local_batch = source.num_examples, batch_size // process_count

    def example(local_position):
        step, row = local_position // local_batch, local_position % local_batch
        position = step * batch_size + process_index * local_batch + row
        epoch, place = position // n, position % n
        key = tf.stack([tf.constant(seed, tf.int64), epoch])
        index = tf.random.experimental.index_shuffle(place, tf.cast(key, tf.int32), n - 1)
        return epoch, index, *source.read(index)

    positions = tf.data.Dataset.range(first_step * local_batch, np.iinfo(np.int64).max)
    return positions.map(example, num_parallel_calls=tf.data.AUTOTUNE)


def buffer_shuffled(
    source: RecordFiles, seed, first_position, buffer_size, first, last
) -> tf.data.Dataset:
    """(epoch, index, encoded, label) of this process's records, each epoch in an order of its own.

    Begins at `first_position` of the process's stream; what lies before is skipped unparsed.
    """
    first_epoch, offset = divmod(first_position, last - first)

    def epoch_records(epoch):
        records = source.shuffled(first, last, seed, epoch, buffer_size)
        records = records.skip(tf.where(epoch == first_epoch, np.int64(offset), np.int64(0)))
        return records.map(lambda index, record: (epoch, index, record))

    epochs = tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max)
    return epochs.flat_map(epoch_records).map(
        lambda epoch, index, record: (epoch, index, *source.parse(record)),
        num_parallel_calls=tf.data.AUTOTUNE,
    )


def decoded(batches, source: Source, channels: int, examples_after) -> Iterator[dict]:
    """Iterates over a dataset of batches; where one fails, says which image it was.

    examples_after: the number of batches that came through -> a dataset of the (index, encoded
    image, label) that follow, to look for the one that can't be decoded.
    """
    iterator, done = batches.as_numpy_iterator(), 0
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except tf.errors.OpError as error:
            raise UserError(explanation(error, source, channels, examples_after(done))) from None
        yield batch
        done += 1


def explanation(error, source: Source, channels: int, examples) -> str:
    """What to tell the user of a batch that failed: which of its examples can't be decoded."""
    try:
        for index, encoded, _ in examples:
            try:
                preprocess.decode(encoded, channels)
            except tf.errors.OpError as culprit:
                return f"{source.describe(int(index))} can't be decoded: {reason(culprit)}"
    except tf.errors.OpError:
        pass  # it can't even be read: the first error says so
    return f"Reading {source.name} failed: {reason(error)}"


def reason(error: tf.errors.OpError) -> str:
    """TensorFlow's message without the operations it went through."""
    text = re.sub(r"\{\{.*?\}\}|\[Op:.*", "", error.message.split("\n")[0])
    return re.sub(r"Error in user-defined function .* transformation.*?: ", "", text).strip()


def padded(batch: dict, size: int) -> dict:
    """The batch with zeros up to `size` examples, and the mask of the real ones."""
    missing = size - len(batch["labels"])

    def pad(array):
        return np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])

    mask = np.arange(size) < len(batch["labels"])
    return {"images": pad(batch["images"]), "labels": pad(batch["labels"]), "mask": mask}


def process_part(num_examples: int, index: int, count: int) -> tuple[int, int]:
    """The contiguous range of examples that is this process's; sizes differ by one at most."""
    return num_examples * index // count, num_examples * (index + 1) // count


def local_batch_size(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise UserError(
            f"config.batch_size {batch_size} is not divisible by {process_count} processes"
        )
    return batch_size // process_count
