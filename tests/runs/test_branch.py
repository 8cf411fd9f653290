"""Branches: runs that go on from a checkpoint of another run."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from whole_runs import (
    assert_same_checkpoint,
    quick_config,
    restore_item,
    rows,
    steps_in,
    untimed_rows,
)

import input_pipeline
import train
from vit_jax import checkpoint
from vit_jax.errors import UserError
from vit_jax.parallel import mesh as meshes
from vit_jax.runs import branch, resuming
from vit_jax.training.program import Program

pytestmark = pytest.mark.usefixtures("on_one_device")


def source_config(**fields):
    config = quick_config(total_steps=20, ema_decay=0.9, log_every_steps=1, eval_every_steps=10)
    config.update(checkpoint_every_steps=5, keep_every_steps=5)
    config.schedule.update(name="rsqrt", timescale=10, warmup_steps=4)
    config.update_from_flattened_dict(fields)
    return config


@pytest.fixture(scope="module")
def source(tmp_path_factory, one_device):
    """A finished run with checkpoints of the steps 5, 10, 15 and 20."""
    workdir = tmp_path_factory.mktemp("runs") / "source"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "create_mesh", lambda **_: one_device)
        train.train(source_config(), workdir)
    return workdir


def branch_of(path, **fields):
    return source_config(init_from=str(path), init_mode="continue", **fields)


def without(workdir, *steps):
    for step in steps:
        shutil.rmtree(workdir / "checkpoints" / str(step))


def rows_after(workdir, step: int) -> list[dict]:
    return [row for row in untimed_rows(workdir) if row["step"] > step]


class Killed(BaseException):
    """Ends a run as a kill would."""


def test_an_unchanged_branch_has_the_bits_of_its_run(source, tmp_path, monkeypatch):
    """Also if it was killed before its first checkpoint, and after it."""
    left, workdir = shutil.copytree(source, tmp_path / "left"), tmp_path / "branch"
    without(left, 15, 20)
    config = branch_of(left)
    with monkeypatch.context() as patch:
        patch.setattr(train.checkpoint.Checkpoints, "save", lambda *_: raise_killed())
        with pytest.raises(Killed):
            train.train(config, workdir)
    assert steps_in(workdir) == []
    assert [row["step"] for row in rows(workdir)] == [11, 12, 13, 14, 15]
    # The run that it leaves has later checkpoints by now.
    for step in ("15", "20"):
        shutil.copytree(source / "checkpoints" / step, left / "checkpoints" / step)
    train.train(config, workdir)
    assert steps_in(workdir) == [15, 20]
    assert_same_checkpoint(workdir, source, 20)
    assert untimed_rows(workdir) == rows_after(source, 10)
    assert len((workdir / "earlier_metrics.jsonl").read_text().splitlines()) == 5
    recorded = json.loads((workdir / "branch.json").read_text())
    expected = dict(run=str(left), step=10, examples_seen=640, seed=0, changes=[])
    assert recorded.items() >= expected.items()

    shutil.rmtree(left)
    without(workdir, 20)
    train.train(config, workdir)  # resumes from its own checkpoint
    assert_same_checkpoint(workdir, source, 20)
    assert untimed_rows(workdir) == rows_after(source, 10)


def raise_killed():
    raise Killed


def test_a_cool_down(source, tmp_path, caplog):
    """A run without it is cooled down from an earlier step."""
    fields = {"schedule.cooldown_steps": 3, "total_steps": 15}
    train.train(branch_of(source / "checkpoints" / "10", **fields), tmp_path / "branch")
    rates, stable = (
        {row["step"]: row["train/learning_rate"] for row in rows_after(folder, 10) if len(row) > 4}
        for folder in (tmp_path / "branch", source)
    )
    assert list(rates) == [11, 12, 13, 14, 15]
    for step, share in zip(rates, (1, 1, 1, 2 / 3, 1 / 3), strict=True):
        assert rates[step] == pytest.approx(share * stable[step], rel=1e-6)
    changes = json.loads((tmp_path / "branch" / "branch.json").read_text())["changes"]
    assert changes == [
        {"field": "schedule.cooldown_steps", "old": 0, "new": 3},
        {"field": "total_steps", "old": 20, "new": 15},
    ]
    log = (tmp_path / "branch" / "train.log").read_text()
    assert f"Branch       of {source}, step 10" in log
    assert "Changed      schedule.cooldown_steps: 0 -> 3; total_steps: 20 -> 15" in log


@pytest.mark.slow
def test_what_may_be_changed(source, tmp_path):
    """The optimizer's numbers, the batch, the seed, the average; and a branch may be left too."""
    first, second = tmp_path / "first", tmp_path / "second"
    config = branch_of(source / "checkpoints" / "10", total_steps=12, batch_size=32, seed=1)
    config.update(ema_decay=None, grad_clip_norm=0.0, accum_steps=2, dtype="bfloat16")
    config.optimizer.update(weight_decay=0.0, mu_dtype="float32", b1=0.8)
    config.model.dropout_rate = 0.1
    train.train(config, first)
    for text in (
        "640 were seen; goes on with the next, in epoch 1, in batches of 32 instead of 64, in the "
        "order of seed 1",
        "ema_decay: 0.9 -> None",
    ):
        assert text in (first / "train.log").read_text()
    assert restore_item(first / "checkpoints" / "12" / "opt_state")

    train.train(branch_of(first, total_steps=13, ema_decay=0.5), second)
    assert json.loads((second / "branch.json").read_text())["examples_seen"] == 640 + 2 * 32
    before, after = (
        restore_item(folder / "checkpoints" / step / "params")["head"]["bias"]
        for folder, step in ((first, "12"), (second, "13"))
    )
    average = restore_item(second / "checkpoints" / "13" / "ema_params")["head"]["bias"]
    np.testing.assert_allclose(average, (before + after) / 2, rtol=1e-5, atol=1e-7)


def test_on_another_mesh(source, tmp_path):
    mesh = meshes.create_mesh(data=2, fsdp=2, tensor=2)
    config = branch_of(source / "checkpoints" / "10", num_classes=10)
    program = Program(config, (16, 16, 1), mesh)
    origin = branch.find(config, tmp_path / "branch")
    state = branch.restore(origin, program.shapes, program.init)
    for item in ("params", "opt_state", "ema_params"):
        expected = jax.tree.leaves(restore_item(origin.folder / item))
        leaves = jax.tree.leaves(getattr(state, item))
        for leaf, other in zip(leaves, expected, strict=True):
            assert leaf.sharding.mesh == mesh
            np.testing.assert_array_equal(leaf, other)
    assert int(state.step) == 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["array_record", "tfrecord"])
def test_another_batch_size_goes_on_with_the_next_example(kind, tfds_folders, plain):
    """In both orders; the 53 examples of an epoch all come once."""
    plain.dataset.update(name=tfds_folders[kind], eval_split="test")
    train_set, _ = input_pipeline.open_splits(plain.dataset)

    def images(config, first_step, count):
        batches = input_pipeline.train_batches(train_set, config, first_step=first_step)
        steps = itertools.islice(batches, count // config.batch_size)
        return np.concatenate([batch["images"] for batch in steps])

    whole = images(plain, 0, 96)
    changed = plain.copy_and_resolve_references()
    for batch_size in (4, 24):
        changed.batch_size = batch_size
        config = resuming.continue_data_order(plain, 6, changed)
        np.testing.assert_array_equal(images(config, 6, 48), whole[48:96])
        # And back, in a branch of the branch.
        step, plain.batch_size = 6 + 24 // batch_size, 8
        config = resuming.continue_data_order(config, step, plain)
        np.testing.assert_array_equal(images(config, step, 24), whole[72:96])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"total_steps": 10}, "total_steps is 10; it counts from the first step of .* above 10"),
        ({"model.num_heads": 2}, r"with another model .*model.num_heads: 4 -> 2\. Use"),
        ({"model.depth": 2}, "another model .*: model.depth: 1 -> 2"),
        ({"model.gelu": "exact"}, "another model .*: model.gelu: 'tanh' -> 'exact'"),
        ({"image_size": 24}, "another model .*: image_size: 16 -> 24"),
        ({"optimizer.name": "sgd"}, "another optimizer .*: optimizer.name: 'adamw' -> 'sgd'"),
        ({"optimizer.layer_decay": 0.5}, "another optimizer .*: optimizer.layer_decay: None -> 0"),
        ({"optimizer.frozen": ("head",)}, "another optimizer .*: optimizer.frozen: "),
        ({"init_from_depth": "stack"}, "init_from_depth is 'stack', which adapts weights"),
        ({"dataset.offset": 8}, "dataset.offset is 8; it must be 0: branches set it"),
        ({"init_mode": "branch"}, "init_mode is 'branch'; it must be 'weights' or 'continue'"),
        ({"init_from": None}, "which needs --config.init_from=RUN/checkpoints/STEP"),
    ],
)
def test_what_cannot_go_on_is_refused_by_name(source, tmp_path, fields, message):
    config = branch_of(source / "checkpoints" / "10")
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=message) as raised:
        train.train(config, tmp_path / "branch")
    assert "\n" not in str(raised.value)


def test_checkpoints_that_cannot_go_on(source, tmp_path):
    config = branch_of(source / "checkpoints" / "10", num_classes=5)
    origin = branch.find(config, tmp_path / "branch")
    with pytest.raises(UserError, match="another model .*: num_classes: 10 -> 5"):
        branch.check_compatible(origin, config)
    config.objective = "masked_patches"
    with pytest.raises(UserError, match="another objective .*: objective: .?classes.? -> "):
        branch.check_compatible(origin, config)
    left = shutil.copytree(source, tmp_path / "left")
    (left / "checkpoints" / "10" / "opt_state" / "_METADATA").unlink()
    with pytest.raises(UserError, match="10/opt_state can't be read.*branch from another step"):
        train.train(branch_of(left / "checkpoints" / "10"), tmp_path / "branch")
    (left / "checkpoints" / "15" / "_CHECKPOINT_METADATA").write_text("{")
    origin = branch.find(branch_of(left / "checkpoints" / "15"), tmp_path / "branch")
    shapes = Program(branch_of(left, num_classes=10), (16, 16, 1), meshes.create_mesh()).shapes
    with pytest.raises(UserError, match="15/.* can't be read: Expecting.*branch from another step"):
        branch.restore(origin, shapes, None)


def test_the_place_in_the_order_outlives_a_lost_configuration(tmp_path):
    """With another batch size it is not what the given configuration would make it."""
    (tmp_path / "checkpoints" / "15").mkdir(parents=True)
    (tmp_path / "branch.json").write_text(json.dumps({"step": 10, "examples_seen": 640}))
    config = branch.inherit(None, tmp_path, branch_of(tmp_path / "gone", batch_size=32))
    assert config.dataset.offset + 10 * 32 == 640


def test_paths_that_cannot_be_left(source, tmp_path):
    for path, message in (
        (source / "checkpoints" / "7", r"No checkpoint of step 7 .*\[5, 10, 15, 20\]"),
        (source / "checkpoints" / "10" / "params", "must be a run's folder or RUN/checkpoints"),
        (tmp_path / "w.npz", "must be a run's folder or RUN/checkpoints/STEP"),
    ):
        with pytest.raises(UserError, match=message):
            branch.find(branch_of(path), tmp_path / "branch")
    best = branch.find(branch_of(source / "checkpoints" / "best"), tmp_path / "branch")
    assert best.step == checkpoint.best_step(source)
    with pytest.raises(UserError, match="is in --workdir.* a branch needs a folder of its own"):
        branch.find(branch_of(source / "checkpoints" / "10"), source)
