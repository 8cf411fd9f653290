"""Evaluation metrics, as sums over examples so that batches of any size add up exactly.

To add one, return its sum over a batch from `batch_sums` and its name in NAMES.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError

NAMES = ("loss", "accuracy", "accuracy_top5")


def batch_sums(logits, labels, losses, mask) -> dict:
    """Returns the sums of each metric over a batch's real examples.

    Args:
        logits: float (N, C).
        labels: int (N,).
        losses: float (N,).
        mask: bool (N,), False for padding.

    Returns:
        float32 scalars: a sum for each of NAMES; `count`, the number of real examples; and
        `unlabelled`, how many of them have a label outside 0 .. C - 1.
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
    eval_step: Callable,
    params,
    batches: Iterable[dict],
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Returns the metrics over all batches; each real example counts once.

    Args:
        eval_step: (params, batch) -> `batch_sums`.
        batches: global batches on the devices, with a mask.
        stop_requested: called before each batch; if it returns True, None is returned.
    """
    sums = []
    for batch in batches:
        if stop_requested():
            return None
        sums.append(eval_step(params, batch))
        jax.block_until_ready(sums[-3:][0])  # dispatch at most two batches ahead
    return means(sums)


def means(sums: list[dict]) -> dict[str, float]:
    """Returns the means over all examples of a list of `batch_sums`.

    Raises:
        UserError: labels that aren't among the classes, as in splits published without labels.
    """
    sums = jax.device_get(sums)

    def total(name):
        return np.sum([batch[name] for batch in sums], dtype=np.float64)

    if unlabelled := int(total("unlabelled")):
        raise UserError(
            f"{unlabelled} of {int(total('count'))} evaluation examples have a label that isn't "
            "among the classes: use a split with labels"
        )
    return {name: float(total(name) / total("count")) for name in NAMES}
