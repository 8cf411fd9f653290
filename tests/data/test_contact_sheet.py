"""The picture of what the model sees."""

import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from conftest import tiny_model
from PIL import Image

import input_pipeline
from vit_jax.data import contact_sheet
from vit_jax.training import augment, steps, train_state


@pytest.fixture
def config(tiny_config, image_folder):
    tiny_config.update(batch_size=64, accum_steps=2, num_classes=2)
    tiny_config.dataset.name = str(image_folder)
    tiny_config.augment.update(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), label_smoothing=0.1)
    tiny_config.augment.update(randaugment_layers=1, mixup_alpha=0.8, cutmix_alpha=1.0)
    return tiny_config


def test_shows_what_a_training_step_sees(config, monkeypatch):
    """Of a run in batches of as many images as a row has."""
    source = input_pipeline.open_source(config.dataset.name, None, "train")
    rows = list(contact_sheet.inputs(config, source))

    config.update(batch_size=contact_sheet.IMAGES, accum_steps=1)
    model, tx = tiny_model(num_classes=2), optax.sgd(0.0)
    params = jax.jit(lambda: train_state.init_params(model, (32, 32, 3), 0))()
    state = train_state.TrainState(np.int32(0), params, tx.init(params), None, np.int32(0))
    seen, train_inputs = [], augment.train_inputs

    def watched(*args):
        inputs = train_inputs(*args)
        jax.debug.callback(lambda *values: seen.append(values), *inputs)
        return inputs

    monkeypatch.setattr(augment, "train_inputs", watched)
    step = jax.jit(steps.make_train_step(model, tx, lambda _: 0.0, config))
    batches = input_pipeline.train_batches(source, config)
    for _ in rows:
        state, _ = step(state, next(batches))
    jax.effects_barrier()
    for (images, targets), (seen_images, seen_targets) in zip(rows, seen, strict=True):
        pixels = np.asarray(seen_images) * [0.2, 0.3, 0.4] + [0.5, 0.4, 0.3]
        np.testing.assert_allclose(images, np.clip(pixels, 0.0, 1.0), atol=1e-5)
        np.testing.assert_allclose(targets, seen_targets, atol=1e-6)


@pytest.mark.parametrize(
    ("target", "floor", "text"),
    [
        ((0.0, 1.0, 0.0), 0.0, "cat 1.000"),
        ((0.3, 0.7, 0.0), 0.0, "cat 0.700\ndog 0.300"),
        ((0.03, 0.94, 0.03), 0.03, "cat 0.940\nothers 0.060"),
    ],
)
def test_captions(target, floor, text):
    assert contact_sheet.caption(np.array(target), ("dog", "cat", "emu"), floor) == text


def test_the_command(tmp_path):
    """Draws a sheet; where it can't, says why in one line."""
    root = pathlib.Path(__file__).parents[1]

    def command(*args):
        program = [sys.executable, "input_pipeline.py", "--config=configs/digits.py:quick", *args]
        return subprocess.run(program, cwd=root, check=False, capture_output=True, text=True)

    done = command(f"--show={tmp_path / 'sheet.png'}")
    assert done.returncode == 0, done.stderr
    assert "label smoothing 0.1" in done.stdout
    assert Image.open(tmp_path / "sheet.png").size[0] > 600
    failed = command(f"--show={tmp_path / 'none' / 'sheet.png'}")
    assert failed.returncode == 2
    assert re.search(r"--show=.* takes a .png file in a folder that exists$", failed.stderr.strip())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_is_a_png(channels, tmp_path):
    rows = [(np.full((8, 4, 4, channels), 0.5), np.eye(8)) for _ in range(contact_sheet.STEPS)]
    contact_sheet.draw(rows, tuple("abcdefgh"), 0.0, "title", tmp_path / "sheet.png")
    image = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert image.shape[1] > image.shape[0] > 600
    assert image.std() > 10
