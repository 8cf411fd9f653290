"""Access to the encoded images of one split, whatever kind of dataset it is from.

`RandomAccess` reads any example by its index: folders, ArrayRecord files, data in memory.
`RecordFiles` reads TFRecord files from front to back.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping

import numpy as np

from vit_jax.data import tf, tfds
from vit_jax.errors import UserError

READ_BYTES = 8 << 20  # of a TFRecord file at once
READ_AT_ONCE = 16  # examples; a larger number makes ArrayRecord hardly faster, and takes memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One split of a dataset.

    Attributes:
        name: what messages call it.
        num_examples: the number of examples.
        class_names: the names of the classes, in the order of the integer labels.
        describe: the index of an example -> text that helps a person find it, such as its path.
        fetch: the handle of an example -> (encoded image, label), as TensorFlow operations. The
            type of a handle depends on the kind of source.
        fingerprint: a hash of the names of the examples in their order, or what else tells whether
            a dataset in another place is the same; None: it can't be in another place.
        ranges: (whole split, first, last + 1) of each part of the dataset that the split selects.
        exif: whether images are turned upright as their EXIF data says, unless the configuration
            says otherwise.
        max_labels: None if each example has one label; otherwise the largest number of labels that
            one may have, to which they are padded with -1.
        corrupt: the indices of examples that were skipped so far.
    """

    name: str
    num_examples: int
    class_names: tuple[str, ...]
    describe: Callable[[int], str]
    fetch: Callable
    fingerprint: str | None = None
    ranges: tuple[tuple[str, int, int], ...] = ()
    exif: bool = False
    max_labels: int | None = None
    corrupt: set[int] = dataclasses.field(default_factory=set)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def num_shared(self, other: Source) -> int:
        """Returns how many examples this split shares with another of the same dataset."""
        if self.name.partition(", split")[0] != other.name.partition(", split")[0]:
            return 0
        return sum(
            max(0, min(end, other_end) - max(start, other_start))
            for name, start, end in self.ranges
            for other_name, other_start, other_end in other.ranges
            if name == other_name
        )

    @property
    def label_shape(self) -> tuple[int, ...]:
        """The shape of an example's label."""
        return () if self.max_labels is None else (self.max_labels,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomAccess(Source):
    """A source that reads any example at once.

    Attributes:
        read: the indices (k,) of examples -> their handles (k,), for what is read faster in chunks.
            An example that can't be read has a handle that `fetch` fails on. None: the handle of
            an example is its index.
    """

    read: Callable | None = None

    def in_order(self, first: int, last: int, ignore_errors: bool = False) -> tf.data.Dataset:
        """Returns (index, handle) of examples first .. last - 1; `fetch` raises the errors."""
        return self.with_handles(tf.data.Dataset.range(first, last).map(lambda index: (index,)))

    def with_handles(self, examples: tf.data.Dataset) -> tf.data.Dataset:
        """Returns (..., index, handle) for each (..., index), in the same order."""
        if self.read is None:
            return examples.map(lambda *example: (*example, example[-1]))
        chunks = examples.batch(READ_AT_ONCE).map(
            lambda *chunk: (*chunk, self.read(chunk[-1])), num_parallel_calls=tf.data.AUTOTUNE
        )
        return chunks.unbatch()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordFiles(Source):
    """TFRecord files. The handle of an example is its serialized record.

    A record missing from its file is empty, and `fetch` fails on it. With `ignore_errors`, records
    that can't be read are empty too, instead of an error.

    Attributes:
        files: (path, records to skip, records to take) of each file, in order.
        num_bytes: the approximate size of all records.
        rows: the numbers of the records that are examples, ascending, int64 (num_examples,);
            None: all are. The others are read too, and dropped.
    """

    files: tuple[tuple[str, int, int], ...]
    num_bytes: int
    rows: np.ndarray | None = None

    def in_order(self, first: int, last: int, ignore_errors: bool = False) -> tf.data.Dataset:
        """Returns (index, handle) of examples first .. last - 1."""
        files = tf.data.Dataset.from_tensor_slices(self.file_ranges(first, last))
        records = files.flat_map(functools.partial(read_records, ignore_errors=ignore_errors))
        return self.choose(records)

    def shuffled(
        self,
        first: int,
        last: int,
        seed,
        epoch,
        buffer_size: int,
        ignore_errors: bool = False,
        files_at_once: int = 16,
        read_bytes: int = READ_BYTES,
    ) -> tf.data.Dataset:
        """Returns (index, handle) of the same examples, in an order drawn from (seed, epoch).

        Permutes the files, interleaves the records of `files_at_once`, reading `read_bytes` of each
        at once, and draws from a buffer of `buffer_size` records.
        """
        columns = self.file_ranges(first, last)
        permutation = tf.random.experimental.stateless_shuffle(
            tf.range(len(columns[0])), seed=tf.stack([seed, epoch])
        )
        files = tf.data.Dataset.from_tensor_slices(
            tuple(tf.gather(column, permutation) for column in columns)
        )
        records = files.interleave(
            functools.partial(read_records, ignore_errors=ignore_errors, read_bytes=read_bytes),
            cycle_length=files_at_once,
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )
        records = self.choose(records)
        buffer_seed = tf.cast(tf.random.fold_in(tf.stack([seed, epoch]), 1)[0], tf.int64)
        return records.shuffle(buffer_size, seed=buffer_seed, reshuffle_each_iteration=False)

    def file_ranges(self, first: int, last: int) -> tuple[np.ndarray, ...]:
        """Returns the arguments of `read_records`, as columns, for examples first .. last - 1."""
        if self.rows is not None:
            chosen = self.rows[first:last]
            first, last = (chosen[0], chosen[-1] + 1) if len(chosen) else (0, 0)
        rows, start = [], 0
        for path, skip, take in self.files:
            low, high = max(first, start), min(last, start + take)
            if low < high:
                rows.append((path, low, skip + low - start, high - low))
            start += take
        paths, *numbers = zip(*rows, strict=True) if rows else ((), (), (), ())
        return np.array(paths, str), *(np.array(column, np.int64) for column in numbers)

    def choose(self, records: tf.data.Dataset) -> tf.data.Dataset:
        """Returns the (index, record) of examples, by their own numbers, from those of records."""
        if self.rows is None:
            return records
        rows = tf.constant(self.rows, tf.int64)

        def number(row, record):
            index = tf.searchsorted(rows, [row])[0]
            return tf.minimum(tf.cast(index, tf.int64), self.num_examples - 1), row, record

        numbered = records.map(number).filter(lambda index, row, _: rows[index] == row)
        return numbered.map(lambda index, row, record: (index, record))

    def read_into_memory(self, ignore_errors: bool = False) -> RandomAccess:
        """Reads all records now and returns the same examples; their images stay encoded."""
        dataset = self.in_order(0, self.num_examples, ignore_errors).map(lambda _, record: record)
        records = dataset.batch(self.num_examples).get_single_element()
        common = {field.name: getattr(self, field.name) for field in dataclasses.fields(Source)}
        return RandomAccess(**common | {"fetch": lambda index: self.fetch(records[index])})


def select(source: Source, rows: np.ndarray) -> Source:
    """Returns the examples of a source at some indices, in ascending order, numbered anew."""
    rows = np.sort(rows).astype(np.int64)
    changed = dict(
        num_examples=len(rows),
        describe=lambda index: source.describe(int(rows[index])),
        fingerprint=None,
        ranges=(),
        corrupt=set(),
    )
    if isinstance(source, RecordFiles):
        num_bytes = source.num_bytes * len(rows) // source.num_examples
        rows = rows if source.rows is None else source.rows[rows]
        return dataclasses.replace(source, rows=rows, num_bytes=num_bytes, **changed)
    of = tf.constant(rows)
    if source.read is None:
        changed["fetch"] = lambda index: source.fetch(of[index])
    else:
        changed["read"] = lambda indices: source.read(tf.gather(of, indices))
    return dataclasses.replace(source, **changed)


def subset(source: Source, examples: float, seed: int, balanced: bool) -> Source:
    """Returns some of a split's examples; a smaller subset is a part of a larger one.

    Args:
        source: the split.
        examples: how many, above 1; below 1: which share of the split.
        seed: decides which. A subset consists of the first examples of a permutation.
        balanced: whether each class has as many, or one more or less, as long as it has so many.
            The labels of all examples are read first.

    Raises:
        UserError: the split has fewer, or the share is less than one example; or it is neither a
            share nor a whole number above 1.
    """
    if examples == 1:
        raise UserError(
            "config.dataset.examples is 1, which could be all examples or one: for all, leave it "
            "None; a number must be above 1, and a share below 1"
        )
    if examples > 1 and int(examples) != examples:
        raise UserError(
            f"config.dataset.examples is {examples:,}; it must be a whole number, or a share below "
            "1"
        )
    count = round(examples * source.num_examples) if examples < 1 else int(examples)
    if not 1 <= count <= source.num_examples:
        raise UserError(
            f"config.dataset.examples is {examples:,}, which would be {count:,} examples; "
            f"{source.name} has {source.num_examples:,}"
        )
    order = np.random.default_rng(seed).permutation(source.num_examples)
    if balanced:
        order = order[by_turns(read_labels(source)[order])]
    kind = f"{'balanced ' if balanced else ''}subset {seed}"
    return dataclasses.replace(
        select(source, order[:count]),
        name=f"{source.name}, {kind}",
        fingerprint=source.fingerprint and f"{source.fingerprint}, {count} of {kind}",
        ranges=source.ranges,  # that it may be among
    )


def by_turns(labels: np.ndarray) -> np.ndarray:
    """Returns the order in which the classes take turns: the first of each, the second of each.

    Args:
        labels: int (N,).
    """
    by_class = np.argsort(labels, kind="stable")
    counts = np.unique(labels, return_counts=True)[1]
    turns = np.empty(len(labels), np.int64)
    turns[by_class] = np.concatenate([np.arange(count) for count in counts])
    return np.argsort(turns, kind="stable")


def read_labels(source: Source) -> np.ndarray:
    """Returns the labels of all examples of a source, int64 (num_examples,)."""
    examples = source.in_order(0, source.num_examples)
    labels = examples.map(
        lambda _, handle: source.fetch(handle)[1], num_parallel_calls=tf.data.AUTOTUNE
    )
    return np.concatenate(list(labels.batch(1024).as_numpy_iterator()))


def read_records(
    path, first_index, skip, take, *, ignore_errors: bool, read_bytes: int = READ_BYTES
) -> tf.data.Dataset:
    """Returns (index, record) of records skip .. skip + take - 1 of a TFRecord file.

    Records that the file lacks are empty, so that every example keeps its index.

    Args:
        path: the file.
        first_index: the index, in the split, of the first of these records.
        skip, take: how many records of the file to skip and to take.
        ignore_errors: whether records that can't be read are empty instead of an error.
        read_bytes: how much of the file to read at once.
    """
    # `ignore_errors` would retry a missing file forever.
    paths = tf.data.Dataset.from_tensor_slices(
        tf.io.matching_files(path) if ignore_errors else [path]
    )
    records = paths.flat_map(lambda path: tf.data.TFRecordDataset(path, buffer_size=read_bytes))
    records = records.ignore_errors() if ignore_errors else records
    empty = tf.data.Dataset.from_tensors("").repeat(take)
    return records.skip(skip).concatenate(empty).take(take).enumerate(first_index)


def select_split(
    split: str, whole_splits: dict[str, np.ndarray], dataset: str
) -> tuple[np.ndarray, tuple[tuple[str, int, int], ...]]:
    """Returns the items that a split in TFDS's notation selects, and its `split_ranges`.

    Args:
        split: such as "train[:99%]" or "train+test".
        whole_splits: the items of each whole split.
        dataset: what messages call the dataset.

    Raises:
        UserError: a split that can't be parsed, isn't among `whole_splits`, or is empty.
    """
    ranges = split_ranges(split, {n: len(items) for n, items in whole_splits.items()}, dataset)
    selected = np.concatenate([whole_splits[name][first:end] for name, first, end in ranges])
    if not len(selected):
        raise UserError(f"Split {split!r} of {dataset} is empty")
    return selected, ranges


def split_ranges(
    split: str, sizes: Mapping[str, int], dataset: str
) -> tuple[tuple[str, int, int], ...]:
    """Returns (whole split, first, last + 1) of each part that a split selects.

    Args:
        split: in TFDS's notation.
        sizes: the number of examples of each whole split.
        dataset: what messages call the dataset.

    Raises:
        UserError: a split that can't be parsed or isn't among `sizes`.
    """
    infos = {name: types.SimpleNamespace(num_examples=size) for name, size in sizes.items()}
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except ValueError as error:
        raise UserError(split_error(split, dataset, error)) from None
    return tuple(
        (part.splitname, *slice(part.from_, part.to).indices(sizes[part.splitname])[:2])
        for part in parts
    )


def split_error(split: str, dataset: str, error: Exception) -> str:
    """Returns the message for a split that TFDS refuses."""
    reason = " ".join(str(error).split()).strip("'\"")
    return f"Split {split!r} of {dataset} can't be read: {reason}"
