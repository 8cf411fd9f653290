"""The contact sheet of what the model sees."""

import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from PIL import Image

import input_pipeline
from configs import digits, masked_patches
from input_pipeline import SHEET_IMAGES, SHEET_STEPS
from vit_jax.data import contact_sheet
from vit_jax.errors import UserError
from vit_jax.training import augment, steps, train_state

ROOT = pathlib.Path(__file__).parents[2]


class LinearModel(nn.Module):
    """A model that compiles at once."""

    num_classes: int = 2

    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(self.num_classes)(images.reshape(len(images), -1))


@pytest.mark.slow
def test_the_sheet_shows_what_training_steps_see(tiny_config, image_folder, monkeypatch):
    """The inputs of the first steps of a run whose batches fill a row of the sheet."""
    config = tiny_config
    config.update(batch_size=64, accum_steps=2, num_classes=2)
    config.dataset.name = str(image_folder)
    config.augment.update(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), label_smoothing=0.1)
    config.augment.mixup_alpha = 0.8
    source = input_pipeline.open_source(config.dataset.name, None, "train")
    rows = list(input_pipeline.contact_sheet_batches(source, config))
    assert len(rows) == SHEET_STEPS

    config.update(batch_size=SHEET_IMAGES, accum_steps=1)
    seen, train_inputs = [], augment.train_inputs

    def recording_train_inputs(*args):
        inputs = train_inputs(*args)
        jax.debug.callback(lambda *values: seen.append(values), *inputs)
        return inputs

    monkeypatch.setattr(augment, "train_inputs", recording_train_inputs)
    model, tx = LinearModel(), optax.sgd(0.0)
    params = model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32), train=True)
    params = params["params"]
    state = train_state.TrainState(
        step=np.int32(0), params=params, opt_state=tx.init(params), skipped=np.int32(0)
    )
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
    ("target", "smoothing_share", "text"),
    [
        ((0.0, 1.0, 0.0), 0.0, "cat 1.000"),
        ((0.3, 0.7, 0.0), 0.0, "cat 0.700\ndog 0.300"),
        ((0.03, 0.94, 0.03), 0.03, "cat 0.940\nothers 0.060"),
    ],
)
def test_captions(target, smoothing_share, text):
    names = ("dog", "cat", "emu")
    assert contact_sheet.caption(np.array(target), names, smoothing_share) == text


def test_show_draws_a_sheet(tmp_path, capsys):
    path = tmp_path / "sheet.png"
    input_pipeline.show(digits.get_config("quick"), "configs/digits.py:quick", str(path))
    assert Image.open(path).size[0] > 600
    assert "label smoothing 0.1" in capsys.readouterr().out
    input_pipeline.show(masked_patches.get_config("quick"), "", str(path))
    assert "patches masked after that, no labels" in capsys.readouterr().out
    for wrong in (tmp_path / "none" / "sheet.png", tmp_path / "sheet.jpg"):
        with pytest.raises(UserError, match="--show is .*; it must be a .png file in an existing"):
            input_pipeline.show(digits.get_config("quick"), "", str(wrong))


@pytest.mark.slow
def test_the_command_draws_a_sheet(tmp_path):
    path = tmp_path / "sheet.png"
    command = [sys.executable, "input_pipeline.py", "--config=configs/digits.py:quick"]
    command.append(f"--show={path}")
    result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "label smoothing 0.1" in result.stdout
    assert path.exists()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_is_a_png(channels, tmp_path):
    rows = [(np.full((8, 4, 4, channels), 0.5), np.eye(8)) for _ in range(2)]
    contact_sheet.draw(rows, tuple("abcdefgh"), "title", tmp_path / "sheet.png")
    image = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert image.shape[1] > image.shape[0] > 300
    assert image.std() > 10
