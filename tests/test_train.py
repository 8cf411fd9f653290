"""Whole runs: what a user sees, stopped and resumed, and mistakes in one line."""

import importlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import TINY

import train
from configs import common, digits
from vit_jax import checkpoint, models, sharding, train_state
from vit_jax.errors import UserError
from vit_jax.run_log import NonFiniteError

ROOT = pathlib.Path(__file__).parents[1]
PRESETS = sorted(
    path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "common")
)


def command(*args):
    return [sys.executable, str(ROOT / "train.py"), *args]


def run(*args, **kwargs):
    return subprocess.run(
        command(*args), cwd=ROOT, timeout=300, capture_output=True, text=True, **kwargs
    )


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def untimed(row):
    return {name: value for name, value in row.items() if name != "train/images_per_second"}


def quick_config(**fields):
    config = digits.get_config("quick")
    config.mesh.data = 8
    config.update(fields)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted quick run, from the command line."""
    workdir = tmp_path_factory.mktemp("finished")
    result = run("--config=configs/digits.py:quick", f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    return workdir, result


def test_what_a_run_shows(finished):
    workdir, result = finished
    for text in ("Parameters   ", "FLOPs", "MiB of state", "step 60/60", "images/s/device"):
        assert text in result.stdout
    assert "Test accuracy" in result.stdout
    assert str(workdir) in result.stdout
    assert "Worth trying next" in result.stdout
    assert result.stderr == ""
    assert "step 60/60" in (workdir / "train.log").read_text()


def test_what_a_run_leaves(finished):
    workdir, _ = finished
    table = rows(workdir)
    trained = [row for row in table if "train/loss" in row]
    evaluated = [row for row in table if "val/loss" in row]
    assert [row["step"] for row in trained] == [10, 20, 30, 40, 50, 60]
    assert [row["step"] for row in evaluated] == [30, 60]
    assert set(evaluated[0]) == {"step", "val/loss", "val/accuracy", "val/accuracy_top5"}
    for name in ("learning_rate", "images_per_second", "grad_norm", "accuracy"):
        assert f"train/{name}" in trained[0]
    assert list(workdir.glob("events.out.tfevents.*"))
    config, params = checkpoint.restore_params(workdir)
    assert (config.total_steps, config.num_classes) == (60, 10)
    logits = models.from_config(config).apply({"params": params}, np.zeros((2, 16, 16, 1)))
    assert logits.shape == (2, 10)


def test_killed_and_started_again_gives_the_same_bits(finished, tmp_path):
    """kill -9 once the first checkpoint is there, then the same command again."""
    workdir, _ = finished
    args = ("--config=configs/digits.py:quick", f"--workdir={tmp_path}")
    process = subprocess.Popen(command(*args), cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (tmp_path / "checkpoints" / "20").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "checkpoints" / "60").exists()

    result = run(*args)
    assert result.returncode == 0, result.stderr
    assert "Resuming at step" in result.stdout
    assert_same_run(tmp_path, workdir)


def assert_same_run(workdir, other):
    for item in ("params", "opt_state"):
        ours, theirs = (restore(folder, item) for folder in (workdir, other))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert [untimed(row) for row in rows(workdir)] == [untimed(row) for row in rows(other)]


def restore(workdir, item):
    """An item of the last checkpoint, as it is stored."""
    step = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    return ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / item)


def test_a_finished_run_is_left_alone(finished):
    workdir, _ = finished
    before = rows(workdir)
    result = run("--config=configs/digits.py:quick", f"--workdir={workdir}")
    assert result.returncode == 0
    assert "Test accuracy" in result.stdout
    assert rows(workdir) == before


def test_another_configuration_in_the_same_folder(finished):
    workdir, _ = finished
    args = ("--config=configs/digits.py:quick", f"--workdir={workdir}", "--config.seed=3")
    result = run(*args)
    assert result.returncode == 2
    assert "seed: 0 -> 3" in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_and_resumes_when_quick(preset, tmp_path):
    config = importlib.import_module(f"configs.{preset}").get_config("quick")
    config.total_steps = 40
    result = train.train(config, tmp_path)
    assert 0.1 < result["accuracy"] <= 1.0
    losses = [row["train/loss"] for row in rows(tmp_path) if "train/loss" in row]
    assert losses[-1] < losses[0]
    # Once more from the checkpoint before the last.
    shutil.rmtree(tmp_path / "checkpoints" / "40")
    before = [untimed(row) for row in rows(tmp_path)]
    assert train.train(config, tmp_path) == result
    assert [untimed(row) for row in rows(tmp_path)] == before


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_digits_are_learned(seed, tmp_path):
    """Other seeds than the one of the README's training command; on one device, as there."""
    args = ("--config=configs/digits.py", f"--config.seed={seed}", f"--workdir={tmp_path}")
    result = run(*args, env={**os.environ, "XLA_FLAGS": ""})
    assert result.returncode == 0, result.stderr
    assert rows(tmp_path)[-1]["val/accuracy"] >= 0.97


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_complete_as_they_are(preset):
    module = importlib.import_module(f"configs.{preset}")
    config = module.get_config()
    config.num_classes = 1000
    models.from_config(config)
    assert f"--config=configs/{preset}.py" in module.__doc__
    assert config.num_epochs or config.total_steps


def test_eight_devices_give_the_losses_of_one(tmp_path):
    """The same digits run on a mesh of 1 and of 8 devices, through the whole pipeline."""
    losses = []
    for devices in (1, 8):
        workdir = tmp_path / str(devices)
        mesh = sharding.create_mesh(devices=jax.devices()[:devices])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sharding, "create_mesh", lambda mesh=mesh, **_: mesh)
            train.train(quick_config(total_steps=30), workdir)
        losses.append([row.get("train/loss", row.get("val/loss")) for row in rows(workdir)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-4)


def test_a_folder_of_mixed_images(image_folder, tmp_path, capsys):
    config = common.get_config()
    config.update(batch_size=8, image_size=32, dtype="float32", total_steps=4)
    config.model.update(variant="Ti/16", **TINY)
    config.schedule.warmup_steps = 1
    config.dataset.update(name=str(image_folder), eval_split="val")
    eight = train.train(config, tmp_path / "eight")
    assert "20 examples, 2 classes" in capsys.readouterr().out
    # The 13 evaluation images one by one, with the same parameters.
    _, params = checkpoint.restore_params(tmp_path / "eight")
    config = checkpoint.read_config(tmp_path / "eight")
    config.batch_size = 1
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    _, eval_set = train.open_splits(config.dataset)
    eval_step = jax.jit(train_state.make_eval_step(models.from_config(config), config))
    one = train.evaluation(eval_step, eval_set, config, mesh, params)
    assert one["accuracy"] == eight["accuracy"]
    assert one["loss"] == pytest.approx(eight["loss"], rel=1e-5)


def test_a_run_that_diverges_stops_and_keeps_its_last_checkpoint(tmp_path):
    config = quick_config(total_steps=60, grad_clip_norm=0.0, checkpoint_every_steps=5)
    config.optimizer.update(name="sgd", momentum=0.0)
    config.schedule.update(name="step", base_lr=1e-3, warmup_steps=0)
    config.schedule.update(decay_steps=10, decay_factor=1e30)
    with pytest.raises(NonFiniteError, match=r"Step 1\d: .*lower config.schedule.base_lr"):
        train.train(config, tmp_path)
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert steps[-1] == 10
    _, params = checkpoint.restore_params(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_a_truncated_checkpoint_gives_way(tmp_path, capsys):
    config = quick_config(total_steps=40)
    result = train.train(config, tmp_path)
    for path in (tmp_path / "checkpoints" / "40").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    assert train.train(config, tmp_path) == result
    assert "40 can't be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.variant": "B/x"}, "Unknown variant 'B/x'"),
        ({"model.width": 30}, "width 30 is not divisible by model.num_heads 4"),
        ({"image_size": 18}, "image height 18 is not divisible by the patch size 4"),
        ({"batch_size": 60}, "batch_size 60 is not divisible by 8 devices"),
        ({"accum_steps": 3}, "8 devices x 3 accumulation steps"),
        ({"dataset.name": "imagenet2012"}, "tfds build imagenet2012"),
        ({"dataset.eval_split": "validation"}, "Split 'validation' of the embedded digits"),
        ({"loss": "mse"}, "config.loss is 'mse'"),
        ({"augment.crop": "centre"}, "augment.crop is 'centre'"),
        ({"best_metric": "f1"}, "best_metric is 'f1'"),
        ({"dtype": "float23"}, "dtype is 'float23'; it can be 'float32'"),
        ({"model.pool": "none"}, "pool"),
    ],
)
def test_mistakes_stop_before_training(change, message, tmp_path):
    config = quick_config()
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message) as raised:
        train.train(config, tmp_path)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--config=configs/digits.py:quick", "--config.optimzer.b1=1"],
            "Unknown config.*optimizer",
        ),
        (["--config=configs/digits.py:quik"], "unknown key 'quik'.*quick"),
        (["--config=configs/digit.py"], "There is no configs/digit.py; configs/ has digits.py"),
        (["--config=configs/digits.py", "--config.batch_size=many"], "batch_size.*'many'"),
        (
            ["--config=configs/digits.py:quick", "--workdir=/dev/null/x"],
            "/dev/null/x can't be writ",
        ),
        (
            ["--config=configs/vit_b16.py", "--config.dataset.data_dir=/nowhere"],
            "/nowhere/imagenet",
        ),
        ([], "--config=FILE is missing; configs/ has digits.py"),
    ],
)
def test_mistakes_on_the_command_line(args, message, tmp_path):
    """One line, exit code 2, no traceback, within seconds."""
    if not any(arg.startswith("--workdir") for arg in args):
        args = [*args, f"--workdir={tmp_path}"]
    start = time.perf_counter()
    result = run(*args)
    text = (result.stdout + result.stderr).strip()
    assert result.returncode == 2
    assert time.perf_counter() - start < 60
    assert "Traceback" not in text
    assert re.search(message, text.splitlines()[-1]), text
    assert len(text.splitlines()) == 1
