"""Whole runs: what users see, stopping and resuming, and user errors in one line."""

import importlib
import json
import os
import re
import shutil
import signal
import time

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, randomized
from PIL import Image
from whole_runs import (
    QUICK,
    ROOT,
    assert_same_run,
    last_checkpoint,
    quick_config,
    rows,
    steps_in,
    stop_at,
    untimed,
)

import configuration
import evaluate
import input_pipeline
import train
from configs import common, recipes
from vit_jax import checkpoint, models
from vit_jax.errors import Preempted, UserError
from vit_jax.evaluation import accuracy
from vit_jax.logs.run_log import NonFiniteError
from vit_jax.parallel import feeding
from vit_jax.parallel import mesh as meshes
from vit_jax.runs import run_folder
from vit_jax.training import metrics, schedules, steps

RECIPES = [recipe for recipe in common.RECIPES if recipe != "base"]
PRESETS = sorted(
    path.stem
    for path in (ROOT / "configs").glob("*.py")
    if path.stem not in ("__init__", "common", "recipes")
)
slow = pytest.mark.slow


def run(*args):
    return forked.run_script("train.py", *args)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished quick run, from the command line."""
    workdir = tmp_path_factory.mktemp("finished")
    result = run(*QUICK, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    return workdir, result


def test_what_a_run_prints(finished):
    workdir, result = finished
    state = "with 6.00 bytes of adamw's state for each"
    for text in ("Parameters   ", state, "FLOPs", "MiB of state", "step 60/60", "images/s/device"):
        assert text in result.stdout
    assert "Test accuracy" in result.stdout
    assert str(workdir) in result.stdout
    assert "Next, you could try" in result.stdout
    assert result.stderr == ""
    assert "step 60/60" in (workdir / "train.log").read_text()


def test_what_a_run_writes(finished):
    workdir, _ = finished
    table = rows(workdir)
    trained = [row for row in table if "train/loss" in row]
    evaluated = [row for row in table if "val/loss" in row]
    assert [row["step"] for row in trained] == [10, 20, 30, 40, 50, 60]
    assert [row["step"] for row in evaluated] == [30, 60]
    assert set(evaluated[0]) >= {"step", *(f"val/{name}" for name in metrics.NAMES)}
    for name in ("learning_rate", "images_per_second", "grad_norm", "accuracy"):
        assert f"train/{name}" in trained[0]
    waits = [trained[0][f"train/{what}_wait"] for what in ("input", "device")]
    assert min(waits) >= 0
    assert sum(waits) <= 1
    assert list(workdir.glob("events.out.tfevents.*"))
    config, params = checkpoint.restore_params(workdir)
    assert (config.total_steps, config.num_classes) == (60, 10)
    shapes = jax.eval_shape(
        models.from_config(config).apply, {"params": params}, np.zeros((2, 16, 16, 1))
    )
    assert shapes.shape == (2, 10)


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("metrics.jsonl", marks=slow),
        pytest.param("checkpoints/[24]0*tmp*", marks=slow),
        "checkpoints/20",
    ],
)
def test_a_killed_run_resumes_to_the_bit(finished, tmp_path, moment):
    """Kills the run before the first checkpoint, during a save, or between checkpoints."""
    workdir, _ = finished
    args = (*QUICK, f"--workdir={tmp_path}")
    process = forked.Script("train.py", *args)
    while not list(tmp_path.glob(moment)):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "checkpoints" / "60").exists()

    result = run(*args)
    assert result.returncode == 0, result.stderr
    if moment == "checkpoints/20":
        assert "Resuming at step" in result.stdout
    assert_same_run(tmp_path, workdir)


@pytest.mark.slow
def test_allowed_changes(finished, tmp_path):
    """A finished run goes on, in place, and its folder tells."""
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    args = (*QUICK, f"--workdir={workdir}", "--config.total_steps=62")
    result = run(*args, "--allow_changes=total_steps,schedules")
    assert result.returncode == 2
    assert "no field of configs/common.py: did you mean schedule?" in result.stderr
    result = run(*args, "--allow_changes=config.total_steps,schedule")
    assert result.returncode == 0, result.stderr
    assert "Changed from step 60 on, as allowed: total_steps: 60 -> 62" in result.stderr
    (change,) = json.loads((workdir / "changes.json").read_text())
    assert change == {"step": 60, "field": "total_steps", "old": 60, "new": 62}
    assert untimed(rows(workdir)[-1])["step"] == 62


@slow
@pytest.mark.parametrize(("moment", "step"), [(30 + 3, 30), (60 + 6 + 3, 60)])
def test_a_run_stopped_during_an_evaluation(on_one_device, tmp_path, moment, step, monkeypatch):
    """The restart runs the evaluation again, and its checkpoint can be the best one."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    config = quick_config()
    train.train(config, whole)
    with monkeypatch.context() as patch:
        patch.setattr(train.Preemption, "sync", stop_at(moment))
        with pytest.raises(Preempted, match=f"Stopped after step {step}, saved"):
            train.train(config, stopped)
    train.train(config, stopped)
    best = checkpoint.Checkpoints(stopped, config.best_metric).manager.best_step()
    assert best == checkpoint.Checkpoints(whole, config.best_metric).manager.best_step()
    for other in set(steps_in(stopped)) - set(steps_in(whole)):  # the best checkpoint until then
        assert other == 30
        shutil.rmtree(stopped / "checkpoints" / str(other))
    assert_same_run(stopped, whole)


KINDS = ("folder", "in_memory", "tfrecord", "array_record")


@slow
@pytest.mark.parametrize("kind", ["digits", *KINDS])
def test_resuming_with_everything_on(kind, image_folder, tfds_folders, tmp_path):
    """Stopped after any step and resumed, a run has the bits of one that wasn't stopped."""
    config = common.get_config()
    config.update(batch_size=16, accum_steps=2, image_size=32, total_steps=8, ema_decay=0.9)
    config.update(log_every_steps=1, eval_every_steps=0, best_metric="")
    config.update(checkpoint_every_steps=1, keep_every_steps=1)
    config.model.update(variant="Ti/16", **TINY, dropout_rate=0.1, attention_dropout_rate=0.1)
    config.model.stochastic_depth_rate = 0.1
    config.augment.update(randaugment_layers=2, erasing_prob=0.5, label_smoothing=0.1)
    config.augment.update(mixup_alpha=0.2, cutmix_alpha=1.0, mix_per_example=True)
    config.schedule.warmup_steps = 1
    names = {"digits": "digits", "folder": str(image_folder), **tfds_folders}
    config.dataset.name = names["tfrecord" if kind == "in_memory" else kind]
    config.dataset.update(shuffle_buffer=20, in_memory_mb=1 if kind == "in_memory" else 0)
    config.dataset.eval_split = "val" if kind == "folder" else "test"
    result = train.train(config, tmp_path / "whole")
    for step in (1, 2, 4, 7):
        resumed = tmp_path / f"resumed_{step}"
        shutil.copytree(tmp_path / "whole", resumed)
        for later in range(step + 1, 9):
            shutil.rmtree(resumed / "checkpoints" / str(later))
        assert train.train(config, resumed) == result
        assert_same_run(resumed, tmp_path / "whole")


def test_a_run_keeps_its_order_of_examples(tfds_folders, tmp_path):
    """A run of TFRecord files isn't resumed in the order of ArrayRecord files.

    Nor is one of an earlier version, whose parts were the processes, in that of later ones.
    """
    config = quick_config()
    config.dataset.update(name=tfds_folders["tfrecord"], channels=3, in_memory_mb=0)
    train_set, _ = input_pipeline.open_splits(config.dataset)
    recorded = configuration.resolve(config, train_set)
    assert (recorded.dataset.order, recorded.dataset.parts) == ("parts", 1)
    earlier = configuration.resolve(config, train_set, "buffer", 4)
    assert (earlier.dataset.order, earlier.dataset.parts) == ("buffer", 4)
    run_folder.write_config(tmp_path, recorded)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    config.dataset.name = tfds_folders["array_record"]
    with pytest.raises(UserError, match="dataset.order: 'parts' -> 'global'"):
        train.train(config, tmp_path)


def make_corrupt_folder(root) -> dict:
    """Writes images of which the last of each split is corrupt; returns {split: its path}."""
    corrupt = {}
    for split, count in (("train", 40), ("val", 10)):
        for i in range(count):
            path = root / split / f"class{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), 25 * (i % 2), np.uint8)).save(path)
        path.write_text("not an image")
        corrupt[split] = path
    return corrupt


def corrupt_config(root):
    config = quick_config()
    config.update(total_steps=3, batch_size=16)
    config.schedule.warmup_steps = 0
    config.dataset.update(name=str(root), eval_split="val")
    return config


@slow
def test_corrupt_examples_are_counted(on_one_device, tmp_path):
    """Training skips them, evaluation leaves them out, and the log counts them at the end."""
    path = make_corrupt_folder(tmp_path / "images")["val"]
    config = corrupt_config(tmp_path / "images")
    config.dataset.on_error = "skip"
    result = train.train(config, tmp_path / "run")
    assert np.isfinite(result["loss"])
    log = (tmp_path / "run" / "train.log").read_text()
    assert f"Skipping {path}" in log
    for split, count in (("train", 40), ("val", 10)):
        name = f"{tmp_path / 'images'}, split {split}"
        assert f"Skipped 1 of {count} examples of {name} as corrupt" in log


@pytest.mark.parametrize("split", ["train", "val"])
def test_steps_before_a_corrupt_example_are_saved(on_one_device, tmp_path, split):
    """Whether training or the evaluation after the last step meets it."""
    corrupt = make_corrupt_folder(tmp_path / "images")
    corrupt["val" if split == "train" else "train"].unlink()
    config = corrupt_config(tmp_path / "images")
    with pytest.raises(UserError, match=f"{corrupt[split]} can't be decoded"):
        train.train(config, tmp_path / "run")
    (saved,) = steps_in(tmp_path / "run")
    assert saved == 3 if split == "val" else saved in (1, 2)


def test_a_finished_run_is_left_alone(finished):
    workdir, _ = finished
    before = rows(workdir)
    result = run(*QUICK, f"--workdir={workdir}")
    assert result.returncode == 0
    assert "Test accuracy" in result.stdout
    assert rows(workdir) == before


def test_another_configuration_in_the_same_folder_is_refused(finished):
    workdir, _ = finished
    args = (*QUICK, f"--workdir={workdir}", "--config.seed=3")
    result = run(*args)
    assert result.returncode == 2
    assert "seed: 0 -> 3" in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_and_resumes_when_quick(preset, tmp_path):
    config = importlib.import_module(f"configs.{preset}").get_config("quick")
    config.total_steps = 40
    result = train.train(config, tmp_path)
    accuracy = result["patch_accuracy" if config.objective == "masked_patches" else "accuracy"]
    assert 0.1 < accuracy <= 1.0
    losses = [row["val/loss"] for row in rows(tmp_path) if "val/loss" in row]
    assert losses[-1] < losses[0]
    # Resumes from the checkpoint before the last.
    shutil.rmtree(tmp_path / "checkpoints" / "40")
    before = [untimed(row) for row in rows(tmp_path)]
    assert train.train(config, tmp_path) == result
    assert [untimed(row) for row in rows(tmp_path)] == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        *(f"vit_s16.py:recipe={recipe}" for recipe in RECIPES),
        *(f"vit_s16.py:recipe=augreg,aug={aug},reg=0.1" for aug in recipes.AUGREG),
        "vit_s16.py:dataset=imagenet21k",
        "cifar10.py:model=small",
        "cifar10.py:schedule=step",
    ],
)
def test_every_recipe_trains_when_quick(config, tmp_path):
    file, _, arg = config.partition(":")
    module = importlib.import_module(f"configs.{file.removesuffix('.py')}")
    config = module.get_config(f"{arg},quick")
    config.total_steps = 20
    result = train.train(config, tmp_path)
    assert np.isfinite(result["loss"])
    assert 0.0 < result["accuracy"] <= 1.0


@pytest.mark.slow
def test_optimizers_learn_digits_as_adamw_does(tmp_path):
    """Each at a rate of its own, in 300 steps."""
    accuracies = {}
    for name, rate, fields in (
        ("adamw", 3e-3, {}),
        ("lamb", 1e-2, {}),
        ("lion", 1e-3, {"b2": 0.99}),
        ("muon", 3e-3, {"momentum": 0.95}),
    ):
        config = quick_config(total_steps=300, eval_every_steps=0, best_metric="")
        config.optimizer.update(name=name, **fields)
        config.schedule.base_lr = rate
        accuracies[name] = train.train(config, tmp_path / name)["accuracy"]
    assert min(accuracies.values()) > 0.8
    assert min(accuracies["lamb"], accuracies["muon"]) > accuracies["adamw"] - 0.03


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_digits_are_learned(seed, tmp_path):
    """Runs the README's training command with other seeds, on one device."""
    args = ("--config=configs/digits.py", f"--config.seed={seed}", f"--workdir={tmp_path}")
    result = run(*args)
    assert result.returncode == 0, result.stderr
    assert rows(tmp_path)[-1]["val/accuracy"] >= 0.97


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one(tmp_path):
    """Runs the whole pipeline on meshes of 1 and 8 devices."""
    losses = []
    for devices in (1, 8):
        workdir = tmp_path / str(devices)
        mesh = meshes.create_mesh(devices=jax.devices()[:devices])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "create_mesh", lambda mesh=mesh, **_: mesh)
            train.train(quick_config(total_steps=30), workdir)
        losses.append([row.get("train/loss", row.get("val/loss")) for row in rows(workdir)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-4)


def test_evaluation_does_not_depend_on_the_batch_size(image_folder, tiny_config):
    """Evaluates 13 images in padded batches of eight, and one by one."""
    tiny_config.num_classes = 2
    tiny_config.dataset.update(name=str(image_folder), eval_split="val")
    _, eval_set = input_pipeline.open_splits(tiny_config.dataset)
    assert eval_set.num_examples == 13
    model = models.from_config(tiny_config)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 32, 32, 3))))
    params = randomized(shapes["params"])  # so that every image has its own loss
    eval_step = jax.jit(steps.make_eval_step(model, tiny_config))
    mesh = meshes.create_mesh(devices=jax.devices()[:1])
    results, losses = [], []
    for size in (8, 1):
        batches = input_pipeline.eval_batches(eval_set, tiny_config, batch_size=size)
        batches = list(feeding.to_devices(batches, mesh))
        results.append(accuracy.evaluate(eval_step, params, batches))
        losses += [float(eval_step(params, batch)["loss"]) for batch in batches]
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert len(set(losses[2:])) == 13


def raise_rate(monkeypatch, step: int, rate: float) -> None:
    """Makes the cosine schedule jump from 1e-3 to a rate that no configuration may have."""

    def schedule(count, *_):
        return jnp.where(count < step, 1e-3, rate)

    monkeypatch.setitem(schedules.SCHEDULES, "cosine", schedule)


@pytest.mark.slow
def test_a_run_that_diverges_keeps_its_last_checkpoint(on_one_device, tmp_path, monkeypatch):
    config = quick_config(total_steps=60, grad_clip_norm=0.0, checkpoint_every_steps=5)
    config.update(eval_every_steps=13, log_every_steps=50)
    config.optimizer.update(name="sgd", momentum=0.0)
    config.schedule.warmup_steps = 0
    raise_rate(monkeypatch, step=10, rate=1e27)
    with pytest.raises(NonFiniteError, match=r"Step 1[12]: .*lower config.schedule.base_lr"):
        train.train(config, tmp_path)
    assert steps_in(tmp_path)[-1] == 10
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    _, params = checkpoint.restore_params(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_the_best_evaluation_is_saved(on_one_device, tmp_path, monkeypatch):
    """Evaluations save checkpoints even at steps that aren't checkpoint steps."""
    config = quick_config(total_steps=40, checkpoint_every_steps=10)
    config.update(eval_every_steps=15, best_metric="loss")
    config.schedule.warmup_steps = 0
    raise_rate(monkeypatch, step=31, rate=1.0)
    train.train(config, tmp_path)
    losses = {row["step"]: row["val/loss"] for row in rows(tmp_path) if "val/loss" in row}
    assert sorted(losses) == [15, 30, 40]
    best = min(losses, key=losses.get)
    assert best < 40
    assert best in steps_in(tmp_path)


@slow
def test_a_second_ctrl_c_does_not_wait_for_a_save(on_one_device, tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("interrupted")

    def interrupted(checkpoints, step, *_):
        checkpoints.saving_step = step
        monkeypatch.setattr(checkpoints.manager, "wait_until_finished", fail)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoints, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(quick_config(total_steps=20, report=False), tmp_path / "run")
    with run_folder.Lock(tmp_path / "run"):  # another program may train there now
        pass


@pytest.mark.slow
def test_a_run_whose_folder_is_deleted_describes_itself_again(
    on_one_device, tmp_path, monkeypatch, capsys
):
    save = train.save

    def delete_before(run, step, *args):
        if step == 20:
            run.checkpoints.finish_saving()
            shutil.rmtree(tmp_path / "run")
        save(run, step, *args)

    monkeypatch.setattr(train, "save", delete_before)
    config = quick_config(total_steps=40, checkpoint_every_steps=10, eval_every_steps=40)
    result = train.train(config, tmp_path / "run")
    assert capsys.readouterr().err.count("run was moved or deleted while the run writes") == 1
    assert steps_in(tmp_path / "run") == [30, 40]
    assert evaluate.evaluate(evaluate.open_run(tmp_path / "run")).metrics[
        "accuracy"
    ] == pytest.approx(result["accuracy"])
    assert run_folder.list_files(tmp_path / "run") == [
        *("checkpoints/", "metrics.jsonl", "train.log", "config.json")
    ]


def test_a_truncated_checkpoint_is_set_aside(finished, tmp_path):
    """It is logged and moved, and the run ends with the same bits."""
    workdir, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    for path in last_checkpoint(tmp_path / "run").glob("params/**/d/*"):
        os.truncate(path, path.stat().st_size // 2)
    evaluated = forked.run_script("evaluate.py", f"--workdir={tmp_path / 'run'}")
    assert evaluated.returncode == 0
    damaged, used = evaluated.stderr.strip().splitlines()
    assert re.fullmatch(r"Checkpoint .*60/params can't be read: .*", damaged)
    assert used == "Using the checkpoint of step 40 instead"
    result = run(*QUICK, f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 0
    read, moved = result.stderr.strip().splitlines()
    assert re.search(r"60/params can't be read", read)
    assert re.search(r"_checkpoints/60", moved)
    assert_same_run(tmp_path / "run", workdir)


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
        ({"augment.crop": "center"}, "augment.crop is 'center'"),
        ({"augment.erasing_fill": "mean"}, "augment.erasing_fill is 'mean'"),
        ({"augment.mean": ("x",)}, r"config.augment.mean is \('x',\); it must be numbers"),
        ({"augment.color_jitter": (1, "x", 1)}, "color_jitter is .*; it must be numbers"),
        ({"augment.erasing_area": ("x", 1)}, "erasing_area is .*; it must be numbers"),
        ({"optimizer.lr_multipliers": ("ab",)}, "lr_multipliers is .*; it must be pairs"),
        ({"optimizer.frozen": (1,)}, r"frozen is \(1,\); it must be patterns"),
        ({"optimizer.name": "adamax"}, "optimizer.name is 'adamax'; it must be 'adamw'"),
        ({"schedule.name": "cosin"}, "schedule.name is 'cosin'"),
        ({"schedule.warmup_steps": 60}, "warmup_steps 60 must be below the run's 60 steps"),
        ({"best_metric": "f1"}, "best_metric is 'f1'"),
        ({"init_from_depth": "copy"}, "init_from_depth is 'copy'; it must be None, 'stack' or"),
        ({"num_classes": 7}, "num_classes is 7, but digits, split train makes it 10"),
        ({"dataset.order": "buffer"}, "dataset.order is 'buffer', but .* makes it 'global'"),
        ({"dtype": "float23"}, "config.dtype is 'float23'; it must be 'float32' or 'bfloat16'"),
        ({"model.pool": "none"}, "config.model.pool 'none'"),
        ({"total_steps": None}, "Neither config.num_epochs nor config.total_steps is set"),
    ],
)
def test_mistakes_stop_before_training(change, message, tmp_path):
    config = quick_config()
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message) as raised:
        train.train(config, tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([*QUICK, "--config.optimzer.b1=1"], "Unknown config.*optimizer"),
        ([*QUICK, "--config.modl.depth=1"], "'modl'.*'model'"),
        (["--config=configs/nope.py", "--config.seed=1"], "There is no preset configs/nope.py"),
        (["--config=configs/digits.py:quik"], "unknown key 'quik'.*quick"),
        (
            ["--config=configs/digit.py"],
            "There is no preset configs/digit.py; configs/ has cifar10.py, digits.py",
        ),
        (["--config=configs/digits.py", "--config.batch_size=many"], "batch_size.*'many'"),
        ([*QUICK, "--workdir=/dev/null/x"], "/dev/null/x can't be writ"),
        (
            ["--config=configs/vit_b16.py", "--config.dataset.data_dir=/nowhere"],
            "/nowhere/imagenet",
        ),
        ([], "--config=FILE is missing; configs/ has cifar10.py, digits.py"),
        ([*QUICK, "--config.init_from=w.npz"], "There is no w.npz"),
        ([*QUICK, "surplus"], "Unknown argument 'surplus'"),
        ([*QUICK, "--config.dataset=x"], "group of fields.* --config.dataset.name=x; .*eval_split"),
        ([*QUICK, "--config.mesh={'data': 8}"], "config.mesh is a group of fields.*fsdp"),
        ([*QUICK, "--config.dataset.name.x=1"], "Overrides must name a field"),
        ([*QUICK, "--config.init_from="], "--config.init_from is empty"),
        ([*QUICK, "--workdir="], "--workdir is empty.*is a shell variable unset"),
        (
            ["--config=configs/finetune.py:model=B/16"],
            "add --config.init_from=gs://vit_models/imagenet21k/ViT-B_16.npz",
        ),
    ],
)
def test_mistakes_on_the_command_line(args, message, tmp_path):
    """They print one line, without a traceback, and exit with code 2."""
    if not any(arg.startswith("--workdir") for arg in args):
        args = [*args, f"--workdir={tmp_path}"]
    result = run(*args)
    text = (result.stdout + result.stderr).strip()
    assert result.returncode == 2
    assert "Traceback" not in text
    assert re.search(message, text), text
    assert len(text.splitlines()) == 1
    assert not (tmp_path / "checkpoints").exists()
