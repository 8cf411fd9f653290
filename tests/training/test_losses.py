"""Losses against their formulas."""

import functools

import jax
import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.training import augment, losses


def test_losses_follow_their_formulas():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4, 7)).astype(np.float32), np.array([0, 6, 2, 2])
    targets = np.asarray(augment.soft_labels(labels, 7, 0.2))
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    sigmoid = 1 / (1 + np.exp(-logits))
    labeled = targets > 0.1
    present = -(labeled * np.log(sigmoid) + (1 - labeled) * np.log(1 - sigmoid)).mean(1)
    loss = losses.create("sigmoid", dict(binary=True, mean=True)).function
    np.testing.assert_allclose(loss(logits, targets * labeled), present, rtol=1e-5)
    binary = -(targets * np.log(sigmoid) + (1 - targets) * np.log(1 - sigmoid)).sum(1)
    for name, probabilities, expected in (
        ("softmax", softmax, -(targets * np.log(softmax)).sum(1)),
        ("sigmoid", sigmoid, binary),
    ):
        loss = losses.create(name)
        np.testing.assert_allclose(loss.function(logits, targets), expected, rtol=1e-5)
        np.testing.assert_allclose(loss.probabilities(logits), probabilities, rtol=1e-5)


def test_loss_args(monkeypatch):
    def scaled(logits, targets, *, scale=1.0):
        return scale * losses.softmax_cross_entropy(logits, targets)

    row = losses.Loss(scaled, losses.LOSSES["softmax"].probabilities)
    monkeypatch.setitem(losses.LOSSES, "scaled", row)
    logits, targets = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)
    compute = functools.partial(losses.create("softmax").function, logits, targets)
    doubled = losses.create("scaled", dict(scale=2.0)).function(logits, targets)
    np.testing.assert_allclose(doubled, 2.0 * compute())


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda logits, targets: ((logits - targets) ** 2).mean(), r"\(\)"),
        (lambda logits, targets: (logits - targets) ** 2, r"\(2, 3\)"),
    ],
)
def test_a_loss_returns_one_number_per_example(function, shape, monkeypatch):
    """A mean over the batch would count the padding of evaluation."""
    monkeypatch.setitem(losses.LOSSES, "mine", losses.Loss(function, jax.nn.softmax))
    with pytest.raises(UserError, match=f"The loss 'mine' returns {shape} for logits of"):
        losses.create("mine")
    monkeypatch.setitem(losses.LOSSES, "mine", function)
    with pytest.raises(UserError, match="The row 'mine' of LOSSES must be a Loss"):
        losses.create("mine")


def test_mistakes_are_named():
    with pytest.raises(UserError, match="config.loss is 'mse'; it must be 'softmax'"):
        losses.create("mse")
    with pytest.raises(UserError, match="config.loss_args has 'gamma'; 'softmax' takes none"):
        losses.create("softmax", dict(gamma=2.0))
    with pytest.raises(UserError, match="config.loss_args is -1; it must be a dictionary"):
        losses.create("softmax", -1)
