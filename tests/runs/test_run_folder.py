"""The files that describe a run, and which changes of its configuration a resumed run allows."""

import json

import pytest

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.runs import run_folder


@pytest.fixture
def run(tmp_path, tiny_config):
    """The folder of a run with a checkpoint."""
    run_folder.write_config(tmp_path, tiny_config)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    return tmp_path


def edit_config(workdir, edit) -> None:
    """Changes what a run's config.json holds."""
    fields = json.loads((workdir / "config.json").read_text())
    edit(fields)
    (workdir / "config.json").write_text(json.dumps(fields))


def test_fields_that_must_not_change_are_listed(run, tiny_config):
    tiny_config.seed = 5
    tiny_config.optimizer.b1 = 0.8
    tiny_config.model.resnet = dict(num_layers=(1,), width_factor=1)
    with pytest.raises(UserError, match="recorded") as raised:
        run_folder.check_config(run, tiny_config)
    for change in ("optimizer.b1: 0.9 -> 0.8", "seed: 0 -> 5", "model.resnet: None -> {'num_lay"):
        assert change in str(raised.value)
    assert "extended" not in str(raised.value)
    (run / "checkpoints" / "3").rmdir()
    run_folder.check_config(run, tiny_config)  # nothing would be lost


def test_fields_that_may_change(run, tiny_config):
    tiny_config.update(log_every_steps=3, checkpoint_every_steps=4, init_from_hint="another")
    tiny_config.mesh.fsdp = 2
    run_folder.check_config(run, tiny_config)


@pytest.mark.parametrize("change", [dict(total_steps=48), {"schedule.warmup_steps": 2}])
def test_a_run_cannot_be_extended_in_place(run, tiny_config, change):
    tiny_config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=f"can't be extended .*--config.init_from={run} in another"):
        run_folder.check_config(run, tiny_config)


def test_fields_that_the_code_gained_are_ignored(run, tiny_config):
    def edit(fields):
        fields["model"]["forgotten"] = None
        del fields["loss_args"], fields["optimizer"]["layer_decay"]

    edit_config(run, edit)
    tiny_config.optimizer.layer_decay = 0.5
    run_folder.check_config(run, tiny_config)
    tiny_config.seed = 5
    with pytest.raises(UserError, match="seed: 0 -> 5"):
        run_folder.check_config(run, tiny_config)


def test_a_run_with_a_setting_that_the_code_lost_is_not_resumed(run, tiny_config):
    edit_config(run, lambda fields: fields["model"].update(forgotten=3))
    with pytest.raises(UserError, match="model.forgotten: 3 -> None"):
        run_folder.check_config(run, tiny_config)


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
        run_folder.check_config(tmp_path, tiny_config)
    tiny_config.model.mlp_dim = 1536
    run_folder.check_config(tmp_path, tiny_config)


def test_a_buffered_order_on_another_number_of_processes_warns(tmp_path, tiny_config, caplog):
    tiny_config.dataset.update(order="buffer", parts=2)
    run_folder.write_config(tmp_path, tiny_config)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    run_folder.check_config(tmp_path, tiny_config)
    assert not caplog.records
    tiny_config.dataset.parts = 4
    run_folder.check_config(tmp_path, tiny_config)
    assert "in 2 parts, one for each process, and from now on in 4" in caplog.text


def test_what_is_recorded_is_read_back(tmp_path, tiny_config):
    assert run_folder.read_config(tmp_path) is None
    assert run_folder.read_class_names(tmp_path) is None
    run_folder.write_config(tmp_path, tiny_config)
    run_folder.write_class_names(tmp_path, ["naïve", "zebra"])
    recorded = run_folder.read_config(tmp_path)
    assert recorded.to_json_best_effort() == tiny_config.to_json_best_effort()
    assert run_folder.read_class_names(tmp_path) == ("naïve", "zebra")


@pytest.mark.parametrize("text", ['{"seed": 1', "[1, 2]", "\xff"])
def test_corrupt_files_are_named(tmp_path, text):
    for name in ("config.json", "class_names.json"):
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config.json is corrupt .*another --workdir"):
        run_folder.read_config(tmp_path)
    with pytest.raises(UserError, match=r"class_names.json (is corrupt|must be a list).*remove it"):
        run_folder.read_class_names(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    run_folder.make(tmp_path / "a" / "run")
    assert not list((tmp_path / "a" / "run").iterdir())
    (tmp_path / "file").touch()
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    for folder in ("/proc/run", tmp_path / "file", tmp_path / "run"):
        with pytest.raises(UserError, match=f"{folder} can't be written .*--workdir"):
            run_folder.make(folder)
    with pytest.raises(UserError, match="must be a folder, not a bucket"):
        run_folder.make("gs://bucket/run")
