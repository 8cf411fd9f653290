"""The files that describe a run."""

import contextlib
import re

import numpy as np
import pytest
from etils import epath
from whole_runs import edit_config

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.report import page
from vit_jax.runs import checkpoint, resuming, run_folder
from vit_jax.runs.checkpoint_items import read_item
from vit_jax.training import train_state


@pytest.fixture
def run(tmp_path, tiny_config):
    """The folder of a run with a checkpoint."""
    run_folder.write_config(tmp_path, tiny_config)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    return tmp_path


def test_a_run_inside_another_is_refused(run):
    for name in ("checkpoints", "checkpoints/3", "compiled/a"):
        with pytest.raises(UserError, match=f"is inside the run .*--config.init_from={run}"):
            run_folder.make(run / name)
    run_folder.make(run / "another")


def test_earlier_models_keep_their_mlp_dim(tmp_path, tiny_config):
    """Another width than the variant's used to keep the variant's mlp_dim, if none was set."""
    tiny_config.model.update(variant="S/16", mlp_dim=None)
    run_folder.write_config(tmp_path, tiny_config)
    assert models.from_config(run_folder.read_config(tmp_path)).mlp_dim == 4 * 32
    edit_config(tmp_path, lambda fields: fields.pop("loss_args"))  # a newer field
    config = run_folder.read_config(tmp_path)
    assert models.from_config(config).mlp_dim == 4 * 384
    # The recorded value resumes the run.
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(UserError, match="model.mlp_dim: 1536 -> None"):
        resuming.check_config(tmp_path, tiny_config)
    tiny_config.model.mlp_dim = 1536
    resuming.check_config(tmp_path, tiny_config)


@pytest.mark.parametrize(
    ("field", "value"), [("batch_size", "64"), ("model", []), ("augment", 3), ("dtype", None)]
)
def test_a_damaged_configuration_names_the_field(run, field, value):
    edit_config(run, lambda fields: fields.update({field: value}))
    with pytest.raises(run_folder.LostConfigError, match=f"can't be read .{field} is "):
        run_folder.read_config(run)


def test_what_is_recorded_is_read_back(tmp_path, tiny_config):
    assert run_folder.read_config(tmp_path) is None
    assert run_folder.read_class_names(tmp_path) is None
    run_folder.write_config(tmp_path, tiny_config)
    run_folder.write_class_names(tmp_path, ["naïve", "zebra"])
    recorded = run_folder.read_config(tmp_path)
    assert recorded.to_json_best_effort() == tiny_config.to_json_best_effort()
    assert run_folder.read_class_names(tmp_path) == ("naïve", "zebra")


@pytest.mark.parametrize("text", ['{"seed": 1', "[1, 2]", "\xff", "", "{}", None])
def test_a_lost_configuration_is_named(run, tiny_config, text):
    """The run isn't resumed unchecked, and its folder isn't overwritten."""
    path = run / "config.json"
    path.unlink()
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    problem = "is missing" if text is None else r"can't be read \("
    message = f"{path} {problem}.*checkpoints are untouched.*--recover_config"
    for call in (
        lambda: resuming.check_config(run, tiny_config),
        lambda: checkpoint.restore_params(run),
    ):
        with pytest.raises(UserError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)
    resuming.check_config(run, tiny_config, recover=True)
    (run / "checkpoints" / "3").rmdir()
    resuming.check_config(run, tiny_config)  # nothing would be lost


@pytest.mark.parametrize("text", ['{"seed": 1', "[1, 2]", "\xff"])
def test_corrupt_files_are_named(tmp_path, text):
    for name in ("config.json", "class_names.json"):
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config.json can't be read .*remove the file"):
        run_folder.read_config(tmp_path)
    with pytest.raises(UserError, match=r"class_names.json (is corrupt|must be a list).*remove it"):
        run_folder.read_class_names(tmp_path)


def test_what_is_no_run_is_called_that(run, tmp_path):
    with pytest.raises(UserError, match=f"20 is not a run's folder: .*; give {run}$"):
        run_folder.require_config(run / "checkpoints" / "20")
    weights = tmp_path / "some" / "folder" / "w.npz"
    weights.parent.mkdir(parents=True)
    weights.touch()
    with pytest.raises(UserError, match="w.npz is not a run's folder: it has no config.json$"):
        page.write(weights)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    run_folder.make(tmp_path / "a" / "run")
    assert not list((tmp_path / "a" / "run").iterdir())
    (tmp_path / "file").touch()
    (tmp_path / "log" / "metrics.jsonl").mkdir(parents=True)
    (tmp_path / "dangling").symlink_to("/nowhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    for folder, problem in (
        ("/proc/run", "No such file"),
        (tmp_path / "file", "File exists"),
        (tmp_path / "log", "metrics.jsonl: Is a directory"),
        (tmp_path / "run", "checkpoints: Not a directory"),
        (tmp_path / "dangling", "dangling is a dangling link to /nowhere"),
        (tmp_path / "dangling" / "run", "dangling is a dangling link to /nowhere"),
    ):
        with pytest.raises(UserError, match=rf"{folder} can't be written \(.*{problem}.*--workdir"):
            run_folder.make(folder)
    assert run_folder.checkpoint_steps(tmp_path / "run") == []
    with pytest.raises(UserError, match="must be a folder, or gs://BUCKET"):
        run_folder.make("ftp://bucket/run")


def test_checkpoints_can_be_read_again_from_any_folder_that_is_accepted(tmp_path, monkeypatch):
    """Orbax and TensorStore take some characters for a pattern or a slash."""
    tree = dict(w=np.arange(3.0))
    state = train_state.TrainState(
        step=np.int32(0), params=tree, opt_state=tree, skipped=np.int32(0)
    )
    folder = tmp_path / "{a b}\u00fc\u65e5%20#$~]"
    run_folder.make(folder)
    with contextlib.closing(checkpoint.Checkpoints(folder)) as checkpoints:
        checkpoints.save(1, state)
    params = read_item(epath.Path(folder) / "checkpoints" / "1" / "params")
    np.testing.assert_array_equal(params["w"], tree["w"])
    for character in ("[", "*", "?", "\\", "\udcff"):
        unsuitable = tmp_path / f"a{character}b"
        with pytest.raises(UserError, match=re.escape(f"has {character!r} in its path")):
            run_folder.make(unsuitable / "run")
        assert not unsuitable.exists()
    (tmp_path / "fold[1]").mkdir()
    monkeypatch.chdir(tmp_path / "fold[1]")
    with pytest.raises(UserError, match="has '\\[' in its path"):
        run_folder.make("run")
