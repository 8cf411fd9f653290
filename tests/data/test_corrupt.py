"""Corrupt examples: named in the error, or skipped and counted."""

import pathlib
import shutil

import numpy as np
import pytest
from batches import assert_same, take, views
from datasets import make_pngs, picture
from PIL import Image

import input_pipeline
from input_pipeline import eval_batches, open_source, train_batches
from vit_jax.errors import UserError


def both_batches(source, config):
    return train_batches(source, config), eval_batches(source, config)


def corrupt_tfrecord(path: pathlib.Path, record: int) -> None:
    """Changes a byte in the middle of a record, so that its checksum is wrong."""
    content = bytearray(path.read_bytes())
    content[record_offset(content, record) + 50] ^= 255
    path.write_bytes(content)


def record_offset(content: bytes, record: int) -> int:
    """Returns where a record of a TFRecord file starts."""
    offset = 0
    for _ in range(record):
        offset += 16 + int.from_bytes(content[offset : offset + 8], "little")
    return offset


def corrupt_array_record(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    path.write_bytes(content)


@pytest.fixture
def copied(tmp_path, tfds_folders):
    """Copies a TFDS dataset of 53 examples; returns its folder and the third of five files."""

    def copy(kind):
        folder = shutil.copytree(tfds_folders[kind], tmp_path / "pictures" / "1.0.0")
        return str(folder), next(folder.glob("*-train.*-00002-of-00005"))

    return copy


@pytest.fixture(params=["folder", "tfrecord", "in_memory", "array_record"])
def corrupt_source(request, tmp_path, copied):
    """A source of 53 examples, and the indices of those that are corrupt."""
    if request.param == "folder":
        make_pngs(tmp_path / "train" / "cat", 53)
        (tmp_path / "train" / "cat" / "17.png").write_text("not an image")
        source = open_source(str(tmp_path), None, "train")
        return source, {i for i in range(53) if source.describe(i).endswith("/17.png")}
    folder, path = copied("array_record" if request.param == "array_record" else "tfrecord")
    # Its first record has index 21, and it has 11 records.
    if request.param == "array_record":
        corrupt_array_record(path)
        return open_source(folder, None, "train"), {21, 22}
    corrupt_tfrecord(path, record=4)
    source = open_source(folder, None, "train")
    if request.param == "in_memory":
        source = source.read_into_memory(ignore_errors=True)
    return source, set(range(21 + 4, 32))  # all records after the corrupt one are lost


def test_corrupt_examples_are_skipped_and_logged(corrupt_source, plain, caplog):
    """Others keep their steps; each corrupt example is named once, and all are counted."""
    source, corrupt = corrupt_source
    plain.dataset.on_error = "skip"
    batches = take(train_batches(source, plain), 20)
    assert source.corrupt == corrupt
    named = [r.message for r in caplog.records if r.message.startswith("Skipping")]
    assert sorted(named) == sorted(
        f"Skipping {source.describe(i)}: it isn't a JPEG or PNG that can be read" for i in corrupt
    )
    assert_same(take(train_batches(source, plain, first_step=9), 11), batches[9:])
    input_pipeline.report_corrupt(source)
    assert f"Skipped {len(corrupt)} of 53 examples of {source.name} as corrupt" in caplog.text
    blank = np.zeros((16, 16, 3), np.uint8).tobytes()
    assert blank not in views(batches)
    assert {batch["images"].shape for batch in batches} == {(8, 16, 16, 3)}


def test_a_corrupt_example_is_replaced_by_the_one_before_it(tmp_path, plain):
    """The rest of the batches is what it was before the example became corrupt."""
    make_pngs(tmp_path / "train" / "cat", 13)
    source = open_source(str(tmp_path), None, "train")
    before = views(take(train_batches(source, plain), 5))
    (tmp_path / "train" / "cat" / "7.png").write_text("not an image")
    plain.dataset.on_error = "skip"
    after = views(take(train_batches(source, plain), 5))
    changed = [i for i in range(39) if before[i] != after[i]]
    assert [i // 13 for i in changed] == [0, 1, 2]  # once an epoch
    assert len({before[i] for i in changed}) == 1
    for i in changed:
        assert i % 8 == 0 or after[i] == after[i - 1]


def test_corrupt_examples_do_not_count_in_evaluation(corrupt_source, plain):
    source, corrupt = corrupt_source
    plain.dataset.on_error = "skip"
    mask = np.concatenate([batch["mask"] for batch in eval_batches(source, plain)])
    assert set(np.flatnonzero(~mask[:53])) == corrupt
    assert not mask[53:].any()
    assert source.corrupt == corrupt


def test_a_batch_of_corrupt_examples_stops(tmp_path, data_config):
    make_pngs(tmp_path / "train" / "cat", 8)
    for path in (tmp_path / "train" / "cat").iterdir():
        path.write_text("not an image")
    data_config.dataset.on_error = "skip"
    source = open_source(str(tmp_path), None, "train")
    with pytest.raises(UserError, match="all examples of a batch are corrupt"):
        next(train_batches(source, data_config))


def test_a_file_that_is_not_an_image_is_named(tmp_path, data_config):
    make_pngs(tmp_path / "train" / "cat", 30)
    (tmp_path / "train" / "cat" / "17.png").write_text("not an image")
    source = open_source(str(tmp_path), None, "train")
    for batches in both_batches(source, data_config):
        with pytest.raises(UserError, match=r"cat/17\.png can't be decoded: .*on_error=skip"):
            take(batches, 8)
    (tmp_path / "train" / "cat" / "17.png").unlink()
    with pytest.raises(UserError, match=r"cat/17\.png can't be read: .*No such file"):
        take(train_batches(source, data_config), 8)


def test_a_truncated_jpeg_is_named(tmp_path, data_config):
    folder = tmp_path / "train" / "cat"
    folder.mkdir(parents=True)
    for i in range(8):
        Image.fromarray(picture(i)).save(folder / f"{i}.jpg")
    content = (folder / "3.jpg").read_bytes()
    (folder / "3.jpg").write_bytes(content[: len(content) // 4])
    source = open_source(str(tmp_path), None, "train")
    with pytest.raises(UserError, match=r"cat/3\.jpg can't be decoded"):
        take(train_batches(source, data_config), 4)


def test_a_corrupt_tfrecord_is_named(copied, data_config):
    folder, path = copied("tfrecord")
    corrupt_tfrecord(path, record=4)
    source = open_source(folder, None, "train")
    message = rf"example 25 of .*{path} can't be read: .*on_error=skip"
    for data_config.dataset.in_memory_mb in (0, 1000):
        with pytest.raises(UserError, match=message):
            take(train_batches(source, data_config), 8)
    with pytest.raises(UserError, match=message):
        take(eval_batches(source, data_config), 8)


def test_a_corrupt_array_record_file_is_named(copied, data_config):
    folder, path = copied("array_record")
    corrupt_array_record(path)
    source = open_source(folder, None, "train")
    for batches in both_batches(source, data_config):
        with pytest.raises(UserError, match=rf"{path} can't be read: the record is corrupt or"):
            take(batches, 8)


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_a_missing_file_is_named(copied, kind):
    folder, path = copied(kind)
    path.unlink()
    with pytest.raises(UserError, match=f"1 of 5 files are missing, the first {path}"):
        open_source(folder, None, "train")


@pytest.mark.slow
def test_a_file_truncated_between_records_is_named(copied, data_config):
    """It has fewer records than the metadata says; no other record takes a missing one's index."""
    folder, path = copied("tfrecord")
    content = path.read_bytes()
    path.write_bytes(content[: record_offset(content, 4)])
    source = open_source(folder, None, "train")
    for batches in both_batches(source, data_config):
        with pytest.raises(UserError, match=rf"example \d+ of .*{path} can't be read"):
            take(batches, 8)
    data_config.dataset.in_memory_mb = 1
    with pytest.raises(UserError, match=rf"example \d+ of .*{path} can't be read"):
        take(train_batches(source, data_config), 8)
    data_config.dataset.in_memory_mb = 0
    data_config.dataset.on_error = "skip"
    take(train_batches(source, data_config), 14)
    assert source.corrupt == set(range(25, 32))
