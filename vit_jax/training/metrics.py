"""Evaluation metrics, as sums over examples so that batches of any size add up exactly.

To add one, return its sum over a batch from `batch_sums`, add its name to NAMES, and to
LOWER_IS_BETTER if that is so. It is then written to metrics.jsonl and TensorBoard, and printed. The
metrics of training are in `make_train_step` in vit_jax/training/steps.py.
"""

import jax
import jax.numpy as jnp

NAMES = ("loss", "accuracy", "accuracy_top5")
MASKED_NAMES = ("loss", "patch_accuracy")  # of masked patches, see `masked_patches.losses`
LOWER_IS_BETTER = ("loss",)  # for all others, higher is better


def batch_sums(logits, labels, losses, mask) -> dict:
    """Returns the sums of each metric over a batch's real examples.

    Args:
        logits: float (N, C).
        labels: int (N,).
        losses: float (N,).
        mask: bool (N,), False for padding.

    Returns:
        float32 scalars: a sum for each of NAMES; `count`, the number of real examples; and
        `unlabeled`, how many of them have a label outside 0 .. C - 1.
    """
    top = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]  # (N, 5), best first
    hits = top == labels[:, None]

    values = {
        "loss": losses,
        "accuracy": hits[:, 0],
        "accuracy_top5": hits[:, :5].any(axis=1),
        "unlabeled": (labels < 0) | (labels >= logits.shape[-1]),
    }
    return sums(values, mask)


def sums(values: dict, mask) -> dict:
    """Returns the sum of each value (N,) over a batch's real examples, and their `count`."""

    def total(values):
        return jnp.sum(jnp.where(mask, values, 0.0), dtype=jnp.float32)

    return {**{name: total(value) for name, value in values.items()}, "count": total(1.0)}
