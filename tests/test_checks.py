"""Checks of user-supplied values, and atomic writes."""

import pytest

from vit_jax import checks
from vit_jax.errors import UserError
from vit_jax.files import atomic_path, write_atomically


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
