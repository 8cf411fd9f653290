"""Evaluation numbers, as sums over examples so that batches of any size add up exactly."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError

NAMES = ("loss", "accuracy", "accuracy_top5")


def batch_sums(logits, labels, losses, mask) -> dict:
    """Sums over one batch's real examples.

    logits float (N, C); labels int (N,); losses (N,); mask bool (N,), False for padding.
    Returns float32 scalars: loss, accuracy and accuracy_top5 as sums, the count, and how many
    labels aren't among the classes.
    """
    top = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]  # (N, 5), best first
    hits = top == labels[:, None]

    def total(values):
        return jnp.sum(jnp.where(mask, values, 0.0), dtype=jnp.float32)

    return {
        "loss": total(losses),
        "accuracy": total(hits[:, 0]),
        "accuracy_top5": total(hits.any(axis=1)),
        "count": total(jnp.ones(len(labels))),
        "unlabelled": total((labels < 0) | (labels >= logits.shape[-1])),
    }


def evaluate(
    eval_step: Callable, params, batches: Iterable[dict], stop: Callable = lambda: False
) -> dict[str, float] | None:
    """loss, accuracy and accuracy_top5 over all batches, each real example counted once.

    eval_step: (params, batch) -> `batch_sums`. batches: on the devices, with a mask.
    stop: asked before each batch; once it says so, None is returned.
    """
    sums = []
    for batch in batches:
        if stop():
            return None
        sums.append(eval_step(params, batch))
        jax.block_until_ready(sums[-3:][0])  # two batches ahead of the device, not more
    return means(sums)


def means(sums: list[dict]) -> dict[str, float]:
    """The means over all examples of a list of `batch_sums`, fetched from the device at once.

    Raises:
        UserError: a label that isn't among the classes, as in splits published without labels.
    """
    sums = jax.device_get(sums)

    def total(name):
        return np.sum([batch[name] for batch in sums], dtype=np.float64)

    if unlabelled := int(total("unlabelled")):
        raise UserError(
            f"{unlabelled} of {int(total('count'))} evaluation examples have a label that isn't "
            "among the classes: take a split with labels"
        )
    return {name: float(total(name) / total("count")) for name in NAMES}
