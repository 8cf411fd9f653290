"""Attention rollout: which patches a model looks at."""

import jax
import jax.numpy as jnp


def attention_rollout(attention, has_class_token: bool):
    """How much of each patch reaches the output, through all blocks (arXiv:2005.00928, section 3).

    In each block a token keeps half of itself and takes the other half as its attention, averaged
    over the heads, says.

    Args:
        attention: (depth, N, H, L, L), each row summing to 1.
        has_class_token: whether the output is the first token; else it is the mean of all.

    Returns:
        (N, number of patches), each row summing to 1.
    """

    def block(total, weights):  # (N, L, L), (N, H, L, L)
        mixed = (weights.mean(axis=1) + jnp.eye(weights.shape[-1])) / 2
        return jnp.einsum("nij,njk->nik", mixed, total, precision="float32"), None

    _, n, _, length, _ = attention.shape
    start = jnp.broadcast_to(jnp.eye(length), (n, length, length))
    total, _ = jax.lax.scan(block, start, attention)
    rows = total[:, 0, 1:] if has_class_token else total.mean(axis=1)
    return rows / rows.sum(axis=-1, keepdims=True)
