"""evaluate.py: the metrics of a run's checkpoints."""

import pytest
from whole_runs import quick_config

import evaluate
import train
from vit_jax.errors import UserError


def test_evaluation_repeats_the_result_of_training(on_one_device, tmp_path):
    result = train.train(quick_config(total_steps=20, ema_decay=0.9), tmp_path)
    assert evaluate.evaluate(tmp_path) == pytest.approx(result, rel=1e-6)
    training = evaluate.evaluate(tmp_path, step=20, split="train[:50]")
    assert training["loss"] != result["loss"]
    assert evaluate.evaluate(tmp_path, name="digits") == pytest.approx(result, rel=1e-6)
    with pytest.raises(UserError, match="no such folder"):
        evaluate.evaluate(tmp_path, name=str(tmp_path / "photos"))
    with pytest.raises(UserError, match="No checkpoint of step 7"):
        evaluate.evaluate(tmp_path, step=7)
