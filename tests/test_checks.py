"""Checks of user-supplied values, and atomic writes."""

import numpy as np
import pytest

from vit_jax import checks
from vit_jax.errors import UserError
from vit_jax.figures.attention import draw_attention
from vit_jax.storage.files import atomic_path, write_atomically


@pytest.mark.parametrize(
    ("check", "args", "message"),
    [
        (checks.check_choice, ("f", 3, (1, 2)), "f is 3; it must be 1 or 2"),
        (checks.check_choice, ("f", "c", ("a",)), "f is 'c'; it must be 'a'"),
        (checks.lookup, ("f", "z", {"x": 1, "y": 2}), "f is 'z'; it must be 'x' or 'y'"),
        (
            checks.check_range,
            ("f", -1.5, checks.NON_NEGATIVE),
            "f is -1.5; it must be a number >= 0",
        ),
        (checks.check_range, ("f", 2, checks.SHARE), "f is 2; it must be a number >= 0 and <= 1"),
        (
            checks.check_range,
            ("f", 0, checks.Range(0, above=True)),
            "it must be a number > 0",
        ),
        (
            checks.check_range,
            ("f", 2.0, checks.COUNT),
            "it must be a whole number >= 1 and <= 2,147",
        ),
        (checks.check_range, ("f", float("inf"), checks.FINITE), "it must be a finite number"),
        (checks.check_range, ("f", None, checks.FINITE), "f is None; it must be a finite number"),
        (checks.check_range, ("f", "1", checks.FINITE), "f is '1'; it must be a finite number"),
        (checks.check_interval, ("f", (0.5, 0.1)), r"f is \(0.5, 0.1\); it must be \(low, high\)"),
        (checks.size_pair, ("f", 0), "f is 0; it must be a number of pixels above 0, or"),
        (checks.size_pair, ("f", (1, 2, 3)), r"f is \(1, 2, 3\); it must be a number of pixels"),
        (checks.size_pair, ("f", 2.0), "f is 2.0; it must be"),
    ],
)
def test_mistakes_are_named(check, args, message):
    with pytest.raises(UserError, match=message):
        check(*args)


def test_sizes():
    assert checks.size_pair("f", 3) == (3, 3)
    assert checks.size_pair("f", [3, 4]) == (3, 4)


def test_pictures_are_written_to_files_in_existing_folders(tmp_path):
    checks.check_png("--f", str(tmp_path / "a.png"))
    (tmp_path / "folder.png").mkdir()
    for path in ("a.jpg", "nowhere/a.png", "folder.png"):
        with pytest.raises(UserError, match="must be a .png file in an existing folder"):
            checks.check_png("--f", str(tmp_path / path))


def test_a_picture_replaces_only_pictures_that_were_drawn_here(tmp_path):
    photo, drawn = tmp_path / "photo.png", tmp_path / "drawn.png"
    photo.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(UserError, match="a file that this program didn't write"):
        checks.check_png("--f", str(photo))
    image = np.zeros((1, 8, 8, 1), np.uint8)
    draw_attention(image, np.ones((1, 2, 2), np.float32), ["caption"], str(drawn))
    checks.check_png("--f", str(drawn))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((127.5,), (1.0,), r"mean, for pixels in \[0, 1\], is 127.5; it must be a number >= 0"),
        ((0.5,), (0.0,), r"std, for pixels in \[0, 1\], is 0.0; it must be a number > 0"),
        ((0.5, 0.5), (0.5,), r"mean is \(0.5, 0.5\); it must have one number, or one for each of"),
        ("a", (0.5,), "mean is 'a'; it must be numbers"),
    ],
)
def test_normalization(mean, std, message):
    checks.check_normalization((0.5, 0.4, 0.3), (0.5,), 3)
    with pytest.raises(UserError, match=message):
        checks.check_normalization(mean, std, 3)


def test_class_names():
    checks.check_class_names(None, 3)
    checks.check_class_names(["a", "b", "b"], 3)
    for names in ("abc", {"a", "b", "c"}, range(3)):
        with pytest.raises(UserError, match="class_names is a .*; it must be a list of names"):
            checks.check_class_names(names, 3)
    with pytest.raises(UserError, match="class_names has 2 names; it must have one for each"):
        checks.check_class_names(("a", "b"), 3)


def test_groups_of_a_configuration_are_complete():
    defaults = {"model": {"pool": "cls", "width": None}, "seed": 0}
    checks.check_values({"model": {"pool": "gap", "width": 3}, "seed": 1}, defaults)
    with pytest.raises(UserError, match="config.model lacks width: start from get_config"):
        checks.check_values({"model": {"pool": "gap"}, "seed": 1}, defaults)
    with pytest.raises(UserError, match="config.model is 5; it must be a group of fields"):
        checks.check_values({"model": 5, "seed": 1}, defaults)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.json"
    write_atomically(path, "old")

    def write_half():
        with atomic_path(path) as unfinished:
            unfinished.write_text("ne")
            raise ZeroDivisionError

    pytest.raises(ZeroDivisionError, write_half)
    assert path.read_text() == "old"
    write_atomically(path, b"new")
    assert path.read_text() == "new"
