"""Losses: logits and soft targets in, one float32 number an example out."""

import optax

from vit_jax.errors import UserError


def softmax_cross_entropy(logits, targets):
    """Cross-entropy of softmax(logits); both (N, C), targets sum to 1. Returns (N,)."""
    return optax.softmax_cross_entropy(logits, targets)


def sigmoid_cross_entropy(logits, targets):
    """A binary cross-entropy for each class, summed over classes (arXiv:2006.07159, section 3).

    Both (N, C). Returns (N,).
    """
    return optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)


LOSSES = {"softmax": softmax_cross_entropy, "sigmoid": sigmoid_cross_entropy}


def by_name(name: str):
    """The loss of that name; UserError with the known ones for another."""
    if name not in LOSSES:
        raise UserError(f"config.loss is {name!r}; it can be {', '.join(map(repr, LOSSES))}")
    return LOSSES[name]
