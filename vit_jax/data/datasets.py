"""Opens a dataset by its name: the embedded digits, a folder of images, or a TFDS dataset."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from vit_jax.data import tf, tfds
from vit_jax.data.folders import open_folder
from vit_jax.data.sources import (
    RandomAccess,
    RecordFiles,
    Source,
    select_split,
    split_error,
    split_ranges,
)
from vit_jax.errors import UserError, first_line
from vit_jax.storage import buckets
from vit_jax.storage.files import open_path

# The feature of TFDS's imagenet2012_real, the reassessed labels of arXiv:2006.07159.
SETS_OF_LABELS = "real_label"
MAX_LABELS = 32


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
        split: such as "train" or "train[:99%]", in TFDS's notation for every kind of dataset.
        class_names: of the training split, whose labels number them; a folder's classes must be
            among them, and the classes of other datasets must be the same.

    Raises:
        UserError: the dataset or split is missing, a folder isn't laid out as above, or the
            classes differ.
    """
    source = open_any_source(name, data_dir, split, class_names)
    if class_names is not None and tuple(source.class_names) != tuple(class_names):
        raise UserError(
            f"{source.name} numbers its {source.num_classes} classes differently from the training "
            f"set, which has {len(class_names)}: its labels would mean other classes"
        )
    return source


def open_any_source(name, data_dir, split, class_names) -> Source:
    """Opens one split of a dataset; see `open_source`."""
    if not name:
        raise UserError("config.dataset.name is empty; it must be a TFDS dataset or a folder")
    if name == "digits":
        return open_digits(split)
    in_bucket = buckets.is_bucket(name)
    folder = open_path(name) if in_bucket else pathlib.Path(name).expanduser()
    if in_bucket and not folder.is_dir():
        raise UserError(f"config.dataset.name is {name!r}, but there is no such folder")
    if folder.is_dir():
        prepared = find_prepared(folder)
        if len(prepared) > 1:
            raise UserError(
                f"{folder} has several datasets; set config.dataset.name to one of {prepared}"
            )
        if prepared:
            return open_tfds(read_prepared(prepared[0]), split)
        if (folder / "features.json").exists():
            raise UserError(
                f"{folder} is a prepared TFDS dataset without its dataset_info.json: copy the "
                "whole folder, or prepare it again"
            )
        return open_folder(folder, split, class_names)
    if folder.is_absolute() or name.startswith((".", "~")):
        raise UserError(f"config.dataset.name is {name!r}, but there is no such folder")
    data_dir = data_dir and os.path.expanduser(data_dir)
    return open_tfds(find_tfds(name, data_dir), split)


def count_classes(name: str, data_dir: str | None, split: str) -> int:
    """Returns the number of classes of a dataset; a dataset of TFDS needn't be prepared.

    Raises:
        UserError: it is neither on this machine nor known to TFDS.
    """
    try:
        return open_source(name, data_dir, split).num_classes
    except UserError as error:
        try:
            return tfds.builder(name).info.features["label"].num_classes
        except Exception:  # TFDS raises many kinds for names it doesn't know
            raise UserError(f"{error}. Or set --config.num_classes") from None


def open_digits(split: str) -> RandomAccess:
    """Opens scikit-learn's 1,797 handwritten digits, gray images of 8x8 pixels.

    The splits are "train" and "test"; every fifth image of each class is in "test".
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # (1797, 8, 8, 1)
    is_test = np.zeros(len(pixels), bool)
    for digit in range(10):
        is_test[np.flatnonzero(digits.target == digit)[4::5]] = True
    whole_splits = {"train": np.flatnonzero(~is_test), "test": np.flatnonzero(is_test)}
    rows, ranges = select_split(split, whole_splits, "the embedded digits")
    images = tf.constant([tf.io.encode_png(image).numpy() for image in pixels[rows]])
    labels = tf.constant(digits.target[rows], tf.int64)
    return RandomAccess(
        name=f"digits, split {split}",
        num_examples=len(rows),
        class_names=tuple(str(name) for name in digits.target_names),
        describe=lambda index: f"digit {rows[index]} of scikit-learn's",
        fetch=lambda index: (images[index], labels[index]),
        ranges=ranges,
    )


def find_prepared(folder: pathlib.Path) -> list[str]:
    """Returns the prepared TFDS datasets in a folder: it, <version>/ or <config>/<version>/.

    In a bucket, where a pattern would list every file, only the folder itself counts.
    """
    if buckets.is_bucket(folder):
        return [str(folder)] if (folder / "dataset_info.json").exists() else []
    files = (folder.glob(f"{depth}dataset_info.json") for depth in ("", "*/", "*/*/"))
    return sorted(str(path.parent) for paths in files for path in paths)


def read_prepared(folder: str) -> tfds.core.DatasetBuilder:
    """Returns the builder of a prepared dataset.

    Raises:
        UserError: its description is damaged.
    """
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # of many kinds, for damaged or missing JSON files
        raise UserError(
            f"{folder} can't be read as a TFDS dataset: {first_line(error)}; prepare it again"
        ) from None


def check_data_dir(data_dir: str | None) -> None:
    """Raises UserError if the folder of TFDS's datasets is named, and doesn't exist."""
    if data_dir and "://" not in data_dir and not pathlib.Path(data_dir).is_dir():
        raise UserError(f"config.dataset.data_dir is {data_dir!r}, but there is no such folder")


def find_tfds(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """Returns the builder of a dataset that TFDS knows and has prepared on this machine.

    Raises:
        UserError: TFDS doesn't know it, or it isn't prepared.
    """
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (ValueError, AssertionError):  # an unknown name, config or version; not a name at all
        check_data_dir(data_dir)
        raise UserError(
            f"config.dataset.name is {name!r}, which is neither a folder nor a dataset that TFDS "
            "knows: see tensorflow.org/datasets/catalog"
        ) from None
    if not builder.info.splits:
        raise UserError(not_prepared(name, builder))
    return builder


def not_prepared(name: str, builder: tfds.core.DatasetBuilder) -> str:
    """Returns the message for a dataset that TFDS knows but hasn't prepared."""
    folder = pathlib.Path(builder.data_dir)  # <data_dir>/<name>[/<config>]/<version>
    data_dir = folder.parents[len(builder.info.full_name.split("/")) - 1]
    others = sorted(path.parent.name for path in folder.parent.glob("*/dataset_info.json"))
    versions = f" (found only version {', '.join(others)}: name it as {name}:VERSION)"
    return (
        f"Dataset {name} isn't prepared: there is no {folder}{versions if others else ''}. "
        f"Prepare it with `tfds build {name} --data_dir={data_dir}`, or set "
        "--config.dataset.data_dir= (evaluate.py --workdir: --data_dir=) to the folder that it is "
        "in, or train on your own images with "
        "--config.dataset.name=FOLDER (<split>/<class>/*.jpg), or try the code on the embedded "
        "digits with :quick after the preset's name"
    )


def open_tfds(builder: tfds.core.DatasetBuilder, split: str) -> Source:
    """Opens a split of a prepared TFDS dataset.

    Raises:
        UserError: it isn't a classification dataset, or the split or its files are missing.
    """
    info = builder.info
    check_features(info)
    has_sets = SETS_OF_LABELS in info.features
    label = info.features[SETS_OF_LABELS].feature if has_sets else info.features["label"]
    array_record = tfds.core.FileFormat.ARRAY_RECORD
    if array_record in info.available_file_formats():  # maybe beside TFRecord files
        info.set_file_format(array_record, override=True, override_if_initialized=True)
    files = split_files(info, split)
    ends = np.cumsum([take for _, _, take in files])
    num_examples = int(ends[-1])

    def describe(index):
        path, _, _ = files[np.searchsorted(ends, index, side="right")]
        return f"example {index} of {info.full_name}, split {split}, in {path}"

    common = dict(
        name=f"{info.full_name}, split {split}",
        num_examples=num_examples,
        class_names=tuple(label.names),
        max_labels=MAX_LABELS if has_sets else None,
        describe=describe,
        fingerprint=f"{info.full_name}, {num_examples} examples",
        ranges=split_ranges(
            split, {name: part.num_examples for name, part in info.splits.items()}, info.full_name
        ),
    )
    common["fetch"] = record_parser(info.features)
    if info.file_format == array_record:
        return RandomAccess(**common, read=array_record_reader(builder, split))
    mean_bytes = info.dataset_size / sum(part.num_examples for part in info.splits.values())
    return RecordFiles(**common, files=files, num_bytes=round(mean_bytes * num_examples))


def check_features(info: tfds.core.DatasetInfo) -> None:
    """Raises UserError if a dataset has no images with class labels."""
    has_sets = SETS_OF_LABELS in info.features
    if "image" not in info.features or not (has_sets or "label" in info.features):
        raise UserError(
            f"Dataset {info.full_name} has the features {', '.join(info.features)}; it must have "
            "`image` and `label`"
        )
    image = info.features["image"]
    if not isinstance(image, tfds.features.Image) or np.dtype(image.np_dtype).itemsize > 2:
        raise UserError(
            f"The image of dataset {info.full_name} is {image!r}; it must be a tfds.features.Image "
            "of uint8 or uint16"
        )
    if not has_sets and not isinstance(info.features["label"], tfds.features.ClassLabel):
        kind = type(info.features["label"]).__name__
        raise UserError(
            f"The label of dataset {info.full_name} is a {kind}; it must be a ClassLabel"
        )


def is_reversed(split: str, info: tfds.core.DatasetInfo) -> bool:
    """Whether a part of a split ends before it begins, as in "train[10:5]"; TFDS reads some."""
    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(info.splits)
    return any(part.to is not None and part.to < (part.from_ or 0) for part in parts)


def split_files(info: tfds.core.DatasetInfo, split: str) -> tuple[tuple[str, int, int], ...]:
    """Returns (path, records to skip, records to take) of the files of a split.

    Raises:
        UserError: the split is unknown or empty, or files are missing.
    """
    try:
        instructions = info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        raise UserError(split_error(split, info.full_name, error)) from None
    files = tuple((part.filename, part.skip, num_records(part)) for part in instructions)
    if is_reversed(split, info) or not sum(take for _, _, take in files):
        raise UserError(f"Split {split!r} of {info.full_name} is empty")
    present = {path.name for path in epath.Path(files[0][0]).parent.iterdir()}
    if missing := [path for path, _, _ in files if epath.Path(path).name not in present]:
        raise UserError(
            f"{info.full_name}, split {split}: {len(missing)} of {len(files)} files are missing, "
            f"the first {missing[0]}; prepare the dataset again"
        )
    return files


def num_records(part) -> int:
    """Returns how many records a file instruction of TFDS takes; its -1 means the rest."""
    return part.take if part.take >= 0 else part.examples_in_shard - part.skip


def record_parser(features: tfds.features.FeaturesDict) -> Callable:
    """Returns the function from a serialized record to (encoded image, label)."""
    decoders = {"image": tfds.decode.SkipDecoding()}

    def parse(record):
        tf.debugging.Assert(record != "", ["the record is corrupt or missing"])
        example = features.deserialize_example(record, decoders=decoders)
        if SETS_OF_LABELS not in features:
            return example["image"], tf.cast(example["label"], tf.int64)
        labels = tf.cast(example[SETS_OF_LABELS], tf.int64)
        padding = [[0, MAX_LABELS - tf.shape(labels)[0]]]  # more labels are an error
        padded = tf.pad(labels, padding, constant_values=-1)
        return example["image"], tf.ensure_shape(padded, (MAX_LABELS,))

    return parse


def array_record_reader(builder: tfds.core.DatasetBuilder, split: str) -> Callable:
    """Returns the function from indices (k,) into ArrayRecord files to serialized records (k,).

    A record that can't be read is empty. Each call takes Python's lock, so reading many records
    a call is several times as fast as one. `records.__getitems__` would start threads each time.
    """
    raw = tfds.core.decode.DeserializeMethod.RAW_BYTES
    records = builder.as_data_source(split, deserialize_method=raw)

    def read(index):
        try:
            return records[index]
        except (RuntimeError, ValueError, IndexError, OSError):  # what the reader raises
            return b""

    def read_many(indices):
        return np.array([read(index) for index in indices], object)

    def handles(indices):
        found = tf.numpy_function(read_many, [indices], tf.string, stateful=False)
        return tf.ensure_shape(found, indices.shape)

    return handles
