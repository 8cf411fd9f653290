"""Which changes of its configuration a resumed run allows."""

import contextlib
import json
import logging

import pytest
from whole_runs import edit_config

from vit_jax.errors import UserError
from vit_jax.runs import resuming, run_folder


@pytest.fixture
def run(tmp_path, tiny_config):
    """The folder of a run with a checkpoint."""
    run_folder.write_config(tmp_path, tiny_config)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    return tmp_path


def test_fields_that_must_not_change_are_listed(run, tiny_config):
    tiny_config.seed = 5
    tiny_config.optimizer.b1 = 0.8
    tiny_config.model.resnet = dict(num_layers=(1,), width_factor=1)
    with pytest.raises(UserError, match="recorded") as raised:
        resuming.check_config(run, tiny_config)
    for change in ("optimizer.b1: 0.9 -> 0.8", "seed: 0 -> 5", "model.resnet: None -> {'num_lay"):
        assert change in str(raised.value)
    assert "extended" not in str(raised.value)
    (run / "checkpoints" / "3").rmdir()
    resuming.check_config(run, tiny_config)  # nothing would be lost


# Every field that the run computes the same with, or the same up to rounding; a group's name stands
# for its fields. Any other field of configs/common.py is refused.
FREE = (
    *("log_every_steps", "wandb", "eval_every_steps", "evals", "report", "mesh", "num_epochs"),
    *("checkpoint_every_steps", "keep_every_steps", "best_metric", "on_nonfinite", "init_from"),
    *("init_mode", "init_from_depth", "init_from_patch", "init_from_grid", "init_from_required"),
    *("init_from_hint", "init_from_resize", "dataset.on_error", "dataset.data_dir"),
    *("dataset.eval_cache_mb", "dataset.in_memory_mb", "dataset.shuffle_buffer", "dataset.offset"),
    *("model.attention_impl", "model.remat", "model.head_bias_init"),
)


def test_each_field_may_change_or_is_refused(run, tiny_config):
    tiny_config.dataset.update(order="global", fingerprint="a")
    run_folder.write_config(run, tiny_config)
    free = set()
    for field, value in resuming.as_flat_dict(tiny_config).items():
        config = tiny_config.copy_and_resolve_references()
        with config.ignore_type(), config.unlocked():
            other = value + 1 if isinstance(value, (int, float)) else f"another {value}"
            config.update_from_flattened_dict({field: other})
        with contextlib.suppress(UserError):
            resuming.check_config(run, config)
            free.add(field)
    listed = {field for field in resuming.as_flat_dict(tiny_config) if resuming.is_in(field, FREE)}
    # A name may differ if the fingerprint doesn't, and a cool-down that the schedule doesn't have.
    assert free == listed | {"dataset.name", "dataset.train_split", "schedule.cooldown_steps"}
    tiny_config.schedule.name = "constant"
    run_folder.write_config(run, tiny_config)
    tiny_config.schedule.cooldown_steps = 2
    with pytest.raises(UserError, match="schedule.cooldown_steps: 0 -> 2"):
        resuming.check_config(run, tiny_config)


def test_names_of_other_data_are_refused(run, tiny_config):
    """If there is no fingerprint, or an earlier one of TFDS, which doesn't tell splits apart."""
    tiny_config.dataset.train_split = "train[:50%]"
    with pytest.raises(UserError, match=r"dataset.train_split: 'train' -> 'train\[:50%\]'"):
        resuming.check_config(run, tiny_config)
    tiny_config.dataset.update(train_split="train", fingerprint="a/1.0.0, 9 examples")
    run_folder.write_config(run, tiny_config)
    tiny_config.dataset.fingerprint = "a/1.0.0, 9 examples in 2 files, 0123"
    tiny_config.dataset.name = "elsewhere"
    resuming.check_config(run, tiny_config)
    tiny_config.dataset.train_split = "train[50%:]"
    with pytest.raises(UserError, match="dataset.train_split: "):
        resuming.check_config(run, tiny_config)
    tiny_config.dataset.update(train_split="train", fingerprint="a/1.0.1, 9 examples in 2 files, 4")
    with pytest.raises(UserError, match=r"fingerprint: 'a/1.0.0, .* -> 'a/1.0.1.* another version"):
        resuming.check_config(run, tiny_config)


def test_what_a_run_began_from_stays_recorded(run, tiny_config, caplog):
    tiny_config.update(init_from="/gone.npz", init_from_grid=(2, 3))
    tiny_config.model.head_bias_init = -4.0
    run_folder.write_config(run, tiny_config)
    logging.getLogger("vit_jax").propagate = True
    for given in (None, "other.npz"):
        tiny_config.update(init_from=given, init_from_grid=None)
        tiny_config.model.head_bias_init = 0.0
        kept = resuming.keep_recorded(run, tiny_config)
        assert (kept.init_from, tuple(kept.init_from_grid)) == ("/gone.npz", (2, 3))
        assert kept.model.head_bias_init == -4.0
        resuming.check_config(run, kept)
    assert "began from /gone.npz, and goes on from its own checkpoint" in caplog.text
    assert "init_from=other.npz isn't read" in caplog.text
    assert "init_from=None" not in caplog.text


def test_allowed_changes_are_recorded(run, tiny_config, caplog):
    tiny_config.update(total_steps=48, seed=1)
    tiny_config.optimizer.update(b1=0.8, weight_decay=0.2)
    allowed = resuming.parse_allowed(["total_steps", "config.optimizer"], tiny_config)
    with pytest.raises(UserError, match=r"\(recorded -> given\): seed: 0 -> 1\. Use"):
        resuming.check_config(run, tiny_config, allowed=allowed)
    changes = resuming.check_config(run, tiny_config, allowed=(*allowed, "seed"))
    logging.getLogger("vit_jax").propagate = True
    for _ in range(2):  # killed before config.json had the new values
        resuming.record_changes(run, 3, changes)
    assert "Changed from step 3 on, as allowed: optimizer.b1: 0.9 -> 0.8" in caplog.text
    recorded = json.loads((run / "changes.json").read_text())
    assert [tuple(change.values()) for change in recorded] == [
        (3, "optimizer.b1", 0.9, 0.8),
        (3, "optimizer.weight_decay", 0.1, 0.2),
        (3, "seed", 0, 1),
        (3, "total_steps", 24, 48),
    ]
    run_folder.write_config(run, tiny_config)
    assert resuming.check_config(run, tiny_config) == []


def test_another_batch_size_goes_on_with_the_next_example(run, tiny_config):
    """If it is allowed."""
    tiny_config.batch_size = 2
    config = resuming.keep_recorded(run, tiny_config)
    assert config.dataset.offset + 3 * 2 == 3 * 8
    resuming.check_config(run, config, allowed=("batch_size",))
    run_folder.write_config(run, config)
    assert resuming.keep_recorded(run, tiny_config).dataset.offset == config.dataset.offset


def test_unknown_fields_are_not_allowed_to_change(tiny_config):
    for name, hint in (("sed", "did you mean seed?"), ("optimizer.beta", "configs/common.py")):
        with pytest.raises(UserError, match=f"names '{name}', which is no field.*{hint}") as raised:
            resuming.parse_allowed(["batch_size", name], tiny_config)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("change", [dict(total_steps=48), {"schedule.warmup_steps": 2}])
def test_a_run_cannot_be_extended_in_place(run, tiny_config, change):
    tiny_config.update_from_flattened_dict(change)
    branch = f"--config.init_from={run} --config.init_mode=continue"
    with pytest.raises(UserError, match=f"can't be extended .*{branch}"):
        resuming.check_config(run, tiny_config)


def test_fields_that_the_code_gained_must_have_their_default(run, tiny_config):
    def edit(fields):
        fields["model"]["forgotten"] = None
        del fields["loss_args"], fields["optimizer"]["layer_decay"]

    edit_config(run, edit)
    resuming.check_config(run, tiny_config, {"seed"})
    tiny_config.optimizer.layer_decay = 0.5
    with pytest.raises(UserError, match="layer_decay: not recorded -> 0.5"):
        resuming.check_config(run, tiny_config, {"optimizer.layer_decay"})
    tiny_config.seed = 5
    with pytest.raises(UserError, match="seed: 0 -> 5"):
        resuming.check_config(run, tiny_config)


def test_other_classes_are_refused(run):
    """The same label would mean another class."""
    resuming.check_class_names(run, ("cat", "dog"), "photos")  # none are recorded
    run_folder.write_class_names(run, ("cat", "dog"))
    resuming.check_class_names(run, ("cat", "dog"), "photos")
    for names in (("dog", "cat"), ("dog", "zebra"), ("cat",), ("cat", "dog", "eel")):
        with pytest.raises(UserError, match="photos has other classes than the run"):
            resuming.check_class_names(run, names, "photos")


def test_a_step_beyond_the_end_is_refused(run, tiny_config):
    tiny_config.total_steps = 2
    run_folder.write_config(run, tiny_config)
    with pytest.raises(UserError, match="checkpoint of step 3, but the run ends after 2 steps"):
        resuming.check_config(run, tiny_config, recover=True)


def test_a_run_with_a_setting_that_the_code_lost_is_not_resumed(run, tiny_config):
    edit_config(run, lambda fields: fields["model"].update(forgotten=3))
    with pytest.raises(UserError, match="model.forgotten: 3 -> None"):
        resuming.check_config(run, tiny_config)


def test_a_dataset_may_move_but_not_change(run, tiny_config, tmp_path, caplog):
    """The order of the examples depends on their names, not on where they are."""
    old, moved = tmp_path / "photos", tmp_path / "moved"
    tiny_config.dataset.update(name=str(old), num_examples=80, fingerprint="a")
    run_folder.write_config(run, tiny_config)
    tiny_config.dataset.name = str(moved)
    logging.getLogger("vit_jax").propagate = True
    with caplog.at_level(logging.INFO, logger="vit_jax"):
        resuming.check_config(run, tiny_config)
    assert f"now read from {moved}" in caplog.text
    for name, told in (
        (str(old), "has gained, lost or renamed examples"),
        (str(moved), "This is another dataset than the run's"),
    ):
        tiny_config.dataset.update(name=name, num_examples=79, fingerprint="b")
        with pytest.raises(UserError, match=f"num_examples: 80 -> 79.*{told}"):
            resuming.check_config(run, tiny_config)


def test_recovering_a_configuration_that_is_there_changes_nothing(run, tiny_config):
    tiny_config.seed = 5
    with pytest.raises(UserError, match="seed: 0 -> 5"):
        resuming.check_config(run, tiny_config, recover=True)


def test_a_run_keeps_to_its_use_of_exif_data(run, tiny_config):
    """A run from before the field ignores it; another value that is given is refused."""
    edit_config(run, lambda fields: fields["dataset"].pop("exif"))
    assert tiny_config.dataset.exif is None
    resumed = resuming.keep_recorded(run, tiny_config)
    assert resumed.dataset.exif is False
    resuming.check_config(run, resumed)
    tiny_config.dataset.exif = True
    with pytest.raises(UserError, match="dataset.exif: False -> True"):
        resuming.check_config(run, resuming.keep_recorded(run, tiny_config))


def test_a_run_goes_on_with_what_its_recipe_was(run, tiny_config, caplog):
    """From before the fields that DeiT's recipe sets now; newer runs are held to them."""
    new = {
        "augment.randaugment_kind": "timm",
        "augment.crop_distribution": "area",
        "augment.resize_method": "bicubic",
        "dataset.repeats": 3,
    }

    def edit(fields):
        for field in new:
            group, name = field.split(".")
            del fields[group][name]

    tiny_config.update_from_flattened_dict(new | {"augment.eval_method": "bicubic"})
    with pytest.raises(UserError, match="augment.crop_distribution: 'tensorflow' -> 'area'"):
        resuming.check_config(run, resuming.keep_recorded(run, tiny_config), new)
    edit_config(run, edit)
    logging.getLogger("vit_jax").propagate = True
    resumed = resuming.keep_recorded(run, tiny_config)
    assert resumed.augment.randaugment_kind == "pillow"
    assert (resumed.dataset.repeats, resumed.augment.eval_method) == (1, "bilinear")
    assert resuming.check_config(run, resumed, new) == []
    assert "goes on with augment.randaugment_kind=pillow, augment.crop_dist" in caplog.text


def test_a_folder_with_another_program_s_config_is_left_alone(tmp_path, tiny_config):
    """Such as weights of transformers."""
    path = tmp_path / "config.json"
    path.write_text('{"architectures": ["ViTModel"]}')
    with pytest.raises(
        UserError, match="config.json can't be read .model is missing.: use another"
    ):
        resuming.check_resumable(tmp_path, tiny_config, train_set=None)
