"""Checkpoints: every bit, on any mesh, and what happens to corrupt ones and on a full disk."""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import re
import resource
import shutil
import sys
import types

import flax
import jax
import numpy as np
import pytest
from conftest import randomized, tiny_model
from etils import epath
from whole_runs import steps_in

from configs import common
from vit_jax.errors import UserError
from vit_jax.parallel import mesh as meshes
from vit_jax.parallel import sharding
from vit_jax.runs import checkpoint, checkpoint_items, run_folder
from vit_jax.runs.checkpoint_items import CorruptCheckpoint, read_item
from vit_jax.training import optim, train_state

IMAGE = (32, 32, 3)


def state_shapes(one_device, **fields):
    """The shapes of the state of a small model with an average, on one device."""
    config = common.get_config()
    config.ema_decay = 0.9
    model = tiny_model(depth=1, **fields)
    params = jax.eval_shape(lambda: train_state.init_params(model, IMAGE, 0))
    tx, _ = optim.create(config, params, total_steps=20_000)
    return train_state.initializer(model, tx, IMAGE, config, one_device)[1]


@pytest.fixture(scope="module")
def shapes(one_device):
    return state_shapes(one_device)


def at(step: int, shapes):
    """A random state of a step."""
    state = jax.tree.map(
        lambda leaf, shape: leaf.astype(shape.dtype), randomized(shapes, step), shapes
    )
    state = state.replace(step=np.int32(step), skipped=np.int32(2 * step))
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, shapes))


def no_init():
    raise AssertionError("no item is new")


def save(workdir, shapes, steps, metrics=None, **kwargs):
    checkpoints = checkpoint.Checkpoints(workdir, **kwargs)
    for step in steps:
        checkpoints.save(step, at(step, shapes), metrics and metrics[step])
    checkpoints.close()


def restore(workdir, shapes, init=no_init):
    with contextlib.closing(checkpoint.Checkpoints(workdir)) as checkpoints:
        return checkpoints.restore_latest(shapes, init)


def assert_same(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, tree, expected)
    for leaf, other in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == other.dtype


def test_the_latest_is_restored_to_the_bit(tmp_path, shapes):
    assert restore(tmp_path, shapes) is None
    save(tmp_path, shapes, [3, 7])
    assert_same(restore(tmp_path, shapes), at(7, shapes))


def test_unfinished_checkpoints_are_gone_once_it_is_open(tmp_path):
    """A removal that went on would take what another manager writes at the same step."""
    for step in range(200):
        item = tmp_path / "checkpoints" / f"{step}.orbax-checkpoint-tmp" / "params"
        item.mkdir(parents=True)
        (item / "d").write_text("unfinished")
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)):
        assert not list((tmp_path / "checkpoints").iterdir())


def test_any_mesh_restores_what_another_saved(tmp_path, shapes):
    """FSDP over eight devices, then one device, then tensor parallelism: the same bits."""
    block = shapes.params["Transformer"]["encoderblock_0"]  # a few parameters are quicker
    params = {"Transformer": {"encoderblock_0": {"MlpBlock_0": block["MlpBlock_0"]}}}
    shapes = shapes.replace(params=params, opt_state=params, ema_params=None)
    state = at(1, shapes)
    for step, axes in enumerate((dict(fsdp=8), dict(), dict(fsdp=2, tensor=4)), start=1):
        mesh = meshes.create_mesh(data=1, **axes, devices=jax.devices()[: 8 if axes else 1])
        shardings = sharding.state_sharding(state, mesh)
        expected = jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            state,
            shardings,
        )
        with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
            restored = checkpoints.restore_latest(expected, no_init)
            restored = restored or jax.device_put(state, shardings)
            assert [leaf.sharding for leaf in jax.tree.leaves(restored)] == jax.tree.leaves(
                shardings
            )
            assert_same(restored.replace(step=state.step), state)
            checkpoints.save(step, restored)


def test_the_latest_two_the_best_and_every_nth_are_kept(tmp_path):
    weights, zero = dict(w=np.ones(2)), np.int32(0)
    state = train_state.TrainState(step=zero, params=weights, opt_state=weights, skipped=zero)
    values = {1: 0.6, 2: 0.9, 3: 0.3, 4: 0.5, 5: 0.8}
    for options, kept in (
        (dict(best_metric="accuracy"), [2, 4, 5]),
        (dict(best_metric="loss"), [3, 4, 5]),
        (dict(best_metric="accuracy", keep_every_steps=3), [2, 3, 4, 5]),
    ):
        workdir = tmp_path / "_".join(map(str, options.values()))
        with contextlib.closing(checkpoint.Checkpoints(workdir, **options)) as checkpoints:
            for step, value in values.items():
                checkpoints.save(step, state, dict(accuracy=value, loss=value))
        assert steps_in(workdir) == kept


@flax.struct.dataclass(kw_only=True)
class ExtendedState(train_state.TrainState):
    """A state with fields that somebody added."""

    anchor: dict
    restarts: jax.Array
    mean_loss: jax.Array
    class_counts: jax.Array


def test_every_field_of_a_state_is_stored(tmp_path, shapes):
    fields = {field.name: getattr(shapes, field.name) for field in dataclasses.fields(shapes)}
    sharding = shapes.step.sharding
    extended = ExtendedState(
        **fields,
        anchor=shapes.params,
        restarts=shapes.step,
        mean_loss=jax.ShapeDtypeStruct((), np.float32, sharding=sharding),
        class_counts=jax.ShapeDtypeStruct((10,), np.int32, sharding=sharding),
    )
    state = at(20, extended).replace(
        restarts=jax.device_put(np.int32(7), sharding),
        mean_loss=jax.device_put(np.float32(0.75), sharding),
    )
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(20, state)
    assert_same(restore(tmp_path, extended), state)


def test_checkpoints_without_the_best_metric_are_never_the_best(tmp_path):
    """The metric may have been added to the code, or chosen, since they were saved."""
    weights, zero = dict(w=np.ones(2)), np.int32(0)
    state = train_state.TrainState(step=zero, params=weights, opt_state=weights, skipped=zero)
    values = {1: dict(loss=0.1), 2: dict(loss=0.5, accuracy=0.2), 3: dict(loss=0.4, accuracy=0.1)}
    for best_metric, steps in (("loss", [1]), ("accuracy", [2, 3, 4, 5])):
        with contextlib.closing(checkpoint.Checkpoints(tmp_path, best_metric)) as checkpoints:
            for step in steps:
                checkpoints.save(step, state, values.get(step))
    assert steps_in(tmp_path) == [2, 4, 5]


def test_an_item_that_is_new_starts_at_its_initial_value(tmp_path, shapes, caplog):
    """A checkpoint from before the code stored an item is not corrupt."""
    save(tmp_path, shapes.replace(ema_params=None), [3])
    logging.getLogger("vit_jax").propagate = True
    with caplog.at_level(logging.INFO, logger="vit_jax"):
        restored = restore(tmp_path, shapes, init=lambda: at(0, shapes))
    expected = at(3, shapes.replace(ema_params=None))
    assert_same(restored, expected.replace(ema_params=at(0, shapes).ema_params))
    assert re.search(r"checkpoints/3 was saved without ema_params, which starts at", caplog.text)
    assert steps_in(tmp_path) == [3]


def corrupt(folder: pathlib.Path, how: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    if how == "truncated":
        for path in files:
            if path.parent.name == "d":
                os.truncate(path, path.stat().st_size // 2)
    elif how == "empty":
        for path in files:
            os.truncate(path, 0)
    elif how == "without an item":
        shutil.rmtree(folder / "ema_params")
    elif how == "without parameters in its list":  # only items that are newer may be missing
        metadata = folder / "_CHECKPOINT_METADATA"
        contents = json.loads(metadata.read_text())
        del contents["item_handlers"]["params"]
        metadata.write_text(json.dumps(contents))
        shutil.rmtree(folder / "params")


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        pytest.param("empty", marks=pytest.mark.slow),
        pytest.param("without an item", marks=pytest.mark.slow),
        "without parameters in its list",
    ],
)
def test_a_corrupt_checkpoint_gives_way_to_the_one_before(tmp_path, shapes, caplog, how):
    """It is logged and moved, and its step can be saved again."""
    save(tmp_path, shapes, [3, 7])
    corrupt(tmp_path / "checkpoints" / "7", how)
    logging.getLogger("vit_jax").propagate = True
    with (
        caplog.at_level(logging.WARNING, logger="vit_jax"),
        contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints,
    ):
        assert_same(checkpoints.restore_latest(shapes, no_init), at(3, shapes))
        checkpoints.save(7, at(7, shapes))
    assert re.search(r"checkpoints/7\S* can't be read", caplog.text)
    assert (tmp_path / "corrupt_checkpoints" / "7").exists()
    assert_same(restore(tmp_path, shapes), at(7, shapes))


def test_reads_that_a_damaged_file_leaves_unfinished_print_nothing(tmp_path, shapes, caplog):
    """asyncio logs their tasks when Python frees them, which may be much later."""
    save(tmp_path, shapes, [3])
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "params" / "ocdbt.process_0")
    with pytest.raises(CorruptCheckpoint, match="a file is missing, damaged or cut short .*Error"):
        read_item(epath.Path(tmp_path / "checkpoints" / "3" / "params"))
    for module in ("orbax/checkpoint/_src/serialization/serialization.py", "mine.py"):
        logging.getLogger("asyncio").error(
            f"Task exception was never retrieved\nfuture: <Task finished coro=<f() at {module}:1>>"
        )
    assert "mine.py" in caplog.text
    assert "orbax" not in caplog.text
    assert sys.unraisablehook.func is checkpoint_items.report_others
    reported = []
    for error in (RuntimeError("Event loop is closed"), RuntimeError("mine")):
        unraisable = types.SimpleNamespace(exc_value=error)
        checkpoint_items.report_others(reported.append, unraisable)
    assert [str(unraisable.exc_value) for unraisable in reported] == ["mine"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["truncated", "empty"])
def test_if_every_checkpoint_is_corrupt_the_run_does_not_start_over(tmp_path, shapes, how):
    """Each start raises the same error, and moves nothing."""
    save(tmp_path, shapes, [3])
    corrupt(tmp_path / "checkpoints" / "3", how)
    for _ in range(2):
        with pytest.raises(UserError, match=r"None of the checkpoints .*steps \[3\]"):
            restore(tmp_path, shapes)
    assert steps_in(tmp_path) == [3]


def test_restore_params_needs_only_the_folder(tmp_path, shapes, tiny_config):
    tiny_config.ema_decay = 0.9
    run_folder.write_config(tmp_path, tiny_config)
    save(tmp_path, shapes, [3, 7])
    config, params = checkpoint.restore_params(tmp_path)
    assert config.model.width == 32
    assert_same(params, at(7, shapes).ema_params)
    assert_same(checkpoint.restore_params(tmp_path, step=3)[1], at(3, shapes).ema_params)
    assert_same(checkpoint.restore_params(tmp_path, item="params")[1], at(7, shapes).params)
    with pytest.raises(UserError, match=r"No checkpoint of step 5 .* its steps are \[3, 7\]"):
        checkpoint.restore_params(tmp_path, step=5)
    with pytest.raises(UserError, match="is not a run's folder"):
        checkpoint.restore_params(tmp_path / "elsewhere")
    # The latest that can be read, unless a step is given.
    corrupt(tmp_path / "checkpoints" / "7", "truncated")
    assert_same(checkpoint.restore_params(tmp_path)[1], at(3, shapes).ema_params)
    with pytest.raises(UserError, match=r"No checkpoint in .* can be read \(steps \[7\]\)"):
        checkpoint.restore_params(tmp_path, step=7)


def test_a_renamed_checkpoint_is_refused(tmp_path, shapes):
    save(tmp_path, shapes, [20])
    (tmp_path / "checkpoints" / "20").rename(tmp_path / "checkpoints" / "30")
    with pytest.raises(UserError, match="checkpoints/30 was saved as step 20: rename it back"):
        restore(tmp_path, shapes)


def test_a_checkpoint_that_may_not_be_read_is_not_corrupt(tmp_path, shapes, monkeypatch):
    save(tmp_path, shapes, [20])
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="20 can't be read: permission denied"):
        restore(tmp_path, shapes)
    assert steps_in(tmp_path) == [20]


def test_a_checkpoint_of_another_model_is_named_and_kept(tmp_path, shapes, one_device):
    save(tmp_path, shapes, [3])
    message = r"Dense_0/bias is \(64,\) in the checkpoint and \(48,\) in the configured model"
    with pytest.raises(UserError, match=message):
        restore(tmp_path, state_shapes(one_device, mlp_dim=48))
    assert steps_in(tmp_path) == [3]


def test_a_checkpoint_that_the_disk_has_no_room_for_is_not_begun(
    tmp_path, shapes, caplog, monkeypatch
):
    caplog.set_level(logging.ERROR, "vit_jax")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(at(1, shapes)))
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
        for step, free in ((1, size), (2, size - 1), (3, size)):
            usage = types.SimpleNamespace(free=free)
            monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
            checkpoints.save(step, at(step, shapes))
    assert re.search(r"checkpoints/2 can't be written: .* the disk has .* MiB free", caplog.text)
    assert steps_in(tmp_path) == [1, 3]


def test_a_folder_that_is_gone_is_named(tmp_path, shapes):
    with contextlib.closing(checkpoint.Checkpoints(tmp_path / "run")) as checkpoints:
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(UserError, match="checkpoints is gone: was the run's folder moved"):
            checkpoints.save(1, at(1, shapes))


def test_what_is_never_saved_cannot_be_kept(tiny_config):
    tiny_config.update(checkpoint_every_steps=4, eval_every_steps=10, best_metric="")
    for every, fits in ((8, True), (7, False), (10, False), (0, True)):
        tiny_config.keep_every_steps = every
        if fits:
            checkpoint.check(tiny_config)
        else:
            with pytest.raises(UserError, match=f"keep_every_steps is {every}; .* multiple of"):
                checkpoint.check(tiny_config)
    tiny_config.update(best_metric="accuracy", keep_every_steps=10)
    checkpoint.check(tiny_config)


def test_a_full_disk_does_not_end_the_run(tmp_path, shapes, caplog):
    """Each failed save is logged, existing checkpoints stay, and later ones can be saved."""
    caplog.set_level(logging.ERROR, "vit_jax")
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, at(1, shapes))
    checkpoints.finish_saving()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))  # acts like a full disk
    try:
        for step in (2, 3):
            checkpoints.save(step, at(step, shapes))
        checkpoints.finish_saving()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for step in (2, 3):
        assert f"checkpoints/{step} can't be written" in caplog.text
    assert list(checkpoints.manager.all_steps()) == [1]
    with pytest.raises(UserError, match="The last checkpoint, of step 3, couldn't be written"):
        checkpoints.close()
    save(tmp_path, shapes, [5])
    assert steps_in(tmp_path) == [1, 5]
    assert_same(restore(tmp_path, shapes), at(5, shapes))


def test_a_save_that_fails_late_is_named_by_its_own_step(tmp_path, shapes, caplog, monkeypatch):
    """A bucket can be gone while a checkpoint is written, and stay so; Orbax raises it twice."""

    def fail():
        raise OSError("the bucket is gone")

    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, at(1, shapes))
    checkpoints.manager.wait_until_finished()
    checkpoints.log_failure("the logs can't be written", 2)
    for method in ("wait_until_finished", "close"):
        monkeypatch.setattr(checkpoints.manager, method, fail)
    with pytest.raises(UserError, match="The last checkpoint, of step 2, couldn't be written"):
        checkpoints.close()
    assert "checkpoints/1 can't be written: the bucket is gone" in caplog.text
    assert caplog.text.count("checkpoints/2 can't be written") == 1


def test_two_programs_cannot_train_in_one_folder(tmp_path):
    with run_folder.Lock(tmp_path) as first:
        assert not first.is_lost
        with (
            pytest.raises(UserError, match="Another program trains in"),
            run_folder.Lock(tmp_path),
        ):
            pass
    with run_folder.Lock(tmp_path):
        pass
