"""The commands of start.py; nothing is installed."""

import ast
import pathlib
import types

import pytest

import start


@pytest.fixture
def commands(monkeypatch):
    """Records the commands that start.py would run."""
    commands = []

    def run(command, **_):
        commands.append(list(map(str, command)))
        return types.SimpleNamespace(returncode=5)

    monkeypatch.setattr(start, "install", lambda requirements: True)
    monkeypatch.setattr(start.subprocess, "run", run)
    return commands


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        ("vit_jax/models", "tests/models"),
        ("./vit_jax/models/", "tests/models"),
        ("vit_jax/scaling/flops.py", "tests/scaling/test_flops.py"),
        ("vit_jax/aot/compile_report.py", "tests/aot"),  # no test file of its own
        ("vit_jax/data/preprocess/randaugment.py", "tests/data/preprocess/test_randaugment.py"),
        ("vit_jax/data/preprocess/crops.py", "tests/data/preprocess"),
        ("configuration.py", "tests/test_configuration.py"),
        ("train.py", "tests/test_train.py"),
        ("configs", "tests/test_configs.py"),
        ("command_line/exits.py", "tests/test_command_line.py"),
        ("configs/vit_b16.py", "tests/test_configs.py"),
        ("launch/slurm.sh", "launch/slurm.sh"),
        ("vit_jax", "tests"),
        ("tests/test_start.py", "tests/test_start.py"),
        ("tests/test_start.py::test_name", "tests/test_start.py::test_name"),
        ("--durations=5", "--durations=5"),
    ],
)
def test_code_selects_its_tests(code, tests):
    assert start.tests_of(code) == tests


def test_every_room_has_tests():
    for folder in (start.ROOT / "vit_jax").iterdir():
        if (folder / "__init__.py").exists():
            assert start.tests_of(str(folder)) == f"tests/{folder.name}"


def test_arguments_are_passed_on(monkeypatch, commands):
    train = str(start.ROOT / "train.py")
    for arguments, expected in (
        (["train"], [train, "--config=configs/digits.py"]),
        (["train", "--config=x.py"], [train, "--config=x.py"]),
        (["test"], ["-m", "pytest"]),
        (
            ["test", "-x", "vit_jax/models", "-k", "configs"],
            ["-m", "pytest", "-x", "tests/models", "-k", "configs"],
        ),
    ):
        monkeypatch.setattr(start.sys, "argv", ["start.py", *arguments])
        assert start.main() == 5
        assert commands.pop() == [str(start.PYTHON), *expected]


@pytest.mark.parametrize("arguments", [[], ["tests"], ["--help"]])
def test_unknown_commands_are_refused(monkeypatch, capsys, commands, arguments):
    monkeypatch.setattr(start.sys, "argv", ["start.py", *arguments])
    assert start.main() == 2
    assert "Usage: python start.py train | test | compile" in capsys.readouterr().err
    assert not commands


def test_an_old_python_version_is_refused(monkeypatch, capsys, commands):
    ast.parse(pathlib.Path(start.__file__).read_text(), feature_version=(3, 6))
    monkeypatch.setattr(start.sys, "version_info", (3, 9, 2))
    monkeypatch.setattr(start.sys, "version", "3.9.2 (main)")
    assert start.main() == 2
    assert "Python 3.11 to 3.13 is required; this is 3.9.2\n" in capsys.readouterr().err
    assert not commands
