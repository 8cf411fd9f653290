"""Corrupt examples, which can't be read or decoded: named in an error, or skipped and counted."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterator

import numpy as np

from vit_jax.data import preprocess, tf
from vit_jax.data.folders import dangling_link
from vit_jax.data.sources import RecordFiles, Source
from vit_jax.errors import UserError

# Only process 0 logs to "vit_jax", but each process must log its own corrupt examples.
logger = logging.getLogger("vit_jax.corrupt")
logger.setLevel(logging.INFO)

ADVICE = "fix it, or skip corrupt examples with --config.dataset.on_error=skip"


def skips_corrupt(config) -> bool:
    """Whether a run goes on without corrupt examples."""
    return config.dataset.on_error == "skip"


def iterate_batches(
    batches: tf.data.Dataset, source: Source, channels: int, examples_of: Callable
) -> Iterator[dict]:
    """Yields batches as NumPy arrays; if one fails, names the example that it failed on.

    Args:
        batches: the dataset of batches.
        source: the split.
        channels: 1 or 3.
        examples_of: the number of a batch, from 0 -> dataset of its (..., index, handle).

    Raises:
        UserError: an example is corrupt.
    """
    iterator = batches.as_numpy_iterator()
    for number in itertools.count():
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except tf.errors.OpError as error:
            examples = examples_of(number)
            raise UserError(describe_failure(error, source, channels, examples)) from None
        yield batch


def describe_failure(error: tf.errors.OpError, source: Source, channels: int, examples) -> str:
    """Returns the message for a failed batch: which of its examples is corrupt, and what to do."""
    try:
        for *_, index, handle in examples:
            problem = "read"
            try:
                encoded, _ = source.fetch(handle)
                problem = "decoded"
                preprocess.EncodedImage(encoded, channels, exif=False).decode()
            except tf.errors.OpError as cause:
                name = source.describe(int(index))
                if link := dangling_link(name):
                    return f"{name} is {link}; {ADVICE}"
                return failure_message(f"{name} can't be {problem}", cause)
    except tf.errors.OpError:
        pass  # a file can't be read; maybe at a record that only fills the shuffle buffer
    return describe_unreadable(error, source)


def describe_unreadable(error: tf.errors.OpError, source: Source) -> str:
    """Returns the message for a source that can't be read: its first unreadable example."""
    if isinstance(source, RecordFiles):
        logger.info(f"Looking for the record of {source.name} that can't be read")
        records = source.in_order(0, source.num_examples, ignore_errors=True)
        for index, _ in records.filter(lambda _, record: tf.equal(record, "")).take(1):
            return failure_message(f"{source.describe(int(index))} can't be read", error)
    return failure_message(f"{source.name} can't be read", error)


def failure_message(problem: str, error: tf.errors.OpError) -> str:
    return f"{problem}: {error_reason(error)}; {ADVICE}"


def error_reason(error: tf.errors.OpError) -> str:
    """Returns TensorFlow's message without the names of operations."""
    text = re.sub(r"\{\{.*?\}\}|\[Op:.*", "", error.message.split("\n")[0])
    text = re.sub(r".*(assertion failed: \[|Summarized data: b')(.*?)['\]].*", r"\2", text)
    return re.sub(r"Error in user-defined function .* transformation.*?: ", "", text).strip()


def mark_corrupt(
    view: Callable, image_shape: tuple[int, int, int], label_shape: tuple[int, ...]
) -> Callable:
    """Wraps the function `view` so that a corrupt example gives zeros instead of an error.

    Args:
        view: (..., index, handle) -> fields of an example.
        image_shape: (height, width, channels).
        label_shape: of an example's label.

    Returns:
        The same function with two more fields: index, and corrupt, a bool.
    """
    blank = {"images": tf.zeros(image_shape, tf.uint8), "labels": tf.zeros(label_shape, tf.int32)}

    def view_or_blank(*example):
        *_, index, _ = example
        views = tf.data.Dataset.from_tensors(example).map(view)
        views = views.map(lambda fields: fields | {"corrupt": False}).ignore_errors()
        views = views.concatenate(tf.data.Dataset.from_tensors(blank | {"corrupt": True}))
        return views.take(1).get_single_element() | {"index": index}

    return view_or_blank


def log_corrupt(batches: Iterator[dict], source: Source) -> Iterator[dict]:
    """Removes the field index from batches, and logs each corrupt example once."""
    for batch in batches:
        for index in batch.pop("index")[batch["corrupt"]].tolist():
            if index not in source.corrupt:
                source.corrupt.add(index)
                name = source.describe(index)
                link = dangling_link(name)
                problem = f"it is {link}" if link else "it isn't a JPEG or PNG that can be read"
                logger.warning(f"Skipping {name}: {problem}")
        yield batch


def replace_corrupt(batches: Iterator[dict], source: Source) -> Iterator[dict]:
    """Replaces each corrupt example with the good one before it in the batch.

    All other examples thus keep their places in the order of the run. Removes the field corrupt.

    Raises:
        UserError: all examples of a batch are corrupt.
    """
    for batch in batches:
        good = np.flatnonzero(~batch.pop("corrupt"))
        if not len(good):
            raise UserError(f"{source.name}: all examples of a batch are corrupt")
        all_rows = np.arange(len(batch["labels"]))
        rows = good[np.searchsorted(good, all_rows, side="right") - 1]
        yield {name: values[rows] for name, values in batch.items()}


def report_corrupt(*sources: Source) -> None:
    """Logs how many examples of each source were skipped."""
    for source in sources:
        if count := len(source.corrupt):
            logger.warning(
                f"Skipped {count} of {source.num_examples:,} examples of {source.name} as corrupt; "
                "each is named above"
            )
