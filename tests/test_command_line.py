"""Commands from any folder, and paths that a shell would take apart."""

import functools
import json
import logging
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import types

import forked
import jax
import pytest
from absl import flags
from ml_collections import config_flags

import command_line
import input_pipeline
from command_line import exits, mistakes, parsing, presets
from configs import common, digits, finetune
from vit_jax.errors import UserError


def test_commands_can_be_pasted_into_a_shell_from_any_folder(monkeypatch, tmp_path):
    """Paths are relative to the current folder, or absolute; spaces are quoted."""
    for folder in (command_line.ROOT, tmp_path):
        monkeypatch.chdir(folder)
        line = command_line.command("train.py", "--workdir=my run")
        python, script, workdir = shlex.split(line)
        assert pathlib.Path(script).resolve() == command_line.ROOT / "train.py"
        assert python == "python" or pathlib.Path(python).absolute() == pathlib.Path(sys.executable)
        assert workdir == "--workdir=my run"
        assert command_line.command("-m", "vit_jax.figures").endswith(" -m vit_jax.figures")


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
        assert presets.with_preset_located(["train.py", *given]) == ["train.py", *located]
    mine = tmp_path / "configs" / "digits.py"
    mine.parent.mkdir()
    mine.touch()
    located = presets.with_preset_located(["train.py", "--config=configs/digits.py"])
    assert located[1].endswith("=configs/digits.py")


@pytest.mark.parametrize(("text", "value"), [("squeeze", "squeeze"), ("0.9", 0.9), ("1", 1)])
@pytest.mark.parametrize("preset", [digits, finetune])
def test_a_crop_is_a_number_or_a_word(text, value, preset, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", f"--config.augment.eval_crop={text}"])
    parsed = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", preset.get_config(), flag_values=parsed)
    parsed(sys.argv)
    assert parsed.config.augment.eval_crop == value


def test_running_out_of_memory_gives_one_line(monkeypatch, capsys):
    def main():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\n-")

    monkeypatch.setattr(exits.distributed, "start", lambda *_: None)
    monkeypatch.setattr(exits, "COMPILE_FOR", types.SimpleNamespace(value=None))
    for name in ("COORDINATOR", "NUM_PROCESSES", "PROCESS_ID", "HEARTBEAT", "DISTRIBUTED"):
        monkeypatch.setattr(exits, name, types.SimpleNamespace(value=None))
    monkeypatch.setattr(logging.getLogger("vit_jax"), "handlers", [])
    with pytest.raises(SystemExit) as exit:
        exits.guarded(main, preemptible=True)
    assert exit.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes)" in lines[0]
    assert "raise config.accum_steps" in lines[0]


@pytest.mark.parametrize(
    ("override", "problem", "message"),
    [
        ("seed=1.5", "invalid literal for int() with base 10: '1.5'", "'1.5'.*a whole number"),
        ("seed={'a': 1}", "invalid literal for int() with base 10: 'x'", "{'a': 1}\".*a whole"),
        ("grad_clip_norm=x", "could not convert string to float: 'x'", "'x'.*be a number"),
        ("model.scan=y", "('Non-boolean argument to boolean flag', 'y')", "'y'.*True or False"),
        ("augment.mean=(1", "Error while parsing string: (1 as tuple. If", r"'\(1'.*a tuple"),
    ],
)
def test_a_value_of_a_wrong_type_is_named(override, problem, message):
    """The messages on the left are absl's and Python's."""
    line = mistakes.flag_error(f"flag --config.{override}: {problem}")
    assert re.fullmatch(f"config.{override.partition('=')[0]} is .*{message}.*", line)


def test_flags_of_other_codebases_and_values_of_switches(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for flag, field in (("lr", "config.schedule.base_lr"), ("data-path", "config.dataset.name")):
        line = mistakes.flag_error(f"Unknown command line flag '{flag}'")
        assert line == f"There is no flag --{flag}: give --{field}"
    config = common.get_config()
    for field in set(mistakes.FOREIGN_FLAGS.values()) - {"workdir"}:
        *groups, name = field.split(".")[1:]
        assert name in functools.reduce(getattr, groups, config), field
    text = "flag --report=a.html: ('Non-boolean argument to boolean flag', 'a.html')"
    assert "--report is 'a.html'; it takes no value" in mistakes.flag_error(text)


def test_what_is_wrong_with_a_preset_is_named(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    monkeypatch.setattr(sys, "argv", ["train.py", f"--config={path}:quick"])
    path.write_text("def get_config(arg):\n    return nonsense\n")
    with pytest.raises(NameError) as raised:
        runpy.run_path(str(path))["get_config"](None)
    message = mistakes.preset_error(raised.value)
    assert message == f"{path}, line 2: NameError: name 'nonsense' is not defined"
    missing = AttributeError("module 'config' has no attribute 'get_config'")
    assert mistakes.preset_error(missing) == f"{path} is no preset: it has no function get_config"
    path.write_text("def get_config():\n    return {}\n")
    result = parse(f"--config={path}:quick")
    assert result.returncode == 2
    assert re.search("mine.py takes no argument: .* define get_config.arg=None", result.stderr)
    assert mistakes.preset_error(AttributeError("'nofield'")) is None  # not the preset's


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("mine.py", "seed = 1".encode("utf-16"), "can't be read as Python: save it as UTF-8"),
        ("mine.py", b"raise SystemExit('bye')", r"The preset calls sys.exit\('bye'\)"),
        ("config.json", b"{}", "is no preset: to resume a run"),
        ("mine.txt", b"", "is no preset: it has no function get_config"),
    ],
)
def test_files_that_are_no_presets(name, contents, message, tmp_path):
    (tmp_path / name).write_bytes(contents)
    result = forked.run_script("train.py", f"--config={tmp_path / name}")
    assert result.returncode == 2
    assert re.search(message, result.stderr)
    assert len(result.stderr.splitlines()) == 1


def test_two_presets_are_refused(capsys, monkeypatch):
    # Another test may have opened a log.
    monkeypatch.setattr(logging.getLogger("vit_jax"), "handlers", [])
    with pytest.raises(SystemExit):
        parsing.check_single_preset(["train.py", "--config=a.py", "--config", "b.py:quick"])
    assert "--config is given 2 times (a.py, b.py)" in capsys.readouterr().err


def test_an_unknown_field_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--config.schedule.rate=1"])
    assert mistakes.unknown_field("'rate'").startswith("There is no field config.schedule.rate")
    suggestion = 'Did you "mean "base_lr" instead of "base_lrr"'
    assert "did you mean 'base_lr'" in mistakes.unknown_field(suggestion)


def test_arguments_without(monkeypatch):
    argv = ["train.py", "--config=a.py:quick", "--workdir", "runs/a", "--config.seed=3", "--n=1"]
    monkeypatch.setattr(sys, "argv", argv)
    assert command_line.arguments_without("workdir", "config.seed") == [
        "--config=a.py:quick",
        "--n=1",
    ]


def test_a_run_inside_its_dataset_is_refused(tmp_path):
    dataset = types.SimpleNamespace(name=str(tmp_path))
    input_pipeline.check_workdir(dataset, tmp_path.parent / "run")
    with pytest.raises(UserError, match="would be taken for a class"):
        input_pipeline.check_workdir(dataset, tmp_path / "train" / "run")
    input_pipeline.check_workdir(types.SimpleNamespace(name="digits"), tmp_path)


def parse(*arguments):
    """Parses a command line in a process of its own, which prints the configuration."""
    code = (
        "import sys, command_line\n"
        "command_line.parse(sys.argv)\n"
        "print(command_line.CONFIG.value.to_json_best_effort())"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=command_line.ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_epochs_on_the_command_line_override_a_preset_s_steps():
    quick = ("--config=configs/digits.py:quick", "--config.num_epochs=5")
    config = json.loads(parse(*quick).stdout)
    assert (config["num_epochs"], config["total_steps"]) == (5.0, None)
    config = json.loads(parse(*quick, "--config.total_steps=7").stdout)
    assert config["total_steps"] == 7


@pytest.mark.slow
def test_fields_can_be_unset():
    preset = "--config=configs/vit_s16.py:recipe=deit,quick"
    config = json.loads(
        parse(preset, "--config.model.width=None", "--config.ema_decay=None").stdout
    )
    assert (config["model"]["width"], config["ema_decay"]) == (None, None)
    assert (
        "config.model.reg_tokens is 'None'"
        in parse(preset, "--config.model.reg_tokens=None").stderr
    )
    assert "add --config=FILE" in parse("--config.ema_decay=None").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config=configs/digits.py", "--config.evals.knn.k=5"],
            "config.evals is set as a whole",
        ),
        (["--workdir=runs/x", "--config.batch_size=8"], "--workdir takes the run's own config"),
    ],
)
def test_overrides_that_cannot_be_are_explained(arguments, message):
    result = parse(*arguments)
    assert result.returncode == 2
    assert message in result.stderr


INTERRUPTED = """
import gc, os, signal, time
import command_line

def collecting(phase, info):
    gc.callbacks.remove(collecting)
    os.kill(os.getpid(), signal.SIGINT)

def main():
    gc.callbacks.append(collecting)
    gc.collect()
    time.sleep(60)

command_line.run(main, needs_config=False)
"""


def test_ctrl_c_during_a_garbage_collection_ends_the_script(tmp_path):
    """Python drops what is raised there."""
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    result = forked.Script(str(tmp_path / "interrupted.py")).finish(timeout=30)
    assert (result.returncode, result.stderr) == (130, "Interrupted\n")
