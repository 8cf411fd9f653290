"""Dataset -> batches of uint8 images and integer labels, in an order determined by the seed.

The examples of step N depend on (seed, N) alone, and every random choice for an example on
(seed, epoch, index) and, if examples are repeated, on the copy, so a run can start at any step.
Does not depend on the model. Which share of each batch a process loads is an argument.

To draw the images and labels that the model gets:

    python input_pipeline.py --config=configs/vit_b16.py:recipe=augreg --show=out.png
"""

from __future__ import annotations

import atexit
import functools
import itertools
import logging
import math
import os
import weakref
from collections.abc import Callable, Iterator

import numpy as np

from vit_jax import checks
from vit_jax.data import preprocess, tf
from vit_jax.data.corrupt import (
    describe_unreadable,
    iterate_batches,
    log_corrupt,
    mark_corrupt,
    replace_corrupt,
    report_corrupt,
)
from vit_jax.data.datasets import count_classes, open_source
from vit_jax.data.folders import open_files
from vit_jax.data.shuffle import (
    FILES_AT_ONCE,
    MIN_FILES,
    global_shuffle,
    num_parts,
    parts_shuffle,
    share_range,
)
from vit_jax.data.sources import RandomAccess, RecordFiles, Source, select, subset
from vit_jax.errors import UserError

logger = logging.getLogger("vit_jax")

RANGES = {
    "in_memory_mb": checks.NON_NEGATIVE,
    "eval_cache_mb": checks.NON_NEGATIVE,
    "shuffle_buffer": checks.COUNT,
    "examples": checks.Range(0, 2**31 - 1, above=True, optional=True),
    "examples_seed": checks.COUNT_OR_ZERO,
    "repeats": checks.Range(1, 64, whole=True),
}

__all__ = [
    "EvalBatches",
    "RandomAccess",
    "RecordFiles",
    "Source",
    "check",
    "check_single_labels",
    "check_workdir",
    "eval_batches",
    "image_shape",
    "load_images",
    "num_classes",
    "open_eval_batches",
    "open_files",
    "open_source",
    "open_splits",
    "report_corrupt",
    "shuffle_order",
    "train_batches",
    "uses_exif",
    "warn_of_shared",
]


def check(config) -> None:
    """Raises UserError if the dataset, the image size or an augmentation is invalid."""
    image_shape(config)
    dataset, augment = config.dataset, config.augment
    checks.check_choice("config.dataset.channels", dataset.channels, (1, 3))
    checks.check_choice("config.dataset.on_error", dataset.on_error, ("stop", "skip"))
    checks.check_ranges("config.dataset", dataset, RANGES)
    checks.check_normalization(augment.mean, augment.std, dataset.channels, "config.augment.")
    if dataset.repeats > 1 and config.batch_size <= dataset.repeats * config.accum_steps:
        raise UserError(
            f"config.dataset.repeats is {dataset.repeats}; it must be below the batch size (per "
            "microbatch, with accumulation), so that MixUp and CutMix find another example"
        )
    preprocess.check(augment)
    if augment.crop in ("pad", "simple"):
        most = min(image_shape(config)[:2]) - (augment.crop == "simple")  # a mirror isn't repeated
        smaller_side = checks.Range(0, most, whole=True)
        checks.check_range("config.augment.pad", augment.pad, smaller_side)


def check_workdir(dataset, workdir) -> None:
    """Raises UserError if a run's folder is inside the dataset's: it would be taken for a class."""
    root, folder = (
        os.path.realpath(os.path.expanduser(dataset.name or "")),
        os.path.realpath(workdir),
    )
    if os.path.isdir(root) and folder.startswith(root + os.sep):
        raise UserError(
            f"--workdir {workdir} is inside the dataset's folder {dataset.name} "
            "(config.dataset.name), and would be taken for a class: use another --workdir"
        )


def image_shape(config) -> tuple[int, int, int]:
    """Returns (height, width, channels) of the images that the model sees."""
    return *checks.size_pair("config.image_size", config.image_size), config.dataset.channels


def open_splits(dataset) -> tuple[Source, Source]:
    """Opens the training and the evaluation split of `config.dataset`, with the same classes."""
    location = (dataset.name, dataset.data_dir)
    train_set = open_train_split(dataset)
    eval_set = open_source(*location, dataset.eval_split, train_set.class_names)
    warn_of_shared(train_set, eval_set)
    return train_set, eval_set


def open_train_split(dataset) -> Source:
    """Opens the training split of `config.dataset`, or the subset of it to train on.

    Raises:
        UserError: it can't be opened, has sets of labels, or fewer examples.
    """
    source = open_source(dataset.name, dataset.data_dir, dataset.train_split)
    check_single_labels(source)
    # `get`: the configuration may be of a run from before the field.
    if (examples := dataset.get("examples")) is None:
        return source
    return subset(source, examples, dataset.examples_seed, dataset.examples_balanced)


def check_single_labels(source: Source) -> None:
    """Raises UserError if the examples of a source have sets of labels."""
    if source.max_labels is not None:
        raise UserError(
            f"{source.name} has sets of labels, which only an entry of config.evals of the kind "
            "'accuracy' can use, such as {'real': {'name': 'imagenet2012_real', 'split': "
            "'validation'}}"
        )


def warn_of_shared(train_set: Source, eval_set: Source) -> None:
    """Logs a warning if a split to evaluate on has training examples."""
    if shared := train_set.num_shared(eval_set):
        logger.warning(
            f"{shared:,} of the {eval_set.num_examples:,} evaluation examples of {eval_set.name} "
            f"are also in the training split, {train_set.name}"
        )


def num_classes(dataset) -> int:
    """Returns the number of classes of `config.dataset`, even if TFDS hasn't prepared it."""
    return count_classes(dataset.name, dataset.data_dir, dataset.train_split)


def train_batches(
    source: Source,
    config,
    *,
    first_step: int = 0,
    share_index: int = 0,
    num_shares: int = 1,
    rows: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Returns endless training batches.

    Args:
        source: the training split.
        config: a run's configuration. Used here: `seed`, `batch_size`, `image_size`, `dataset` and
            `augment`.
        first_step: the step to start at.
        share_index, num_shares: which share of each global batch to load, and how many there
            are.
        rows: this process's indices into the global batch; None: contiguous.

    Yields:
        This process's examples: images uint8 (batch_size / num_shares, H, W, C), labels int32.

    Raises:
        UserError: the batch can't be divided among the processes, or an example is corrupt.
    """
    local_batch = local_batch_size(config.batch_size, num_shares)
    source = load_if_small(source, config.dataset)
    if rows is None:
        rows = np.arange(*share_range(config.batch_size, share_index, num_shares))

    def examples_from(batch):
        step = first_step + batch
        return train_examples(source, config, step, rows)

    def view(showing, index, handle):
        encoded, label = source.fetch(handle)
        seed = tf.constant([config.seed, 0], tf.int64)
        seed = tf.random.fold_in(tf.random.fold_in(seed, showing), index)
        *size, channels = image_shape(config)
        settings = dict(channels=channels, exif=uses_exif(source, config.dataset))
        image = preprocess.train_image(encoded, seed, size=size, augment=config.augment, **settings)
        return {"images": image, "labels": tf.cast(label, tf.int32)}

    batches = make_batches(examples_from, view, source, config, local_batch)
    if skips_corrupt(config):
        batches = replace_corrupt(batches, source)
    # `get`: the configuration may be of a run from before the field.
    return batches if config.get("objective") == "masked_patches" else check_labels(batches, source)


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


def eval_batches(
    source: Source,
    config,
    *,
    batch_size: int | None = None,
    share_index: int = 0,
    num_shares: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields every example of a split once, in order; the end of the last batch is padding.

    Args:
        source: the split.
        config: a run's configuration. Used here: `batch_size`, `image_size`, `dataset` and
            `augment`: `eval_crop` and `eval_method`.
        batch_size: the global batch size; None: `config.batch_size`.
        share_index, num_shares: which share of the split to load, and how many there are.
            Every process yields the same number of batches.

    Yields:
        This process's part of each batch: images uint8 (batch_size / num_shares, H, W, C),
        labels int32, index int32, the number of each example in the split, and mask bool, False
        for padding and corrupt examples.

    Raises:
        UserError: the batch can't be divided among the processes, or an example is corrupt.
    """
    *size, channels = image_shape(config)
    eval_image = functools.partial(
        preprocess.eval_image,
        size=size,
        channels=channels,
        keep=config.augment.eval_crop,
        method=config.augment.eval_method,
        exif=uses_exif(source, config.dataset),
    )
    local_batch = local_batch_size(batch_size or config.batch_size, num_shares)
    first, last = share_range(source.num_examples, share_index, num_shares)

    def examples_from(batch):
        return source.in_order(first + batch * local_batch, last, skips_corrupt(config))

    def view(index, handle):
        encoded, label = source.fetch(handle)
        return {"images": eval_image(encoded), "labels": tf.cast(label, tf.int32)}

    batches = make_batches(examples_from, view, source, config, local_batch)
    empty = {
        "images": np.zeros((0, *size, channels), np.uint8),
        "labels": np.zeros((0, *source.label_shape), np.int32),
    }
    largest_share = -(-source.num_examples // num_shares)
    for number in range(-(-largest_share // local_batch)):
        index = np.arange(local_batch, dtype=np.int32) + first + number * local_batch
        yield pad_batch(next(batches, empty), local_batch) | {"index": index}


class EvalBatches:
    """The batches of an evaluation set, to iterate over once for each evaluation.

    If they take up to `config.dataset.eval_cache_mb`, the first complete pass keeps them, decoded;
    later ones then read and decode nothing.
    """

    def __init__(self, source: Source, config, *, num_shares: int = 1, **arguments):
        """Takes the arguments of `eval_batches`."""
        self.source = source
        arguments["num_shares"] = num_shares
        self.make = functools.partial(eval_batches, source, config, **arguments)
        num_bytes = source.num_examples * math.prod(image_shape(config)) / num_shares
        # `get`: the configuration may be of a run from before the field.
        self.keeps = num_bytes <= config.dataset.get("eval_cache_mb", 1_000) * 1e6
        self.kept = None

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        if self.kept is not None:
            yield from self.kept
            return
        kept = []
        for batch in self.make():
            if self.keeps:
                kept.append(batch)
            yield batch
        if self.keeps:
            self.kept = kept


def open_eval_batches(
    config,
    split: str,
    *,
    name: str | None = None,
    data_dir: str | None = None,
    class_names: tuple[str, ...] | None = None,
    max_examples: int | None = None,
    **arguments,
) -> EvalBatches:
    """Opens a split to evaluate on.

    Args:
        config: a run's configuration; see `eval_batches`.
        split, name, data_dir, class_names: see `open_source`; None: as in `config.dataset`.
        max_examples: a larger split is reduced to so many examples, evenly spaced; None: no limit.
        **arguments: other arguments of `EvalBatches`.
    """
    dataset = config.dataset
    location = (name or dataset.name, data_dir or dataset.data_dir)
    source = open_source(*location, split, class_names)
    if max_examples is not None and source.num_examples > max_examples:
        rows = np.arange(max_examples) * source.num_examples // max_examples
        source = select(source, rows)
    return EvalBatches(source, config, **arguments)


def load_images(source: Source, config, rows) -> np.ndarray:
    """Returns the evaluation views of the examples at some indices, uint8 (len(rows), H, W, C)."""
    order = np.argsort(rows)
    chosen = select(source, np.asarray(rows)[order])
    (batch,) = eval_batches(chosen, config, batch_size=len(rows))
    return batch["images"][np.argsort(order)]


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
    for batches in list(OPEN_BATCHES):
        batches.close()


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


def uses_exif(source: Source, dataset) -> bool:
    """Whether images are turned upright: `config.dataset.exif`, or the source's own default."""
    return source.exif if dataset.exif is None else dataset.exif


def skips_corrupt(config) -> bool:
    return config.dataset.on_error == "skip"


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


SHEET_STEPS, SHEET_IMAGES = 4, 8  # rows and columns of the contact sheet


def show(config, config_name: str, path: str | None) -> None:
    """Draws a contact sheet of the training split.

    Args:
        config: a run's configuration.
        config_name: the preset's name, for the title.
        path: the PNG file to write.

    Raises:
        UserError: no such folder, or a configuration or dataset that can't work.
    """
    from vit_jax.data import contact_sheet
    from vit_jax.logs import run_log
    from vit_jax.training import augment

    run_log.start_logging()
    if path is None:
        raise UserError("--show=FILE.png is missing: set it to the file to write")
    checks.check_png("--show", path)
    check(config)
    augment.check(config.augment)
    dataset = config.dataset
    source = open_train_split(dataset)
    repeated = [f"{dataset.repeats} views in a row"] if dataset.repeats > 1 else []
    settings = preprocess.describe(config.augment) + augment.describe(config.augment)
    settings = ", ".join(repeated + settings)
    contact_sheet.draw(
        contact_sheet_batches(source, config),
        source.class_names,
        f"{config_name}, {source.name}\n{settings}",
        path,
        config.augment.label_smoothing,
    )
    report_corrupt(source)
    logger.info(f"{path}: {SHEET_STEPS} steps of {SHEET_IMAGES} images\n{settings}")


def contact_sheet_batches(source: Source, config) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields images in [0, 1] and targets of a run's first steps, after all augmentation.

    The batches have SHEET_IMAGES examples, so that a row shows what is drawn once per batch.
    """
    import jax

    from vit_jax.training import augment, steps

    config = config.copy_and_resolve_references()
    config.update(batch_size=SHEET_IMAGES, accum_steps=1)

    @jax.jit
    def train_inputs(batch, step):
        key, _ = jax.random.split(steps.step_key(config.seed, step))
        images, labels = batch["images"], batch["labels"]
        arguments = (key, source.num_classes, config.augment, config.dataset.repeats)
        return augment.train_inputs(images, labels, *arguments)

    mean, std = np.array(config.augment.mean), np.array(config.augment.std)
    for step, batch in enumerate(itertools.islice(train_batches(source, config), SHEET_STEPS)):
        images, targets = train_inputs(batch, step)
        yield np.clip(np.asarray(images) * std + mean, 0.0, 1.0), np.asarray(targets)


def main() -> None:
    from absl import flags

    import command_line

    flags.adopt_module_key_flags(command_line)
    path = flags.DEFINE_string(
        "show", None, "The PNG file to write the contact sheet to (required)."
    )
    command_line.run(
        lambda: show(command_line.CONFIG.value, command_line.config_name(), path.value)
    )


if __name__ == "__main__":
    main()
