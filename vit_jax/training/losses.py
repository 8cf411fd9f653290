"""Losses: (logits, targets) -> one float32 number per example.

To add one, write the function, give it a row in LOSSES, with how logits become probabilities, and
add its formula to tests/training/test_losses.py. Its settings are keyword-only parameters with
defaults, overridden by `config.loss_args`. Evaluation reports the same loss.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vit_jax import checks
from vit_jax.errors import UserError


def softmax_cross_entropy(logits, targets):
    """Returns the cross-entropy of softmax(logits), (N,).

    Args:
        logits, targets: (N, C); each target sums to 1.
    """
    return optax.softmax_cross_entropy(logits, targets)


def sigmoid_cross_entropy(logits, targets, *, binary: bool = False, mean: bool = False):
    """Returns the binary cross-entropy of sigmoid(logits), summed over classes, (N,).

    From arXiv:2006.07159, section 3.

    Args:
        logits, targets: (N, C).
        binary: whether each class that a target has a share of counts as present, as in
            arXiv:2110.00476, section 2.
        mean: whether to average over classes instead.
    """
    if binary:
        targets = jnp.where(targets > 0, 1.0, 0.0)
    losses = optax.sigmoid_binary_cross_entropy(logits, targets)
    return losses.mean(axis=-1) if mean else losses.sum(axis=-1)


class Loss(NamedTuple):
    """A loss, and how logits (N, C) of a model trained with it become probabilities (N, C)."""

    function: Callable
    probabilities: Callable


LOSSES = {
    "softmax": Loss(softmax_cross_entropy, jax.nn.softmax),
    "sigmoid": Loss(sigmoid_cross_entropy, jax.nn.sigmoid),
}


def create(name: str, args: Mapping | None = None) -> Loss:
    """Returns the loss with that name, its keyword arguments set.

    Raises:
        UserError: an unknown loss, or a parameter that the loss doesn't have.
    """
    loss = checks.lookup("config.loss", name, LOSSES)
    if not isinstance(loss, Loss):
        raise UserError(f"The row {name!r} of LOSSES must be a Loss(function, probabilities)")
    args = checks.dictionary("config.loss_args", args, "{'gamma': 2.0}")
    parameters = inspect.signature(loss.function).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for arg in args:
        if arg not in known:
            raise UserError(
                f"config.loss_args has {arg!r}; {name!r} takes {', '.join(known) or 'none'}"
            )
    loss = loss._replace(function=functools.partial(loss.function, **args))
    check_output(name, loss.function)
    return loss


def check_output(name: str, function: Callable) -> None:
    """Raises UserError if a loss doesn't return one number per example."""
    logits = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    shape = jax.eval_shape(function, logits, logits).shape
    if shape != (2,):
        raise UserError(
            f"The loss {name!r} returns {shape} for logits of (2, 3); it must return one number "
            "per example, (2,)"
        )
