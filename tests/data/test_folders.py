"""Folders of images as sources."""

import errno
import os

import pytest
from datasets import make_pngs

from input_pipeline import eval_batches, open_files, open_source
from vit_jax.errors import UserError


def labels_in_order(source):
    return [int(source.fetch(index)[1]) for index in range(source.num_examples)]


def write_files(root, *files):
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_a_folder(image_folder):
    source = open_source(str(image_folder), None, "train")
    assert source.class_names == ("cat", "dog")
    assert source.num_examples == 20
    labels = labels_in_order(source)
    assert sorted(labels) == [0] * 10 + [1] * 10
    for index, label in enumerate(labels):
        assert f"/train/{source.class_names[label]}/" in source.describe(index)


def test_sub_splits_divide_a_folder_and_have_all_classes(image_folder):
    whole = open_source(str(image_folder), None, "train")
    first = open_source(str(image_folder), None, "train[:60%]")
    rest = open_source(str(image_folder), None, "train[60%:]")
    assert (first.num_examples, rest.num_examples) == (12, 8)
    assert set(labels_in_order(first)) == {0, 1}
    names = [s.describe(i) for s in (first, rest) for i in range(s.num_examples)]
    assert names == [whole.describe(i) for i in range(20)]


def test_images_in_nested_folders_and_of_several_splits(tmp_path, caplog):
    write_files(tmp_path, "train/cat/a.jpg", "train/cat/deep/er/b.PNG", "train/cat/notes.txt")
    write_files(tmp_path, "extra/dog/c.jpeg")
    source = open_source(str(tmp_path), None, "train+extra")
    assert source.class_names == ("cat", "dog")
    names = {source.describe(i).removeprefix(f"{tmp_path}/") for i in range(source.num_examples)}
    assert names == {"train/cat/a.jpg", "train/cat/deep/er/b.PNG", "extra/dog/c.jpeg"}
    assert (
        "ignoring 1 files or folders that are hidden or aren't *.jpg, *.jpeg or *.png, such as "
        "notes.txt" in caplog.text
    )


def test_links_to_folders_are_followed_once(tmp_path):
    write_files(tmp_path, "train/cat/a.jpg", "elsewhere/b.jpg")
    (tmp_path / "train" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "train" / "cat")
    assert open_source(str(tmp_path), None, "train").num_examples == 2


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """Rather than training on the other images."""
    write_files(tmp_path, "train/cat/a.jpg", "train/cat/private/b.jpg")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("private"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="cat/private can't be read: Permission denied"):
        open_source(str(tmp_path), None, "train")


def test_file_names_of_any_bytes(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.png"
    with open(path, "wb"):
        source = open_files([str(tmp_path)])
    assert os.fsencode(source.describe(0)) == path


def test_folders_with_another_layout(tmp_path):
    write_files(tmp_path, "flat/train/a.jpg")
    with pytest.raises(UserError, match="train has no class folders.*found 1 files"):
        open_source(str(tmp_path / "flat"), None, "train")
    write_files(tmp_path, "empty/train/cat/a.jpg", "empty/train/dog/readme.txt")
    with pytest.raises(
        UserError, match="train/dog has no images: expected .*found 1 of other kinds, such as"
    ):
        open_source(str(tmp_path / "empty"), None, "train")
    write_files(tmp_path, "odd/train/cat/a.jpg", "odd/val/cat/a.jpg", "odd/val/emu/a.jpg")
    with pytest.raises(UserError, match="the training split, or the run, lacks: emu"):
        open_source(str(tmp_path / "odd"), None, "val", ("cat",))


def test_files_without_labels(tmp_path):
    write_files(
        tmp_path, "one.txt", "photos/b.jpg", "photos/a.png", "photos/notes.txt", "none/a.txt"
    )
    source = open_files([str(tmp_path / "one.txt"), str(tmp_path / "photos")])
    names = [source.describe(i) for i in range(source.num_examples)]
    assert names == [str(tmp_path / name) for name in ("one.txt", "photos/a.png", "photos/b.jpg")]
    assert labels_in_order(source) == [-1, -1, -1]
    with pytest.raises(UserError, match="none has no images"):
        open_files([str(tmp_path / "none")])


def test_litter_is_ignored(tmp_path, caplog):
    """Hidden files and folders, and previews, are neither classes nor images."""
    write_files(tmp_path, "train/cat/a.jpg", "train/cat/._a.jpg", "train/cat/Thumbs.db")
    write_files(tmp_path, "train/.ipynb_checkpoints/b.jpg", "train/__MACOSX/c.jpg")
    write_files(tmp_path, "train/cat/.cache/d.jpg", "train/.DS_Store")
    source = open_source(str(tmp_path), None, "train")
    assert source.class_names == ("cat",)
    assert [source.describe(0)] == [str(tmp_path / "train/cat/a.jpg")]
    assert (
        "ignoring 6 files or folders that are hidden or aren't *.jpg, *.jpeg or *.png"
        in caplog.text
    )
    assert open_files([str(tmp_path)]).num_examples == source.num_examples == 1


def test_dangling_links_are_named(tmp_path, caplog, plain):
    make_pngs(tmp_path / "train" / "cat", 8)
    (tmp_path / "train" / "cat" / "0.png").unlink()
    (tmp_path / "train" / "cat" / "0.png").symlink_to("gone.png")
    source = open_source(str(tmp_path), None, "train")
    with pytest.raises(UserError, match=r"0.png is a dangling symbolic link to gone.png; fix it"):
        next(eval_batches(source, plain))
    plain.dataset.on_error = "skip"
    next(eval_batches(source, plain))
    assert "0.png: it is a dangling symbolic link to gone.png" in caplog.text
    (tmp_path / "train" / "dog").symlink_to("dogs")
    with pytest.raises(UserError, match="train/dog is a dangling symbolic link to dogs"):
        open_source(str(tmp_path), None, "train")


def test_paths_that_cannot_be_opened(tmp_path):
    (tmp_path / "link.png").symlink_to("gone.png")
    for path, message in (
        (tmp_path / "nothere.png", "nothere.png doesn't exist"),
        (tmp_path / "link.png", "link.png is a dangling symbolic link to gone.png"),
        ("https://example.com/a.png", "is a URL: download the image"),
        ("-", "can't be read from standard input"),
    ):
        with pytest.raises(UserError, match=message):
            open_files([str(path)])


def test_classes_that_a_split_lacks_are_named(image_folder, caplog):
    classes = open_source(str(image_folder), None, "train").class_names
    assert not caplog.text
    with_more = (*classes, "zebra")
    open_source(str(image_folder), None, "train", with_more)
    assert f"has no images of 1 of the {len(with_more)} classes, such as zebra" in caplog.text
