"""Datasets by their names: the digits, TFDS datasets, and names that can't be opened."""

import json
import logging
import pathlib
import shutil
import types

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

import input_pipeline
from configs import common
from input_pipeline import open_source
from vit_jax.data import datasets
from vit_jax.errors import UserError


def examples(source, first=0, last=None):
    """Returns the dataset of (encoded image, label), in order."""
    in_order = source.in_order(first, last or source.num_examples)
    return in_order.map(lambda _, handle: source.fetch(handle)).as_numpy_iterator()


def labels_in_order(source, first=0, last=None):
    return [int(label) for _, label in examples(source, first, last)]


def test_digits_splits():
    train, test = open_source("digits", None, "train"), open_source("digits", None, "test")
    assert (train.num_examples, test.num_examples) == (1442, 355)
    assert train.class_names == tuple("0123456789")
    assert np.bincount(labels_in_order(test)).min() >= 34
    train_images = {image for image, _ in examples(train)}
    # A few digits were drawn exactly alike.
    assert sum(image in train_images for image, _ in examples(test)) < 5


def test_digits_pixels():
    from sklearn.datasets import load_digits

    original = load_digits()
    images = {np.round(image * 255 / 16).astype(np.uint8).tobytes() for image in original.images}
    for encoded, _ in examples(open_source("digits", None, "test"), 0, 20):
        assert tf.io.decode_png(encoded).numpy()[..., 0].tobytes() in images


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_tfds(tfds_folders, kind):
    source = open_source(tfds_folders[kind], None, "train")
    random_access = kind == "array_record"
    assert isinstance(source, input_pipeline.RandomAccess) == random_access
    assert isinstance(source, input_pipeline.RecordFiles) != random_access
    assert source.num_examples == 53
    assert source.class_names == ("a", "b", "c")
    labels = labels_in_order(source)
    assert np.bincount(labels).tolist() == [18, 18, 17]
    part = open_source(tfds_folders[kind], None, "train[10:20]")
    assert part.num_examples == 10
    assert labels_in_order(part) == labels[10:20]
    assert labels_in_order(source, 13, 31) == labels[13:31]


def test_a_dataset_converted_in_place_is_read_as_array_record(tfds_folders, tmp_path):
    """As TFDS's convert_format leaves it: both kinds of files, and an entry in the metadata."""
    folder = shutil.copytree(tfds_folders["tfrecord"], tmp_path / "pictures" / "1.0.0")
    for path in pathlib.Path(tfds_folders["array_record"]).glob("*.array_record-*"):
        shutil.copy(path, folder)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["alternativeFileFormats"] = ["array_record"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    source = open_source(str(tmp_path / "pictures"), None, "train[5:30]")
    assert isinstance(source, input_pipeline.RandomAccess)
    assert ".array_record-" in source.describe(0)
    original = open_source(tfds_folders["array_record"], None, "train[5:30]")
    assert labels_in_order(source) == labels_in_order(original)


def error_message(*args) -> str:
    with pytest.raises(UserError) as raised:
        open_source(*args)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_missing_datasets(tmp_path):
    text = error_message("imagenet2012", str(tmp_path), "train")
    for part in (str(tmp_path / "imagenet2012"), "tfds build imagenet2012", ":quick", "FOLDER"):
        assert part in text
    text = error_message("imagenet2012_corrupted/gaussian_noise_1", str(tmp_path), "validation")
    assert f"--data_dir={tmp_path}`" in text  # for a dataset with configs too
    assert "there is no such folder" in error_message("/nowhere/images", None, "train")
    assert "is empty" in error_message("", None, "train")


@pytest.mark.parametrize(
    "name",
    ["cifra10", "my photos", "data/flowers/x/y", "imagenet2012/foo", "imagenet2012:9.9.9"],
)
def test_names_that_tfds_does_not_know(name):
    text = error_message(name, None, "train")
    assert "neither a folder nor a dataset that TFDS knows" in text


def test_missing_splits(image_folder, tfds_folders):
    text = error_message(str(image_folder), None, "valid")
    assert "no split 'valid'" in text
    assert "train, val" in text
    for name in (tfds_folders["tfrecord"], "digits"):
        assert "Split 'valid'" in error_message(name, None, "valid")
    for name in ("digits", str(image_folder), *tfds_folders.values()):
        assert "is empty" in error_message(name, None, "train[5:5]")
        for split in ("train[:foo]", "train[:200%]", ""):
            text = error_message(name, None, split)
            assert "can't be read" in text or "no split" in text


def test_a_prepared_dataset_without_its_description(tfds_folders, tmp_path):
    folder = shutil.copytree(tfds_folders["tfrecord"], tmp_path / "copy")
    (folder / "dataset_info.json").unlink()
    with pytest.raises(UserError, match="without its dataset_info.json"):
        open_source(str(folder), None, "train")


def test_several_datasets_in_one_folder(tmp_path):
    for version in ("1.0.0", "2.0.0"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "dataset_info.json").write_text("{}")
    text = error_message(str(tmp_path), None, "train")
    assert f"has several datasets; set config.dataset.name to one of ['{tmp_path}/1.0.0'" in text


def test_an_evaluation_set_with_other_classes_is_refused(tfds_folders):
    """Its labels would silently mean other classes."""
    source = open_source(tfds_folders["tfrecord"], None, "test", ("a", "b", "c"))
    assert source.class_names == ("a", "b", "c")
    for names in (("a", "c", "b"), ("a", "b")):
        with pytest.raises(UserError, match="numbers its 3 classes differently"):
            open_source(tfds_folders["tfrecord"], None, "test", names)
    with pytest.raises(UserError, match="numbers its 10 classes differently"):
        open_source("digits", None, "test", ("a", "b", "c"))


@pytest.mark.parametrize(
    ("train_split", "eval_split", "shared"),
    [
        ("train", "test", 0),
        ("train[:50%]", "train[50%:]", 0),
        ("train", "train", 53),
        ("train[:30]", "test+train[-25:]", 2),
    ],
)
def test_splits_that_overlap_are_told(tfds_folders, caplog, train_split, eval_split, shared):
    logging.getLogger("vit_jax").propagate = True
    dataset = common.get_config().dataset
    dataset.update(name=tfds_folders["tfrecord"], train_split=train_split, eval_split=eval_split)
    train_set, eval_set = input_pipeline.open_splits(dataset)
    assert train_set.num_shared(eval_set) == shared
    assert (f"{shared} of the" in caplog.text) == bool(shared)


def test_images_of_another_kind_are_refused():
    label = tfds.features.ClassLabel(num_classes=2)
    for image, kind in (
        (tfds.features.Tensor(shape=(8, 8, 3), dtype=np.uint8), "Tensor"),
        (tfds.features.Sequence(tfds.features.Image()), "Sequence"),
        (tfds.features.Image(shape=(8, 8, 1), dtype=np.float32), "Image"),
    ):
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        info = types.SimpleNamespace(features=features, full_name="pictures/1.0.0")
        with pytest.raises(UserError, match=f"The image of dataset pictures/1.0.0 is {kind}"):
            datasets.check_features(info)


def test_a_reversed_slice_is_empty(tfds_folders):
    for split in ("train[10:5]", "train[75%:25%]"):
        with pytest.raises(UserError, match="is empty"):
            open_source(tfds_folders["tfrecord"], None, split)


def test_fingerprints_tell_prepared_datasets_apart(tfds_folders, tmp_path):
    """By version, split and files, but not by place or format."""

    def fingerprint(folder, split="train"):
        return open_source(str(folder), None, split).fingerprint

    whole = fingerprint(tfds_folders["tfrecord"])
    assert whole.startswith("pictures/1.0.0, 53 examples in 5 files, ")
    assert fingerprint(tfds_folders["array_record"]) == whole
    moved = shutil.copytree(tfds_folders["tfrecord"], tmp_path / "pictures" / "1.0.0")
    assert fingerprint(moved) == whole
    halves = {fingerprint(moved, split) for split in ("train[:26]", "train[27:]", "test")}
    assert len(halves | {whole}) == 4
    # Prepared anew, with one example in another file.
    path = moved / "dataset_info.json"
    info = json.loads(path.read_text())
    (lengths,) = [part["shardLengths"] for part in info["splits"] if part["name"] == "train"]
    lengths[:2] = str(int(lengths[0]) + 1), str(int(lengths[1]) - 1)
    path.write_text(json.dumps(info))
    assert fingerprint(moved) not in {whole, *halves}
