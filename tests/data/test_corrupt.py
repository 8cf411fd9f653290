"""Images and records that can't be read: named, or skipped and counted."""

import pathlib

import datasets
import numpy as np
import pytest
from batches import assert_same, take, views
from datasets import make_pngs, picture
from PIL import Image

import input_pipeline
from input_pipeline import eval_batches, open_source, train_batches
from vit_jax.errors import UserError


def test_a_file_that_is_no_image_is_named(tmp_path, data_config):
    make_pngs(tmp_path / "train" / "cat", 30)
    (tmp_path / "train" / "cat" / "17.png").write_text("not an image")
    source = open_source(str(tmp_path), None, "train")
    for batches in (train_batches(source, data_config), eval_batches(source, data_config)):
        with pytest.raises(UserError, match=r"cat/17\.png can't be decoded"):
            take(batches, 8)
    (tmp_path / "train" / "cat" / "17.png").unlink()
    with pytest.raises(UserError, match=r"cat/17\.png can't be read: .*No such file"):
        take(train_batches(source, data_config), 8)


def test_a_truncated_jpeg_is_named(tmp_path, data_config):
    folder = tmp_path / "train" / "cat"
    folder.mkdir(parents=True)
    for i in range(8):
        Image.fromarray(picture(i)).save(folder / f"{i}.jpg")
    whole = (folder / "3.jpg").read_bytes()
    (folder / "3.jpg").write_bytes(whole[: len(whole) // 4])
    source = open_source(str(tmp_path), None, "train")
    with pytest.raises(UserError, match=r"cat/3\.jpg can't be decoded"):
        take(train_batches(source, data_config), 4)


@pytest.fixture(params=["folder", "tfrecord", "in_memory", "array_record"])
def damaged(request, tmp_path):
    """Sources of 53 examples with one that is no image; and which index that is."""
    if request.param == "folder":
        make_pngs(tmp_path / "train" / "cat", 53)
        (tmp_path / "train" / "cat" / "17.png").write_text("not an image")
        source = open_source(str(tmp_path), None, "train")
        names = [source.describe(i) for i in range(53)]
        return source, {i for i, name in enumerate(names) if name.endswith("/17.png")}
    kind = "array_record" if request.param == "array_record" else "tfrecord"
    folder = pathlib.Path(datasets.make_tfds_folder(tmp_path, kind))
    file = next(folder.glob("*-train.*-00002-of-00005"))
    if kind == "array_record":
        content = bytearray(file.read_bytes())
        content[200:400] = bytes(200)
        file.write_bytes(content)
        return open_source(str(folder), None, "train"), {21, 22}  # of its 11
    spoil_tfrecord(file, record=4)
    source = open_source(str(folder), None, "train")
    # 11 + 10 before this file; of its 11 records those from the spoiled one on are lost.
    lost = set(range(21 + 4, 32))
    return (source.in_memory(tolerant=True) if request.param == "in_memory" else source), lost


def spoil_tfrecord(path, record):
    """Changes a byte in the middle of a record: its checksum doesn't hold any more."""
    content, place = bytearray(path.read_bytes()), 0
    for _ in range(record):
        place += 16 + int.from_bytes(content[place : place + 8], "little")
    content[place + 50] ^= 255
    path.write_bytes(content)


def test_damaged_examples_are_skipped_and_told(damaged, plain, caplog):
    """Others keep their steps; the damaged ones are told by name once, and counted."""
    source, lost = damaged
    plain.dataset.on_error = "skip"
    whole = take(train_batches(source, plain), 20)
    assert source.damaged == lost
    named = [r.message for r in caplog.records if r.message.startswith("Skipping")]
    assert sorted(named) == sorted(
        f"Skipping {source.describe(i)}: it can't be read or decoded" for i in lost
    )
    assert_same(take(train_batches(source, plain, first_step=9), 11), whole[9:])
    input_pipeline.report_corrupt(source)
    assert f"Skipped {len(lost)} damaged of 53 examples of {source.name}" in caplog.text
    # Where nothing is damaged, a batch is what it would be without the damage.
    blank = np.zeros((16, 16, 3), np.uint8).tobytes()
    assert blank not in views(whole)
    assert {batch["images"].shape for batch in whole} == {(8, 16, 16, 3)}


def test_damaged_examples_do_not_count_in_evaluation(damaged, plain):
    source, lost = damaged
    plain.dataset.on_error = "skip"
    batches = list(eval_batches(source, plain))
    good = np.concatenate([batch["mask"] for batch in batches])
    assert set(np.flatnonzero(~good[:53])) == lost
    assert not good[53:].any()
    assert source.damaged == lost


def test_a_batch_of_damaged_examples_stops(tmp_path, data_config):
    for i in range(8):
        path = tmp_path / "train" / "cat" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not an image")
    data_config.dataset.on_error = "skip"
    source = open_source(str(tmp_path), None, "train")
    with pytest.raises(UserError, match="no example of a whole batch can be read"):
        next(train_batches(source, data_config))


def test_a_damaged_tfrecord_file_is_named(tmp_path, data_config):
    folder = pathlib.Path(datasets.make_tfds_folder(tmp_path, "tfrecord"))
    path = next(folder.glob("*-train.*-00002-of-00005"))
    spoil_tfrecord(path, record=4)
    source = open_source(str(folder), None, "train")
    for in_memory_mb in (0, 1000):
        data_config.dataset.in_memory_mb = in_memory_mb
        with pytest.raises(UserError, match=rf"example 25 of .*{path} can't be read: .*=skip"):
            take(train_batches(source, data_config), 8)
    with pytest.raises(UserError, match=rf"example 25 of .*{path} can't be read: .*=skip"):
        take(eval_batches(source, data_config), 8)


def test_a_damaged_array_record_file_is_named(tmp_path, data_config):
    folder = pathlib.Path(datasets.make_tfds_folder(tmp_path, "array_record"))
    path = next(folder.glob("*-train.*-00002-of-00005"))
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    path.write_bytes(content)
    source = open_source(str(folder), None, "train")
    for batches in (train_batches(source, data_config), eval_batches(source, data_config)):
        with pytest.raises(UserError, match=rf"{path} can't be read: the record is damaged or"):
            take(batches, 8)


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_a_missing_file_is_named(tmp_path, kind):
    folder = pathlib.Path(datasets.make_tfds_folder(tmp_path, kind))
    path = next(folder.glob("*-train.*-00002-of-00005"))
    path.unlink()
    with pytest.raises(UserError, match=f"1 of 5 files are missing, the first {path}"):
        open_source(str(folder), None, "train")


def test_a_file_cut_off_between_records_is_named(tmp_path, data_config):
    """Fewer records than the metadata says: none is taken for another."""
    folder = pathlib.Path(datasets.make_tfds_folder(tmp_path, "tfrecord"))
    path = next(folder.glob("*-train.*-00002-of-00005"))
    content, place = path.read_bytes(), 0
    for _ in range(4):
        place += 16 + int.from_bytes(content[place : place + 8], "little")
    path.write_bytes(content[:place])
    source = open_source(str(folder), None, "train")
    for in_memory_mb in (0, 1):
        data_config.dataset.in_memory_mb = in_memory_mb
        for batches in (train_batches(source, data_config), eval_batches(source, data_config)):
            with pytest.raises(UserError, match=rf"example \d+ of .*{path} can't be read"):
                take(batches, 8)
    data_config.dataset.on_error = "skip"
    take(train_batches(source, data_config), 14)
    assert source.damaged == set(range(25, 32))
