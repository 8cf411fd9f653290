"""A run of version 0.1 still loads, evaluates and resumes."""

import shutil
import tarfile

import jax
import numpy as np
import pytest
from conftest import GOLDEN
from whole_runs import rows, untimed

import evaluate
import train
from configs import digits
from vit_jax.paths import path_name
from vit_jax.runs import checkpoint


@pytest.fixture
def run(tmp_path):
    """The folder of a run of 8 steps, evaluated and saved at steps 4 and 8."""
    with tarfile.open(GOLDEN / "run_of_0_1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def run_config():
    """The configuration of that run, in today's code: with all that is drawn at random."""
    config = digits.get_config("quick")
    config.update(total_steps=8, ema_decay=0.9, best_metric="", log_every_steps=2)
    config.update(eval_every_steps=4, checkpoint_every_steps=4, keep_every_steps=4)
    config.model.update(width=8, mlp_dim=16, depth=2, num_heads=2, dropout_rate=0.1, scan=True)
    config.augment.mixup_alpha = 0.2
    config.schedule.warmup_steps = 2
    return config


def evaluation(row):
    return {name.removeprefix("val/"): value for name, value in row.items() if name != "step"}


def assert_repeats(values, recorded):
    """Asserts that recorded numbers are repeated; newer code may have more of them."""
    assert {name: values[name] for name in recorded} == pytest.approx(recorded, rel=1e-5)


@pytest.mark.parametrize("step", [4, 8])
def test_it_evaluates_to_the_recorded_numbers(run, step):
    (recorded,) = [row for row in rows(run) if row["step"] == step and "val/loss" in row]
    values = evaluate.evaluate(evaluate.open_run(run, step)).metrics
    assert_repeats(values, evaluation(recorded))


def final_params(workdir):
    """The parameters and their average at step 8, by name."""
    return {
        f"{item}/{path_name(path)}": leaf
        for item in ("params", "ema_params")
        for path, leaf in jax.tree.leaves_with_path(checkpoint.restore_params(workdir, 8, item)[1])
    }


def test_it_resumes_to_the_recorded_end(run, on_one_device):
    """The same parameters, average and rows, but for the rounding of another machine."""
    recorded, expected = rows(run), final_params(run)
    shutil.rmtree(run / "checkpoints" / "8")
    train.train(run_config(), run)
    params = final_params(run)
    assert params.keys() == expected.keys()
    for name in params:
        if not name.endswith("key/bias"):  # softmax ignores it: its gradient is rounding error
            np.testing.assert_allclose(params[name], expected[name], rtol=1e-5, atol=1e-6)
    repeated = [row for row in rows(run) if "val_raw/loss" not in row]  # newer
    for row, expected_row in zip(repeated, recorded, strict=True):
        assert_repeats(row, untimed(expected_row))
