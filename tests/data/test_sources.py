"""Folders, TFDS datasets and the digits as sources of examples."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow as tf

import input_pipeline
from input_pipeline import open_source
from vit_jax.errors import UserError


def labels_in_order(source):
    return [int(label) for _, _, label in examples(source)]


def examples(source, first=0, last=None):
    """(index, encoded image, label) of each."""
    fetch = lambda index, handle: (index, *source.fetch(handle))  # noqa: E731
    return source.in_order(first, last or source.num_examples).map(fetch)


def test_digits_split():
    train, test = open_source("digits", None, "train"), open_source("digits", None, "test")
    assert (train.num_examples, test.num_examples) == (1442, 355)
    assert train.class_names == tuple("0123456789")
    seen = {bytes(image.numpy()) for _, image, _ in examples(train)}
    assert np.bincount(labels_in_order(test)).min() >= 34
    # Few of the test digits are drawn exactly alike in the training split.
    assert sum(bytes(image.numpy()) in seen for _, image, _ in examples(test)) < 5


def test_digits_pixels():
    from sklearn.datasets import load_digits

    original = load_digits()
    images = {np.round(image * 255 / 16).astype(np.uint8).tobytes() for image in original.images}
    for _, encoded, _ in examples(open_source("digits", None, "test"), 0, 20):
        assert tf.io.decode_png(encoded).numpy()[..., 0].tobytes() in images


def test_folder(image_folder):
    source = open_source(str(image_folder), None, "train")
    assert source.class_names == ("cat", "dog")
    assert source.num_examples == 20
    assert sorted(labels_in_order(source)) == [0] * 10 + [1] * 10
    for index, _, label in examples(source):
        assert source.class_names[int(label)] in source.describe(int(index))


def test_sub_splits_of_a_folder_are_parts_and_mixed(image_folder):
    whole = open_source(str(image_folder), None, "train")
    first = open_source(str(image_folder), None, "train[:60%]")
    rest = open_source(str(image_folder), None, "train[60%:]")
    assert (first.num_examples, rest.num_examples) == (12, 8)
    assert set(labels_in_order(first)) == {0, 1}
    names = [s.describe(i) for s in (first, rest) for i in range(s.num_examples)]
    assert names == [whole.describe(i) for i in range(20)]


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_tfds(tfds_folders, kind):
    source = open_source(tfds_folders[kind], None, "train")
    assert source.num_examples == 53
    assert source.class_names == ("a", "b", "c")
    assert np.bincount(labels_in_order(source)).tolist() == [18, 18, 17]
    part = open_source(tfds_folders[kind], None, "train[10:20]")
    assert part.num_examples == 10
    assert labels_in_order(part) == labels_in_order(source)[10:20]
    middle = [int(label) for _, _, label in examples(source, 13, 31)]
    assert middle == labels_in_order(source)[13:31]


def test_the_sources_are_what_they_are_named(tfds_folders, image_folder):
    assert isinstance(
        open_source(tfds_folders["tfrecord"], None, "train"), input_pipeline.RecordFiles
    )
    for name in (tfds_folders["array_record"], str(image_folder), "digits"):
        assert isinstance(open_source(name, None, "train"), input_pipeline.RandomAccess)


def test_a_dataset_converted_in_place_is_read_as_array_record(tfds_folders, tmp_path):
    """As TFDS's convert_format leaves it: both kinds of files, and a note in the metadata."""
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


def test_missing_datasets(tmp_path, image_folder, tfds_folders):
    def message(*args):
        with pytest.raises(UserError) as raised:
            open_source(*args)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    text = message("imagenet2012", str(tmp_path), "train")
    for part in (str(tmp_path / "imagenet2012"), "tfds build imagenet2012", ":quick", "FOLDER"):
        assert part in text
    assert "neither a folder here nor a dataset TFDS knows" in message("cifra10", None, "train")
    assert "no such folder" in message("/nowhere/images", None, "train")
    text = message(str(image_folder), None, "valid")
    assert "no split 'valid'" in text
    assert "train, val" in text
    for name in (tfds_folders["tfrecord"], "digits"):
        assert "Split 'valid'" in message(name, None, "valid")
    for name in ("digits", str(image_folder), *tfds_folders.values()):
        assert "is empty" in message(name, None, "train[5:5]")
        for split in ("train[:foo]", "train[:200%]", ""):
            assert "can't be read" in message(name, None, split) or "no split" in message(
                name, None, split
            )


@pytest.mark.parametrize(
    "name", ["my photos", "data/flowers/x/y", "imagenet2012/foo", "imagenet2012:9.9.9"]
)
def test_names_that_tfds_cannot_parse(name):
    with pytest.raises(UserError, match="neither a folder here nor a dataset TFDS knows"):
        open_source(name, None, "train")


def test_where_a_dataset_with_configs_would_be_prepared(tmp_path):
    with pytest.raises(UserError, match=rf"--data_dir={tmp_path}`"):
        open_source("imagenet2012_corrupted/gaussian_noise_1", str(tmp_path), "validation")


def test_several_datasets_in_one_folder(tmp_path):
    for version in ("1.0.0", "2.0.0"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="holds several datasets: name one of .*1.0.0.*2.0.0"):
        open_source(str(tmp_path), None, "train")


def test_folders_laid_out_wrongly(tmp_path):
    def make(*files):
        for file in files:
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")

    make("flat/train/a.jpg")
    with pytest.raises(UserError, match="train holds no class folders.*found 1 files"):
        open_source(str(tmp_path / "flat"), None, "train")
    make("hollow/train/cat/a.jpg", "hollow/train/dog/readme.txt")
    with pytest.raises(UserError, match="train/dog holds no image"):
        open_source(str(tmp_path / "hollow"), None, "train")
    make("odd/train/cat/a.jpg", "odd/val/cat/a.jpg", "odd/val/emu/a.jpg")
    with pytest.raises(UserError, match="val has classes that the training split lacks: emu"):
        open_source(str(tmp_path / "odd"), None, "val", ("cat",))
