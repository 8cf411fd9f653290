"""Where examples come from: the embedded digits, a folder of images, or a TFDS dataset.

`open_source` gives a `Source`: how many examples, which classes, and tf.data access to the
encoded images. A source that can be read at any index is `RandomAccess`; TFRecord files are
`RecordFiles`, read from front to back.
"""

import dataclasses
import hashlib
import logging
import pathlib
import types
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from vit_jax.errors import UserError

logger = logging.getLogger("vit_jax")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a dataset.

    name: for messages. class_names: in the order of the integer labels. describe: the index of
    an example -> what a person would look for, such as its path.
    """

    name: str
    num_examples: int
    class_names: tuple[str, ...]
    describe: Callable[[int], str]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclasses.dataclass(frozen=True)
class RandomAccess(Source):
    """read: index int64 () -> (encoded image, label), as TensorFlow operations."""

    read: Callable

    def in_order(self, first: int, last: int) -> tf.data.Dataset:
        """Examples first .. last - 1 as (index, encoded image, label)."""
        indices = tf.data.Dataset.range(first, last)
        return indices.map(lambda i: (i, *self.read(i)), num_parallel_calls=tf.data.AUTOTUNE)


@dataclasses.dataclass(frozen=True)
class RecordFiles(Source):
    """files: (path, records to skip, to take), in order; parse: record -> (image bytes, label)."""

    files: tuple[tuple[str, int, int], ...]
    parse: Callable

    def in_order(self, first: int, last: int) -> tf.data.Dataset:
        """Examples first .. last - 1 as (index, encoded image, label)."""
        files = tf.data.Dataset.from_tensor_slices(self.clipped(first, last))
        return files.flat_map(read_file).map(lambda i, record: (i, *self.parse(record)))

    def shuffled(self, first: int, last: int, seed, epoch, buffer_size: int) -> tf.data.Dataset:
        """The same examples unparsed, (index, record), in an order drawn from (seed, epoch).

        The files are permuted, sixteen are read in turns, and a buffer of records is drawn from.
        """
        paths, starts, skips, takes = self.clipped(first, last)
        permutation = tf.random.experimental.stateless_shuffle(
            tf.range(len(paths)), seed=tf.stack([seed, epoch])
        )
        columns = (paths, starts, skips, takes)
        files = tf.data.Dataset.from_tensor_slices(
            tuple(tf.gather(column, permutation) for column in columns)
        )
        records = files.interleave(
            read_file, cycle_length=16, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )
        buffer_size = min(buffer_size, last - first)
        buffer_seed = tf.cast(tf.random.fold_in(tf.stack([seed, epoch]), 1)[0], tf.int64)
        return records.shuffle(buffer_size, seed=buffer_seed, reshuffle_each_iteration=False)

    def clipped(self, first: int, last: int) -> tuple[np.ndarray, ...]:
        """Columns path, index of the first record, skip, take: the part first .. last - 1."""
        rows, start = [], 0
        for path, skip, take in self.files:
            low, high = max(first, start), min(last, start + take)
            if low < high:
                rows.append((path, low, skip + low - start, high - low))
            start += take
        paths, *numbers = zip(*rows, strict=True) if rows else ((), (), (), ())
        return np.array(paths, np.str_), *(np.array(column, np.int64) for column in numbers)


def read_file(path, start, skip, take) -> tf.data.Dataset:
    """(index, record) of a TFRecord file's records skip .. skip + take - 1."""
    records = tf.data.TFRecordDataset(path, buffer_size=8 << 20).skip(skip).take(take)
    return records.enumerate(start)


def open_source(
    name: str,
    data_dir: str | None,
    split: str,
    class_names: Sequence[str] | None = None,
) -> Source:
    """Opens one split of a dataset; reads no image.

    Args:
        name: "digits" (embedded), a TFDS name ("imagenet2012"), the folder of a prepared TFDS
            dataset, or a folder of `<split>/<class>/*.jpg|png`.
        data_dir: where TFDS keeps prepared datasets; None: TFDS's default.
        split: such as "train" or "train[:99%]", in TFDS's notation for every kind of source.
        class_names: of the training split; a folder's classes must be among them.

    Raises:
        UserError: dataset or split missing, or a folder that isn't laid out as it should be.
    """
    if not name:
        raise UserError("config.dataset.name is empty: name a TFDS dataset or a folder")
    folder = pathlib.Path(name).expanduser()
    if name == "digits":
        return open_digits(split)
    if folder.is_dir():
        if prepared := prepared_datasets(folder):
            if len(prepared) > 1:
                raise UserError(f"{folder} holds several datasets: name one of {prepared}")
            return open_tfds(tfds.builder_from_directory(prepared[0]), split)
        return open_folder(folder, split, class_names)
    if folder.is_absolute() or name.startswith((".", "~")):
        raise UserError(f"config.dataset.name={name}: there is no such folder")
    return open_tfds(find_tfds(name, data_dir), split)


def prepared_datasets(folder: pathlib.Path) -> list[str]:
    """What TFDS wrote in a folder: itself, its <version>/ or <config>/<version>/ folders."""
    found = (folder.glob(f"{depth}dataset_info.json") for depth in ("", "*/", "*/*/"))
    return sorted(str(path.parent) for paths in found for path in paths)


def open_digits(split: str) -> RandomAccess:
    """scikit-learn's 1,797 handwritten digits, 8x8 and grey.

    Splits "train" and "test"; of each class every fifth image is for testing.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # (1797, 8, 8, 1)
    testing = np.zeros(len(pixels), bool)
    for digit in range(10):
        testing[np.flatnonzero(digits.target == digit)[4::5]] = True
    rows = {"train": np.flatnonzero(~testing), "test": np.flatnonzero(testing)}
    rows = select(split, rows, "the embedded digits")
    images = tf.constant([tf.io.encode_png(image).numpy() for image in pixels[rows]])
    labels = tf.constant(digits.target[rows], tf.int64)
    return RandomAccess(
        name=f"digits, split {split}",
        num_examples=len(rows),
        class_names=tuple(str(name) for name in digits.target_names),
        describe=lambda i: f"digit {rows[i]} of scikit-learn's",
        read=lambda i: (images[i], labels[i]),
    )


def open_folder(root: pathlib.Path, split: str, class_names) -> RandomAccess:
    """A folder of `<split>/<class>/*.jpg|png`, the classes sorted by name.

    Files stand in an order drawn from a hash of their names, so that a sub-split such as
    `train[:90%]` holds every class.
    """
    splits = sorted(path.name for path in root.iterdir() if path.is_dir())
    needed = [part.split("[")[0].strip() for part in split.split("+")]
    for part in needed:
        if part not in splits:
            raise UserError(
                f"{root} has no split {part!r}: expected {root}/{part}/<class>/*.jpg|png, "
                f"found the folders {', '.join(splits) or 'none'}"
            )
    found = {part: list_classes(root / part) for part in needed}
    classes = tuple(class_names or sorted(set().union(*found.values())))
    files = {}
    for part, by_class in found.items():
        if strange := sorted(set(by_class) - set(classes)):
            raise UserError(
                f"{root / part} has classes that the training split lacks: {', '.join(strange)}"
            )
        paths = [(path, classes.index(c)) for c, paths in by_class.items() for path in paths]
        paths.sort(key=lambda pair: hashlib.md5(str(pair[0].relative_to(root)).encode()).digest())
        files[part] = paths
    chosen = select(split, files, str(root))
    paths = tf.constant([str(path) for path, _ in chosen])
    labels = tf.constant([label for _, label in chosen], tf.int64)
    return RandomAccess(
        name=f"{root}, split {split}",
        num_examples=len(chosen),
        class_names=classes,
        describe=lambda i: str(chosen[i][0]),
        read=lambda i: (tf.io.read_file(paths[i]), labels[i]),
    )


def list_classes(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Class name -> its image files. UserError for no classes at all, or a class without images."""
    found, ignored = {}, []
    for class_folder in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = [path for path in class_folder.rglob("*") if path.is_file()]
        images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
        ignored += [path for path in files if path.suffix.lower() not in IMAGE_SUFFIXES]
        if not images:
            raise UserError(f"{class_folder} holds no image: expected *.jpg, *.jpeg or *.png")
        found[class_folder.name] = images
    if not found:
        raise UserError(
            f"{folder} holds no class folders: expected {folder}/<class>/*.jpg|png, "
            f"found {len(list(folder.iterdir()))} files"
        )
    if ignored:
        logger.warning(f"{folder}: ignoring {len(ignored)} files that are no images: {ignored[0]}")
    return found


def find_tfds(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """The builder of a dataset that TFDS knows and has prepared on this machine."""
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (ValueError, AssertionError):  # an unknown name, config or version; no name at all
        raise UserError(
            f"config.dataset.name={name} is neither a folder here nor a dataset TFDS knows: "
            "see tensorflow.org/datasets/catalog"
        ) from None
    if not builder.info.splits:
        folder = pathlib.Path(builder.data_dir)  # <data_dir>/<name>[/<config>]/<version>
        data_dir = folder.parents[len(builder.info.full_name.split("/")) - 1]
        others = sorted(path.parent.name for path in folder.parent.glob("*/dataset_info.json"))
        versions = f" (only version {', '.join(others)}: name it as {name}:VERSION)"
        raise UserError(
            f"Dataset {name} was looked for in {folder} and isn't there"
            f"{versions if others else ''}. Prepare it with `tfds build {name} "
            f"--data_dir={data_dir}`; or say where it is with --config.dataset.data_dir=; or train "
            "on other images with --config.dataset.name=FOLDER (of <split>/<class>/*.jpg); or try "
            "the code on the embedded digits with :quick after the config's name"
        )
    return builder


def open_tfds(builder: tfds.core.DatasetBuilder, split: str) -> Source:
    """A split of a prepared TFDS dataset that has an `image` and a `label`."""
    info = builder.info
    if not {"image", "label"} <= set(info.features):
        raise UserError(
            f"Dataset {info.full_name} has the features {', '.join(info.features)}: "
            "`image` and `label` are needed"
        )
    if not isinstance(info.features["label"], tfds.features.ClassLabel):
        kind = type(info.features["label"]).__name__
        raise UserError(f"The label of dataset {info.full_name} is a {kind}, not a ClassLabel")
    try:
        instructions = info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        raise UserError(unknown_split(split, info.full_name, error)) from None
    num_examples = sum(number_to_take(part) for part in instructions)
    if not num_examples:
        raise UserError(f"Split {split!r} of {info.full_name} is empty")
    common = dict(
        name=f"{info.full_name}, split {split}",
        num_examples=num_examples,
        class_names=tuple(info.features["label"].names),
        describe=lambda i: f"example {i} of {info.full_name}, split {split}",
    )
    decoders = {"image": tfds.decode.SkipDecoding()}

    def parse(record):
        example = info.features.deserialize_example(record, decoders=decoders)
        return example["image"], tf.cast(example["label"], tf.int64)

    if info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        raw = tfds.core.decode.DeserializeMethod.RAW_BYTES
        records = builder.as_data_source(split, deserialize_method=raw)

        def read(index):
            record = tf.numpy_function(records.__getitem__, [index], tf.string, stateful=False)
            return parse(tf.ensure_shape(record, ()))

        return RandomAccess(**common, read=read)
    files = tuple((part.filename, part.skip, number_to_take(part)) for part in instructions)
    return RecordFiles(**common, files=files, parse=parse)


def number_to_take(part) -> int:
    """The records that one of TFDS's file instructions stands for; -1 there means the rest."""
    return part.take if part.take >= 0 else part.examples_in_shard - part.skip


def select(split: str, parts: dict[str, Sequence], what: str) -> list:
    """The items of `parts` that a split in TFDS's notation names: "train[:99%]", "train+test"."""
    sizes = {name: types.SimpleNamespace(num_examples=len(p)) for name, p in parts.items()}
    try:
        ranges = tfds.core.ReadInstruction.from_spec(split).to_absolute(sizes)
    except ValueError as error:
        raise UserError(unknown_split(split, what, error)) from None
    chosen = [item for part in ranges for item in parts[part.splitname][part.from_ : part.to]]
    if not chosen:
        raise UserError(f"Split {split!r} of {what} is empty")
    return chosen


def unknown_split(split: str, what: str, error: Exception) -> str:
    words = " ".join(str(error).split())
    return f"Split {split!r} of {what} can't be read: {words.strip(chr(39) + chr(34))}"
