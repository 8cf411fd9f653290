"""Commands from any folder, and paths that a shell would take apart."""

import logging
import pathlib
import shlex
import sys
import types

import jax
import pytest

import command_line


def test_commands_can_be_pasted_into_a_shell_from_any_folder(monkeypatch, tmp_path):
    """Paths are relative to the current folder, or absolute; spaces are quoted."""
    for folder in (command_line.ROOT, tmp_path):
        monkeypatch.chdir(folder)
        line = command_line.command("train.py", "--workdir=my run")
        python, script, workdir = shlex.split(line)
        assert pathlib.Path(script).resolve() == command_line.ROOT / "train.py"
        assert python == "python" or pathlib.Path(python).absolute() == pathlib.Path(sys.executable)
        assert workdir == "--workdir=my run"


def test_presets_are_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    preset = f"{command_line.ROOT / 'configs' / 'digits.py'}:quick"
    for given, located in (
        (["--config=configs/digits.py:quick"], [f"--config={preset}"]),
        (["--config", "configs/digits.py:quick"], ["--config", preset]),
        (["--config=configs/none.py:quick"], ["--config=configs/none.py:quick"]),
        ([f"--config={preset}"], [f"--config={preset}"]),
        (["configs/digits.py"], ["configs/digits.py"]),
    ):
        assert command_line.with_preset_located(["train.py", *given]) == ["train.py", *located]
    mine = tmp_path / "configs" / "digits.py"
    mine.parent.mkdir()
    mine.touch()
    assert command_line.with_preset_located(["--config=configs/digits.py"])[0].endswith(
        "=configs/digits.py"
    )


def test_running_out_of_memory_gives_one_line(monkeypatch, capsys):
    def main():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\n-")

    monkeypatch.setattr(command_line.distributed, "start", lambda *_: None)
    monkeypatch.setattr(command_line, "COMPILE_FOR", types.SimpleNamespace(value=None))
    for name in ("COORDINATOR", "NUM_PROCESSES", "PROCESS_ID", "HEARTBEAT"):
        monkeypatch.setattr(command_line, name, types.SimpleNamespace(value=None))
    monkeypatch.setattr(logging.getLogger("vit_jax"), "handlers", [])
    with pytest.raises(SystemExit) as exit:
        command_line.guarded(main, preemptible=True)
    assert exit.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes)" in lines[0]
    assert "raise config.accum_steps" in lines[0]
