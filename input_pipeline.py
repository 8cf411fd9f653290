"""Dataset -> batches of uint8 images and integer labels, in an order that the seed decides.

The examples of step N depend on (seed, N) alone and every random choice on an example on
(seed, epoch, index), so a run can begin at any step. Knows TensorFlow and NumPy but no model;
which process this is, and of how many, are arguments.

python input_pipeline.py --config=configs/vit_b16.py:recipe=augreg --show=out.png

draws what the model gets to see of it.
"""

import atexit
import itertools
import logging
import os
import pathlib
import weakref
from collections.abc import Iterator

# Before TensorFlow is imported: no start-up notes, and kernels that compute the same everywhere.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import numpy as np
import tensorflow as tf

from vit_jax import checks
from vit_jax.checks import size_pair
from vit_jax.data import preprocess
from vit_jax.data.corrupt import decoded, filled_in, marked, noted, report_corrupt, unreadable
from vit_jax.data.shuffle import buffer_shuffled, globally_shuffled, process_part
from vit_jax.data.sources import (
    RandomAccess,
    RecordFiles,
    Source,
    count_classes,
    open_files,
    open_source,
)
from vit_jax.errors import UserError

logger = logging.getLogger("vit_jax")

tf.config.set_visible_devices([], "GPU")  # the accelerators are JAX's

__all__ = [
    "check",
    "eval_batches",
    "image_shape",
    "num_classes",
    "open_files",
    "open_source",
    "open_splits",
    "order",
    "report_corrupt",
    "train_batches",
]


def image_shape(config) -> tuple[int, int, int]:
    """Returns (height, width, channels) of the images that the model sees."""
    return *size_pair("config.image_size", config.image_size), config.dataset.channels


def open_splits(dataset) -> tuple[Source, Source]:
    """The training and the evaluation split of `config.dataset`, with the same classes."""
    where = (dataset.name, dataset.data_dir)
    train_set = open_source(*where, dataset.train_split)
    return train_set, open_source(*where, dataset.eval_split, train_set.class_names)


def num_classes(dataset) -> int:
    """Of `config.dataset`, which needn't be here where TFDS knows it by name."""
    return count_classes(dataset.name, dataset.data_dir, dataset.train_split)


def check(config) -> None:
    """Raises UserError for a dataset, an image size or an augmentation that can't work."""
    size_pair("config.image_size", config.image_size)
    dataset, augment = config.dataset, config.augment
    checks.check_choice("config.dataset.channels", dataset.channels, (1, 3))
    checks.check_choice("config.dataset.on_error", dataset.on_error, ("stop", "skip"))
    checks.check_range("config.dataset.in_memory_mb", dataset.in_memory_mb)
    checks.check_range("config.dataset.shuffle_buffer", dataset.shuffle_buffer, 1)
    for name in ("mean", "std"):
        if len(augment[name]) not in (1, dataset.channels):
            raise UserError(
                f"config.augment.{name} is {tuple(augment[name])}; it must have one number, or one "
                f"for each of the {dataset.channels} channels (config.dataset.channels)"
            )
    preprocess.check(augment)


def train_batches(
    source: Source,
    config,
    *,
    first_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    rows: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless training batches, from the one of step `first_step` on.

    Args:
        source: the training split.
        rows: of each batch, those that are this process's, as many as its part has. None: the
            parts lie one after the other.
        config: of a run; `seed`, `batch_size`, `image_size`, `dataset` and `augment` count here.

    Yields:
        This process's part: images uint8 (batch_size / process_count, H, W, C), labels int32.

    Raises:
        UserError: a batch the processes can't share, or an image that can't be decoded, by name.
    """
    *size, channels = image_shape(config)
    local_batch = local_batch_size(config.batch_size, process_count)
    source = in_memory_if_small(source, config.dataset)
    if rows is None:
        rows = np.arange(*process_part(config.batch_size, process_index, process_count))

    def examples_from(step):
        return train_examples(source, config, step, process_index, process_count, rows)

    def view(epoch, index, handle):
        encoded, label = source.fetch(handle)
        fold_in = tf.random.fold_in
        seed = fold_in(fold_in(tf.constant([config.seed, 0], tf.int64), epoch), index)
        image = preprocess.train_image(
            encoded, seed, size=size, channels=channels, augment=config.augment
        )
        return {"images": image, "labels": tf.cast(label, tf.int32)}

    def examples_after(done):
        return examples_from(first_step + done).take(local_batch).map(lambda _, *rest: rest)

    batches = batched(examples_from(first_step), view, source, config, local_batch, examples_after)
    return filled_in(batches, source) if config.dataset.on_error == "skip" else batches


def batched(examples, view, source, config, local_batch, examples_after) -> Iterator[dict]:
    """The batches of the views of a dataset of examples; the last one may be smaller.

    examples_after: see `damage.decoded`.
    """
    if config.dataset.on_error == "skip":
        view = marked(view, image_shape(config))
    views = examples.map(view, num_parallel_calls=tf.data.AUTOTUNE)
    batches = views.batch(local_batch).prefetch(2)
    return closed_at_exit(decoded(batches, source, config.dataset.channels, examples_after))


def order(source: Source, dataset) -> str:
    """How training examples are shuffled: "global" or "buffer". A run keeps to the one it has."""
    large = isinstance(source, RecordFiles) and source.num_bytes > dataset.in_memory_mb * 1e6
    return "buffer" if large else "global"


def in_memory_if_small(source: Source, dataset) -> Source:
    """TFRecord files up to `dataset.in_memory_mb` are read at once, for random access."""
    if not isinstance(source, RecordFiles) or order(source, dataset) == "buffer":
        return source
    try:
        return source.in_memory(tolerant=dataset.on_error == "skip")
    except tf.errors.OpError as error:
        raise UserError(unreadable(error, source)) from None


def train_examples(source, config, first_step, process_index, process_count, rows):
    """(epoch, index, handle) of this process's training examples, from `first_step` on."""
    if isinstance(source, RandomAccess):
        return globally_shuffled(source, config.seed, config.batch_size, first_step, rows)
    first, last = process_part(source.num_examples, process_index, process_count)
    if first == last:
        raise UserError(f"{source.name}: {process_count} processes, fewer examples")
    position = first_step * (config.batch_size // process_count)
    buffer_size, tolerant = config.dataset.shuffle_buffer, config.dataset.on_error == "skip"
    return buffer_shuffled(source, config.seed, position, buffer_size, first, last, tolerant)


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
    tolerant = config.dataset.on_error == "skip"
    first, last = process_part(source.num_examples, process_index, process_count)

    def view(index, handle):
        encoded, label = source.fetch(handle)
        keep = config.augment.eval_crop
        image = preprocess.eval_image(encoded, size=size, channels=channels, keep=keep)
        return {"images": image, "labels": tf.cast(label, tf.int32)}

    def examples_after(done):
        return source.in_order(first + done * local_batch, last).take(local_batch)

    examples = source.in_order(first, last, tolerant)
    batches = batched(examples, view, source, config, local_batch, examples_after)
    batches = noted(batches, source) if tolerant else batches
    empty = {
        "images": np.zeros((0, *size, channels), np.uint8),
        "labels": np.zeros((0,), np.int32),
    }
    largest_part = -(-source.num_examples // process_count)
    for _ in range(-(-largest_part // local_batch)):
        yield padded(next(batches, empty), local_batch)


def closed_at_exit(batches: Iterator) -> Iterator:
    """A thread that reads while Python shuts down would never end: it waits for Python."""
    RUNNING.add(batches)
    return batches


RUNNING = weakref.WeakSet()


@atexit.register
def close_all():
    for batches in list(RUNNING):
        batches.close()


def padded(batch: dict, size: int) -> dict:
    """The batch with zeros up to `size` examples, and the mask of those that count."""
    count = len(batch["labels"])
    good = ~batch.get("damaged", np.zeros(count, bool))

    def pad(array):
        return np.concatenate([array, np.zeros((size - count, *array.shape[1:]), array.dtype)])

    return {"images": pad(batch["images"]), "labels": pad(batch["labels"]), "mask": pad(good)}


def local_batch_size(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise UserError(
            f"config.batch_size {batch_size} is not divisible by {process_count} processes"
        )
    return batch_size // process_count


SHEET_STEPS, SHEET_IMAGES = 4, 8  # rows and columns of the contact sheet


def contact_sheet_batches(source: Source, config) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields images in [0, 1] and targets of a run's first steps, after all augmentation.

    The batches have SHEET_IMAGES examples, so that what is drawn once per batch shows.
    """
    import jax

    from vit_jax.training import augment, steps

    config = config.copy_and_resolve_references()
    config.update(batch_size=SHEET_IMAGES, accum_steps=1)
    mean, std = np.array(config.augment.mean), np.array(config.augment.std)
    for step, batch in enumerate(itertools.islice(train_batches(source, config), SHEET_STEPS)):
        augment_key, _ = jax.random.split(steps.step_key(config.seed, step))
        images, targets = augment.train_inputs(
            batch["images"], batch["labels"], augment_key, source.num_classes, config.augment
        )
        yield np.clip(np.asarray(images) * std + mean, 0.0, 1.0), np.asarray(targets)


def show(config, name: str, path: str | None) -> None:
    """Draws a contact sheet of the training split.

    Args:
        name: the configuration's, for the title.
        path: of the PNG.

    Raises:
        UserError: no such folder, or a configuration or dataset that can't work.
    """
    from vit_jax.data import contact_sheet
    from vit_jax.runs import run_log
    from vit_jax.training import augment

    run_log.start_logging()
    if path is None:
        raise UserError("--show=FILE.png is missing: the picture to draw")
    if not path.endswith(".png") or not pathlib.Path(path).parent.is_dir():
        raise UserError(f"--show is {path!r}; it must be a .png file in an existing folder")
    check(config)
    augment.check(config.augment)
    dataset = config.dataset
    source = open_source(dataset.name, dataset.data_dir, dataset.train_split)
    settings = ", ".join(preprocess.describe(config.augment) + augment.describe(config.augment))
    contact_sheet.draw(
        contact_sheet_batches(source, config),
        source.class_names,
        f"{name}, {source.name}\n{settings}",
        path,
        config.augment.label_smoothing,
    )
    report_corrupt(source)
    logger.info(f"{path}: {SHEET_STEPS} steps of {SHEET_IMAGES} images\n{settings}")


def main() -> None:
    from absl import flags

    import command_line

    flags.adopt_module_key_flags(command_line)
    path = flags.DEFINE_string("show", None, "The PNG to draw a contact sheet to.")
    command_line.run(
        lambda: show(command_line.CONFIG.value, command_line.config_name(), path.value)
    )


if __name__ == "__main__":
    main()
