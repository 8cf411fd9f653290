"""Dataset -> batches of uint8 images and integer labels, in an order determined by the seed.

The examples of step N depend on (seed, N) alone, and every random choice for an example on
(seed, epoch, index) and, if examples are repeated, on the copy, so a run can start at any step.
Does not depend on the model. Which share of each batch a process loads is an argument.

To draw the images and labels that the model gets:

    python input_pipeline.py --config=configs/vit_b16.py:recipe=augreg --show=out.png
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import os
from collections.abc import Iterator

import numpy as np

from vit_jax import checks
from vit_jax.data import preprocess, tf
from vit_jax.data.batches import check_labels, local_batch_size, make_batches, pad_batch
from vit_jax.data.corrupt import replace_corrupt, report_corrupt, skips_corrupt
from vit_jax.data.datasets import count_classes, open_source
from vit_jax.data.folders import open_files
from vit_jax.data.preprocess import image_shape
from vit_jax.data.shuffle import load_if_small, share_range, shuffle_order, train_examples
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


def uses_exif(source: Source, dataset) -> bool:
    """Whether images are turned upright: `config.dataset.exif`, or the source's own default."""
    return source.exif if dataset.exif is None else dataset.exif


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
    from vit_jax.models import predicts_classes
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
    if not predicts_classes(config):
        settings.append("patches masked after that, no labels")
    settings = ", ".join(repeated + settings)
    contact_sheet.draw(
        contact_sheet_batches(source, config),
        source.class_names if predicts_classes(config) else None,
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
