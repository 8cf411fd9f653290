import pytest

from vit_jax.runs import run_folder
from vit_jax.errors import UserError


def test_another_configuration_is_refused_by_field(tmp_path, tiny_config):
    run_folder.write_config(tmp_path, tiny_config)
    other = tiny_config.copy_and_resolve_references()
    other.seed = 5
    other.optimizer.b1 = 0.8
    run_folder.check_config(tmp_path, other)  # nothing is there yet that could suffer
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(UserError, match=r"optimizer.b1: 0.9 -> 0.8; seed: 0 -> 5"):
        run_folder.check_config(tmp_path, other)
    tiny_config.update(log_every_steps=3, checkpoint_every_steps=4)
    tiny_config.mesh.fsdp = 2
    run_folder.check_config(tmp_path, tiny_config)  # this doesn't change the numbers


def test_a_buffered_order_on_other_processes_is_told(tmp_path, tiny_config, caplog):
    tiny_config.dataset.update(order="buffer", parts=2)
    run_folder.write_config(tmp_path, tiny_config)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    run_folder.check_config(tmp_path, tiny_config)
    assert not caplog.records
    tiny_config.dataset.parts = 4
    run_folder.check_config(tmp_path, tiny_config)
    assert "one for each of 2 processes, and is for 4 from here on" in caplog.text


def test_what_is_recorded_is_read_again(tmp_path, tiny_config):
    assert run_folder.read_config(tmp_path) is None
    assert run_folder.read_class_names(tmp_path) is None
    run_folder.write_config(tmp_path, tiny_config)
    run_folder.write_class_names(tmp_path, ["naïve", "zebra"])
    recorded = run_folder.read_config(tmp_path)
    assert recorded.to_json_best_effort() == tiny_config.to_json_best_effort()
    assert run_folder.read_class_names(tmp_path) == ("naïve", "zebra")


@pytest.mark.parametrize("text", ['{"seed": 1', "[1, 2]", "\xff"])
def test_damaged_files_are_named(tmp_path, text):
    for name in ("config.json", "class_names.json"):
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config.json is damaged .*another --workdir"):
        run_folder.read_config(tmp_path)
    with pytest.raises(UserError, match=r"class_names.json (is damaged|holds no list).*remove it"):
        run_folder.read_class_names(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    run_folder.make(tmp_path / "a" / "run")
    assert not list((tmp_path / "a" / "run").iterdir())
    (tmp_path / "file").touch()
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    for folder in ("/proc/run", tmp_path / "file", tmp_path / "run"):
        with pytest.raises(UserError, match=f"{folder} can't be written .*--workdir"):
            run_folder.make(folder)
    with pytest.raises(UserError, match="name a folder"):
        run_folder.make("gs://bucket/run")
