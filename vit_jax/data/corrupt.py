"""Examples that can't be read or decoded: told by name, and where that is asked for, skipped."""

import logging
import re
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from vit_jax.data import preprocess
from vit_jax.data.sources import RecordFiles, Source
from vit_jax.errors import UserError

# Every process tells of its own part: not muted where "vit_jax" is.
logger = logging.getLogger("vit_jax.damage")
logger.setLevel(logging.INFO)


def decoded(batches, source: Source, channels: int, examples_after) -> Iterator[dict]:
    """Iterates over a dataset of batches; where one fails, says which image it was.

    examples_after: the number of batches that came through -> a dataset of the (index, handle) of
    the batch that follows, to look for the one that can't be decoded.
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
        for index, handle in examples:
            done = "read"
            try:
                encoded, _ = source.fetch(handle)
                done = "decoded"
                preprocess.decode(encoded, channels)
            except tf.errors.OpError as culprit:
                return failure(f"{source.describe(int(index))} can't be {done}", culprit)
    except tf.errors.OpError:
        pass  # the file itself can't be read; maybe further on, where a buffer fills
    return unreadable(error, source)


def unreadable(error, source: Source) -> str:
    """What to tell the user of a source that can't be read: the first such example."""
    if isinstance(source, RecordFiles):
        logger.info(f"Looking for the record of {source.name} that can't be read")
        records = source.in_order(0, source.num_examples, tolerant=True)
        for index, _ in records.filter(lambda _, record: tf.equal(record, "")).take(1):
            return failure(f"{source.describe(int(index))} can't be read", error)
    return failure(f"{source.name} can't be read", error)


def failure(what: str, error: tf.errors.OpError) -> str:
    way_out = "mend it, or leave such examples out with --config.dataset.on_error=skip"
    return f"{what}: {reason(error)}; {way_out}"


def reason(error: tf.errors.OpError) -> str:
    """TensorFlow's message without the operations it went through."""
    text = re.sub(r"\{\{.*?\}\}|\[Op:.*", "", error.message.split("\n")[0])
    text = re.sub(r".*(assertion failed: \[|Summarized data: b')(.*?)['\]].*", r"\2", text)
    return re.sub(r"Error in user-defined function .* transformation.*?: ", "", text).strip()


def marked(view: Callable, image_shape: tuple[int, int, int]) -> Callable:
    """`view`, with the fields index and damaged; zeros stand in for an image that fails."""
    blank = {"images": tf.zeros(image_shape, tf.uint8), "labels": tf.constant(0)}

    def attempt(*example):
        *_, index, _ = example
        views = tf.data.Dataset.from_tensors(example).map(view)
        views = views.map(lambda good: good | {"damaged": False}).ignore_errors()
        views = views.concatenate(tf.data.Dataset.from_tensors(blank | {"damaged": True}))
        return views.take(1).get_single_element() | {"index": index}

    return attempt


def noted(batches: Iterator[dict], source: Source) -> Iterator[dict]:
    """Takes the field index out of the batches, and tells of each damaged example once."""
    for batch in batches:
        for index in batch.pop("index")[batch["damaged"]].tolist():
            if index not in source.damaged:
                source.damaged.add(index)
                logger.warning(f"Skipping {source.describe(index)}: it can't be read or decoded")
        yield batch


def filled_in(batches: Iterator[dict], source: Source) -> Iterator[dict]:
    """In the place of a damaged example, the good one before it in the batch.

    So the other examples stay where they would be, whatever is damaged.
    """
    for batch in noted(batches, source):
        good = np.flatnonzero(~batch.pop("damaged"))
        if not len(good):
            raise UserError(f"{source.name}: no example of a whole batch can be read or decoded")
        any_row = np.arange(len(batch["labels"]))
        rows = good[np.searchsorted(good, any_row, side="right") - 1]
        yield {name: values[rows] for name, values in batch.items()}


def report_corrupt(*sources: Source) -> None:
    """Logs how many examples were skipped."""
    for source in sources:
        if count := len(source.damaged):
            logger.warning(
                f"Skipped {count} damaged of {source.num_examples:,} examples of {source.name}; "
                "each is named above"
            )
