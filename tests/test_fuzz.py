"""Configurations and damaged files, drawn at random: one line for each mistake, no traceback."""

import contextlib
import json
import random
import shutil

import fuzz
import pytest
from published import random_model, write_run
from whole_runs import quick_config

import configuration
import input_pipeline
from configs import common
from vit_jax import checkpoint, pretrained
from vit_jax.errors import UserError
from vit_jax.logs import run_log
from vit_jax.runs import run_folder
from vit_jax.storage.mirror import Mirror


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(("seed", "draws"), [(0, range(30)), slow(0, range(30, 300))])
def test_any_value_of_a_field_is_refused_in_one_line_or_valid(seed, draws, tmp_path):
    wrong = {}
    for number in draws:
        field, text = fuzz.draw(seed, number)
        if reason := fuzz.start(field, text, tmp_path / str(number)):
            wrong[f"--config.{field}={text}"] = reason
    assert not wrong, "\n\n".join(f"{flag}\n{reason}" for flag, reason in wrong.items())


def test_every_number_of_a_configuration_has_a_range():
    """A new field that is a number needs a row in a table RANGES, or a check."""
    numbers = {
        field: default
        for field, default in fuzz.fields().items()
        if isinstance(default, (int, float)) and not isinstance(default, bool)
    }
    for field in set(numbers) - set(fuzz.MAY_BE_NEGATIVE):
        config = quick_config()
        config.update_from_flattened_dict({field: type(numbers[field])(-(10**12))})
        with pytest.raises(UserError, match=field.split(".")[-1]):
            configuration.check(config)


def test_unfit_values_are_noticed():
    assert fuzz.unfit("optimizer.b1", float("nan")).endswith("isn't finite")
    assert fuzz.unfit("augment.std", [0.5, 0.0]).endswith("is zero")
    assert fuzz.unfit("grad_clip_norm", -1.0).endswith("is negative")
    assert not fuzz.unfit("mesh.data", -1)


def damage(folder, rng) -> str:
    """Damages a random file in a folder; returns what was done."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    contents = bytearray(path.read_bytes())
    how = rng.choice(
        ["truncated", "emptied", "flipped", "zeroed", "extended", "replaced", "removed"]
    )
    if how == "truncated":
        contents = contents[: rng.randrange(len(contents) + 1)]
    elif how == "flipped" and contents:
        for _ in range(rng.randint(1, 16)):
            contents[rng.randrange(len(contents))] = rng.randrange(256)
    elif how == "zeroed" and contents:
        start = rng.randrange(len(contents))
        contents[start : start + 64] = bytes(len(contents[start : start + 64]))
    elif how == "extended":
        contents += rng.randbytes(20)
    elif how in ("emptied", "replaced"):
        contents = b"" if how == "emptied" else b"nonsense \xff\n"
    path.unlink()
    if how != "removed":
        path.write_bytes(contents)
    return f"{path.relative_to(folder)} {how}"


def numpy_file(folder):
    model, params, _ = random_model()
    folder.mkdir()
    pretrained.save(params, folder / "w.npz", format="google", model=model)
    return lambda: pretrained.load(folder / "w.npz", model, 32)


def timm_folder(folder):
    model, params, _ = random_model()
    pretrained.save(params, folder, format="timm", model=model)
    return lambda: pretrained.load(folder, model, 32)


def run(folder):
    config = quick_config(num_classes=10)
    _, params, _ = random_model(size=(16, 16))
    folder.mkdir()
    write_run(folder, config, class_names=tuple("0123456789"), params=params)

    def read():
        run_folder.read_class_names(folder)
        checkpoint.restore_params(folder)

    return read


def metrics(folder):
    folder.mkdir()
    rows = [{"step": step, "train/loss": 1.0} for step in range(10, 60, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda: run_log.RunLog(Mirror(folder), 30, quick_config()).close()


def dataset(folder, source):
    """A copy of a dataset, and a function that reads it all."""
    shutil.copytree(source, folder)
    config = common.get_config()
    config.update(batch_size=8, image_size=16)
    config.dataset.update(shuffle_buffer=10, in_memory_mb=0)

    def read():
        train_set = input_pipeline.open_source(str(folder), None, "train")
        with contextlib.closing(input_pipeline.train_batches(train_set, config)) as batches:
            for _ in range(train_set.num_examples // 8 + 1):
                next(batches)

    return read


KINDS = {"npz": numpy_file, "timm": timm_folder, "run": run, "metrics": metrics}
DATASETS = ("folder", "tfrecord", "array_record")


@pytest.mark.parametrize("draws", [range(3), slow(range(3, 16))])
@pytest.mark.parametrize("kind", [*KINDS, *DATASETS])
def test_damaged_files_are_named_or_read(kind, draws, tmp_path, request):
    for number in draws:
        folder = tmp_path / str(number)
        if kind in KINDS:
            read = KINDS[kind](folder)
        else:
            sources = {"folder": request.getfixturevalue("image_folder")}
            if kind != "folder":
                sources = request.getfixturevalue("tfds_folders")
            read = dataset(folder, sources[kind])
        print(f"draw {number}: {damage(folder, random.Random(f'{kind}/{number}'))}")
        message = ""
        try:
            read()
        except UserError as error:
            message = str(error)
        assert "\n" not in message
