import contextlib
import logging
import os
import pathlib
import re
import resource
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model

from vit_jax.parallel import mesh as meshes
from vit_jax.parallel import sharding
from vit_jax.runs import checkpoint, run_folder
from vit_jax.training import optim, train_state
from vit_jax.errors import UserError

IMAGE = (32, 32, 3)


@pytest.fixture
def state_and_shapes(tiny_config, one_device):
    tiny_config.ema_decay = 0.9
    model = tiny_model()
    tx, _ = optim.create(tiny_config, train_state.init_params(model, IMAGE, 0), 10)
    init, shapes = train_state.initializer(model, tx, IMAGE, tiny_config, one_device)
    return init(), shapes


def at(state, step):
    """The state with every float marked by the step."""
    marked = jax.tree.map(lambda leaf: leaf + jnp.asarray(step, leaf.dtype), state)
    return marked.replace(step=jnp.asarray(step, jnp.int32))


def steps_in(workdir):
    names = (path.name for path in (workdir / "checkpoints").iterdir())
    return sorted(int(name) for name in names if name.isdigit())


def save(workdir, state, steps, metrics=None, **kwargs):
    checkpoints = checkpoint.Checkpoints(workdir, **kwargs)
    for step in steps:
        values = None if metrics is None or step not in metrics else metrics[step]
        checkpoints.save(step, at(state, step), values)
    checkpoints.close()


def test_restores_every_bit(tmp_path, state_and_shapes):
    state, shapes = state_and_shapes
    save(tmp_path, state, [3, 7])
    checkpoints = checkpoint.Checkpoints(tmp_path)
    restored = checkpoints.restore_latest(shapes)
    checkpoints.close()
    expected = at(state, 7)
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert [leaf.dtype for leaf in jax.tree.leaves(restored)] == [
        leaf.dtype for leaf in jax.tree.leaves(expected)
    ]


def test_from_eight_devices_to_one_and_back(tmp_path, state_and_shapes):
    """Split eight ways by FSDP, whole, and split by tensor parallelism: the same bits."""
    state, _ = state_and_shapes
    for step, axes in enumerate((dict(fsdp=8), dict(), dict(fsdp=2, tensor=4)), start=1):
        mesh = meshes.create_mesh(data=1, **axes, devices=jax.devices()[: 8 if axes else 1])
        where = sharding.state_sharding(state, mesh)
        checkpoints = checkpoint.Checkpoints(tmp_path)
        shapes = jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), state, where
        )
        placed = checkpoints.restore_latest(shapes) or jax.device_put(state, where)
        assert [leaf.sharding for leaf in jax.tree.leaves(placed)] == jax.tree.leaves(where)
        jax.tree.map(np.testing.assert_array_equal, placed.replace(step=state.step), state)
        checkpoints.save(step, placed)
        checkpoints.close()


def test_keeps_the_latest_the_best_and_every_nth(tmp_path, state_and_shapes):
    state, _ = state_and_shapes
    numbers = [0.6, 0.2, 0.9, 0.3, 0.5, 0.8, 0.4, 0.7]
    metrics = {step: {"accuracy": n, "loss": n} for step, n in enumerate(numbers, 1)}
    save(tmp_path / "best", state, range(1, 9), metrics, best_metric="accuracy")
    assert steps_in(tmp_path / "best") == [3, 7, 8]
    save(tmp_path / "loss", state, range(1, 9), metrics, best_metric="loss")
    assert steps_in(tmp_path / "loss") == [2, 7, 8]
    save(tmp_path / "nth", state, range(1, 9), keep_every_steps=3)
    assert steps_in(tmp_path / "nth") == [3, 6, 7, 8]


def damage(folder: pathlib.Path, how: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    if how == "truncated":
        for path in files:
            if path.parent.name == "d":
                os.truncate(path, path.stat().st_size // 2)
    elif how == "emptied":
        for path in files:
            os.truncate(path, 0)
    else:
        for path in files:
            if "params" in path.parts:
                path.unlink()


@pytest.mark.parametrize("how", ["truncated", "emptied", "without its parameters"])
def test_a_damaged_checkpoint_gives_way(tmp_path, state_and_shapes, caplog, how):
    """The one before is taken, it is said, and the damaged step can be saved again."""
    state, shapes = state_and_shapes
    save(tmp_path, state, [3, 7])
    damage(tmp_path / "checkpoints" / "7", how)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    logging.getLogger("vit_jax").propagate = True
    with caplog.at_level(logging.WARNING, logger="vit_jax"):
        restored = checkpoints.restore_latest(shapes)
    assert int(restored.step) == 3
    jax.tree.map(np.testing.assert_array_equal, restored, at(state, 3))
    assert re.search(r"checkpoints/7\S* can't be read", caplog.text)
    assert (tmp_path / "damaged_checkpoints" / "7").exists()
    checkpoints.save(7, at(state, 7))
    checkpoints.close()
    again = checkpoint.Checkpoints(tmp_path)
    assert int(again.restore_latest(shapes).step) == 7
    again.close()


@pytest.mark.parametrize("how", ["truncated", "emptied"])
def test_when_every_checkpoint_is_damaged(tmp_path, state_and_shapes, how):
    """It is said, however often one starts, and everything stays where it is."""
    state, shapes = state_and_shapes
    save(tmp_path, state, [3, 7])
    for step in ("3", "7"):
        damage(tmp_path / "checkpoints" / step, how)
    for _ in range(2):
        with (
            pytest.raises(UserError, match=r"None of the checkpoints .*steps \[3, 7\]"),
            contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints,
        ):
            checkpoints.restore_latest(shapes)
    assert steps_in(tmp_path) == [3, 7]


def test_no_checkpoint_yet(tmp_path, state_and_shapes):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    assert checkpoints.restore_latest(state_and_shapes[1]) is None
    checkpoints.close()


def test_restore_params_needs_the_folder_alone(tmp_path, state_and_shapes, tiny_config):
    state, _ = state_and_shapes
    run_folder.write_config(tmp_path, tiny_config)
    save(tmp_path, state, [3, 7])
    config, params = checkpoint.restore_params(tmp_path)
    assert config.model.width == 32
    jax.tree.map(np.testing.assert_array_equal, params, at(state, 7).ema_params)
    _, params = checkpoint.restore_params(tmp_path, step=3)
    jax.tree.map(np.testing.assert_array_equal, params, at(state, 3).ema_params)
    with pytest.raises(UserError, match=r"No checkpoint of step 5 .* there are \[3, 7\]"):
        checkpoint.restore_params(tmp_path, step=5)
    with pytest.raises(UserError, match="is not a run's folder"):
        checkpoint.restore_params(tmp_path / "elsewhere")


def test_restore_params_of_a_damaged_run(tmp_path, state_and_shapes, tiny_config):
    """The latest that can be read; a step that was asked for is not replaced by another."""
    state, _ = state_and_shapes
    run_folder.write_config(tmp_path, tiny_config)
    save(tmp_path, state, [3, 7])
    damage(tmp_path / "checkpoints" / "7", "truncated")
    _, params = checkpoint.restore_params(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, at(state, 3).ema_params)
    with pytest.raises(UserError, match=r"No checkpoint in .* can be read \(steps \[7\]\)"):
        checkpoint.restore_params(tmp_path, step=7)


def test_a_checkpoint_of_another_model_is_named_and_left(
    tmp_path, state_and_shapes, tiny_config, one_device
):
    save(tmp_path, state_and_shapes[0], [3])
    model = tiny_model(mlp_dim=48)
    tx, _ = optim.create(tiny_config, train_state.init_params(model, IMAGE, 0), 10)
    _, shapes = train_state.initializer(model, tx, IMAGE, tiny_config, one_device)
    with (
        contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints,
        pytest.raises(
            UserError, match=r"MlpBlock_0/Dense_0/bias is \(64,\) there and \(48,\) here"
        ),
    ):
        checkpoints.restore_latest(shapes)
    assert steps_in(tmp_path) == [3]


def test_without_room_nothing_is_begun(tmp_path, state_and_shapes, caplog, monkeypatch):
    state, _ = state_and_shapes
    caplog.set_level(logging.ERROR, "vit_jax")
    checkpoints = checkpoint.Checkpoints(tmp_path)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    for step, free in ((1, size), (2, size - 1), (3, size)):
        usage = types.SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        checkpoints.save(step, at(state, step))
    checkpoints.close()
    assert re.search(r"checkpoints/2 can't be written: .* MiB of the disk are free", caplog.text)
    assert steps_in(tmp_path) == [1, 3]


def test_a_full_disk_does_not_end_the_run(tmp_path, state_and_shapes, caplog):
    """What can't be written is said each time; what is there stays; later ones are saved again."""
    state, shapes = state_and_shapes
    caplog.set_level(logging.ERROR, "vit_jax")
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, at(state, 1))
    checkpoints.finish_saving()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))  # as if the disk were full
    try:
        for step in (2, 3, 4):
            checkpoints.save(step, at(state, step))
        checkpoints.finish_saving()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for step in (2, 3, 4):
        assert f"checkpoints/{step} can't be written" in caplog.text
    assert list(checkpoints.manager.all_steps()) == [1]
    with pytest.raises(UserError, match="The last checkpoint, of step 4, couldn't be written"):
        checkpoints.close()
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(5, at(state, 5))
    checkpoints.close()
    assert steps_in(tmp_path) == [1, 5]
    restored = checkpoint.Checkpoints(tmp_path).restore_latest(shapes)
    jax.tree.map(np.testing.assert_array_equal, restored, at(state, 5))
