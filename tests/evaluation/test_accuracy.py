"""Evaluation counts every example once, whatever the batch size."""

import jax
import numpy as np
import pytest
from conftest import apply, init, tiny_model

from vit_jax.errors import UserError
from vit_jax.evaluation import accuracy
from vit_jax.parallel import feeding
from vit_jax.training import steps

IMAGE = (32, 32, 3)


def test_padding_does_not_count(tiny_config, one_device):
    """13 examples in padded batches of 8 give the metrics of one example at a time."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (13, *IMAGE), np.uint8)
    labels = rng.integers(0, 10, 13).astype(np.int32)
    model = tiny_model(depth=1)
    params = init(model, np.zeros((1, *IMAGE)))["params"]
    step = jax.jit(steps.make_eval_step(model, tiny_config))

    def evaluate(size):
        batches = []
        for start in range(0, 13, size):
            part = slice(start, start + size)
            missing = size - len(images[part])
            batches.append(
                {
                    "images": np.pad(images[part], ((0, missing), (0, 0), (0, 0), (0, 0))),
                    "labels": np.pad(labels[part], (0, missing)),
                    "mask": np.arange(size) < size - missing,
                }
            )
        return accuracy.evaluate(step, params, feeding.to_devices(batches, one_device))

    eight, one = evaluate(8), evaluate(1)
    assert eight["accuracy"] == one["accuracy"]
    assert eight["accuracy_top5"] == one["accuracy_top5"]
    assert eight["loss"] == pytest.approx(one["loss"], rel=1e-6)

    logits = np.asarray(apply(model, {"params": params}, images / 127.5 - 1))
    ranks = (logits > np.take_along_axis(logits, labels[:, None], 1)).sum(1)
    assert eight["accuracy"] == pytest.approx((ranks == 0).mean())
    assert eight["accuracy_top5"] == pytest.approx((ranks < 5).mean())
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))
    expected = -np.take_along_axis(log_probabilities, labels[:, None], 1).mean()
    assert eight["loss"] == pytest.approx(expected, rel=1e-5)


def test_labels_outside_the_classes_are_refused(tiny_config, one_device):
    model = tiny_model(depth=1)
    step = jax.jit(steps.make_eval_step(model, tiny_config))
    params = init(model, np.zeros((1, *IMAGE)))["params"]
    batch = {
        "images": np.zeros((8, *IMAGE), np.uint8),
        "labels": np.array([-1, 1, 2, 3, 4, 5, 6, 10], np.int32),
        "mask": np.ones(8, bool),
    }
    with pytest.raises(UserError, match="2 of 8 evaluation examples have a label that isn't among"):
        accuracy.evaluate(step, params, feeding.to_devices([batch], one_device))
