"""Where examples come from: the embedded digits, a folder of images, or a TFDS dataset.

`open_source` gives a `Source`: how many examples, which classes, and tf.data access to the
encoded images. A source that can be read at any index is `RandomAccess`; TFRecord files are
`RecordFiles`, read from front to back.
"""

import dataclasses
import functools
import hashlib
import logging
import os
import pathlib
import types
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from vit_jax.errors import UserError

logger = logging.getLogger("vit_jax")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One split of a dataset.

    name: for messages. class_names: in the order of the integer labels. describe: the index of
    an example -> what a person would look for, such as its path. fetch: an example's handle, which
    the kinds of sources give -> (encoded image, label), as TensorFlow operations. damaged: indices
    of examples that were skipped, filled as they are met.
    """

    name: str
    num_examples: int
    class_names: tuple[str, ...]
    describe: Callable[[int], str]
    fetch: Callable
    damaged: set[int] = dataclasses.field(default_factory=set)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomAccess(Source):
    """An example's handle is its index."""

    def in_order(self, first: int, last: int, tolerant: bool = False) -> tf.data.Dataset:
        """(index, handle) of the examples first .. last - 1."""
        return tf.data.Dataset.range(first, last).map(lambda index: (index, index))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordFiles(Source):
    """An example's handle is its serialized record.

    files: (path, records to skip, to take), in order. num_bytes: of all records, about.

    What a file lacks counts as empty records; where methods are `tolerant`, so does what can't be
    read of it.
    """

    files: tuple[tuple[str, int, int], ...]
    num_bytes: int

    def in_order(self, first: int, last: int, tolerant: bool = False) -> tf.data.Dataset:
        """(index, handle) of the examples first .. last - 1."""
        files = tf.data.Dataset.from_tensor_slices(self.clipped(first, last))
        return files.flat_map(functools.partial(read_file, tolerant=tolerant))

    def shuffled(
        self, first: int, last: int, seed, epoch, buffer_size: int, tolerant: bool = False
    ) -> tf.data.Dataset:
        """The same in an order drawn from (seed, epoch).

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
            functools.partial(read_file, tolerant=tolerant),
            cycle_length=16,
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )
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

    def in_memory(self, tolerant: bool = False) -> RandomAccess:
        """The same examples, read now and held encoded."""
        handles = self.in_order(0, self.num_examples, tolerant).map(lambda _, record: record)
        records = handles.batch(self.num_examples).get_single_element()
        common = {field.name: getattr(self, field.name) for field in dataclasses.fields(Source)}
        return RandomAccess(**common | {"fetch": lambda index: self.fetch(records[index])})


def read_file(path, start, skip, take, *, tolerant: bool) -> tf.data.Dataset:
    """(index, record) of a TFRecord file's records skip .. skip + take - 1, empty past its end."""
    # A file that isn't there would fail again and again.
    paths = tf.data.Dataset.from_tensor_slices(tf.io.matching_files(path) if tolerant else [path])
    records = paths.flat_map(lambda path: tf.data.TFRecordDataset(path, buffer_size=8 << 20))
    records = records.ignore_errors() if tolerant else records
    missing = tf.data.Dataset.from_tensors("").repeat(take)
    return records.skip(skip).concatenate(missing).take(take).enumerate(start)


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
    parts = {"train": np.flatnonzero(~testing), "test": np.flatnonzero(testing)}
    rows = select(split, parts, "the embedded digits")
    images = tf.constant([tf.io.encode_png(image).numpy() for image in pixels[rows]])
    labels = tf.constant(digits.target[rows], tf.int64)
    return RandomAccess(
        name=f"digits, split {split}",
        num_examples=len(rows),
        class_names=tuple(str(name) for name in digits.target_names),
        describe=lambda i: f"digit {rows[i]} of scikit-learn's",
        fetch=lambda i: (images[i], labels[i]),
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
    for part, by_class in found.items():
        if strange := sorted(set(by_class) - set(classes)):
            raise UserError(
                f"{root / part} has classes that the training split lacks: {', '.join(strange)}"
            )
    # Arrays, not objects: there may be millions of files.
    folders = [(part, name) for part, by_class in found.items() for name in by_class]
    files = np.concatenate([found[part][name] for part, name in folders])
    folder_of = np.repeat(np.arange(len(folders)), [len(found[p][name]) for p, name in folders])
    folder_paths = [os.fsencode(f"{part}/{name}/") for part, name in folders]
    keys = (hash_key(folder_paths[i] + file) for i, file in zip(folder_of, files, strict=True))
    order = np.argsort(np.fromiter(keys, np.uint64, len(files)), kind="stable")
    in_part = np.array([part for part, _ in folders])[folder_of[order]]
    chosen = select(split, {part: order[in_part == part] for part in needed}, str(root))

    files, folder_of = tf.constant(files[chosen]), tf.constant(folder_of[chosen])
    folder_paths = tf.constant(folder_paths)
    labels = tf.constant([classes.index(name) for _, name in folders], tf.int64)

    def path(index):
        return tf.strings.join([f"{root}/", folder_paths[folder_of[index]], files[index]])

    return RandomAccess(
        name=f"{root}, split {split}",
        num_examples=len(chosen),
        class_names=classes,
        describe=lambda index: os.fsdecode(path(index).numpy()),
        fetch=lambda index: (tf.io.read_file(path(index)), labels[folder_of[index]]),
    )


def open_files(paths: Sequence[str]) -> RandomAccess:
    """Images without labels: files, and all of a folder's. The label is -1.

    Raises:
        UserError: a folder without images.
    """
    files = []
    for path in map(pathlib.Path, paths):
        found = [path]
        if path.is_dir():
            found = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise UserError(f"{path} holds no image: expected *.jpg, *.jpeg or *.png")
        files += map(str, found)
    names = tf.constant(files)
    return RandomAccess(
        name="the images given",
        num_examples=len(files),
        class_names=(),
        describe=lambda index: files[index],
        fetch=lambda index: (tf.io.read_file(names[index]), tf.constant(-1, tf.int64)),
    )


def hash_key(path: bytes) -> int:
    return int.from_bytes(hashlib.md5(path).digest()[:8], "big")


def list_classes(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Class name -> paths of its images below the class's folder, as bytes.

    Raises:
        UserError: no classes at all, or a class without images.
    """
    found, ignored = {}, []
    for name in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()):
        images = []
        for parent, _, files in os.walk(folder / name):
            below = os.path.relpath(parent, folder / name)
            for file in files if below == "." else (f"{below}/{file}" for file in files):
                is_image = os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES
                (images if is_image else ignored).append(file)
        if not images:
            raise UserError(f"{folder / name} holds no image: expected *.jpg, *.jpeg or *.png")
        found[name] = np.array([os.fsencode(file) for file in images])
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


def count_classes(name: str, data_dir: str | None, split: str) -> int:
    """Of a dataset, which needn't be prepared here where TFDS knows it by name.

    Raises:
        UserError: it is neither here nor known.
    """
    try:
        return open_source(name, data_dir, split).num_classes
    except UserError as error:
        try:
            return tfds.builder(name).info.features["label"].num_classes
        except Exception:  # TFDS raises many kinds for what it doesn't know
            raise UserError(f"{error}. Or set --config.num_classes") from None


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
    array_record = tfds.core.FileFormat.ARRAY_RECORD
    if array_record in info.available_file_formats():  # maybe beside TFRecord files
        info.set_file_format(array_record, override=True, override_if_initialized=True)
    files = files_of_split(info, split)
    ends = np.cumsum([take for _, _, take in files])
    num_examples = int(ends[-1])

    def describe(index):
        path, _, _ = files[np.searchsorted(ends, index, side="right")]
        return f"example {index} of {info.full_name}, split {split}, in {path}"

    common = dict(
        name=f"{info.full_name}, split {split}",
        num_examples=num_examples,
        class_names=tuple(info.features["label"].names),
        describe=describe,
    )
    decoders = {"image": tfds.decode.SkipDecoding()}

    def parse(record):
        tf.debugging.Assert(record != "", ["the record is damaged or missing"])
        example = info.features.deserialize_example(record, decoders=decoders)
        return example["image"], tf.cast(example["label"], tf.int64)

    if info.file_format == array_record:
        raw = tfds.core.decode.DeserializeMethod.RAW_BYTES
        records = builder.as_data_source(split, deserialize_method=raw)

        def read(index):
            try:
                return records[index]
            except (RuntimeError, ValueError, IndexError, OSError):  # what its reader raises
                return b""

        def fetch(index):
            record = tf.numpy_function(read, [index], tf.string, stateful=False)
            return parse(tf.ensure_shape(record, ()))

        return RandomAccess(**common, fetch=fetch)
    mean_bytes = info.dataset_size / sum(part.num_examples for part in info.splits.values())
    num_bytes = round(mean_bytes * num_examples)
    return RecordFiles(**common, fetch=parse, files=files, num_bytes=num_bytes)


def files_of_split(info, split: str) -> tuple[tuple[str, int, int], ...]:
    """(path, records to skip, to take) of the files that hold a split. UserError if none do."""
    try:
        instructions = info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        raise UserError(unknown_split(split, info.full_name, error)) from None
    files = tuple((part.filename, part.skip, number_to_take(part)) for part in instructions)
    if not sum(take for _, _, take in files):
        raise UserError(f"Split {split!r} of {info.full_name} is empty")
    present = {path.name for path in epath.Path(files[0][0]).parent.iterdir()}
    if missing := [path for path, _, _ in files if epath.Path(path).name not in present]:
        raise UserError(
            f"{info.full_name}, split {split}: {len(missing)} of {len(files)} files are missing, "
            f"the first {missing[0]}. Prepare the dataset anew"
        )
    return files


def number_to_take(part) -> int:
    """The records that one of TFDS's file instructions stands for; -1 there means the rest."""
    return part.take if part.take >= 0 else part.examples_in_shard - part.skip


def select(split: str, parts: dict[str, np.ndarray], what: str) -> np.ndarray:
    """The items of `parts` that a split in TFDS's notation names: "train[:99%]", "train+test"."""
    sizes = {name: types.SimpleNamespace(num_examples=len(p)) for name, p in parts.items()}
    try:
        ranges = tfds.core.ReadInstruction.from_spec(split).to_absolute(sizes)
    except ValueError as error:
        raise UserError(unknown_split(split, what, error)) from None
    chosen = np.concatenate([parts[part.splitname][part.from_ : part.to] for part in ranges])
    if not len(chosen):
        raise UserError(f"Split {split!r} of {what} is empty")
    return chosen


def unknown_split(split: str, what: str, error: Exception) -> str:
    words = " ".join(str(error).split())
    return f"Split {split!r} of {what} can't be read: {words.strip(chr(39) + chr(34))}"
