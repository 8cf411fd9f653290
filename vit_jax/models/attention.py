"""The attention function inside Flax's attention module."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def attend(
    query,  # (N, Lq, H, D / H)
    key,  # (N, Lk, H, D / H)
    value,  # (N, Lk, H, D / H)
    mask=None,  # broadcastable to (N, H, Lq, Lk)
    dropout_rng=None,
    dropout_rate=0.0,
    broadcast_dropout=False,
    deterministic=True,
    dtype=None,
    *,
    impl: str = "xla",
    weights: list | None = None,
):
    """Returns scaled dot-product attention, (N, Lq, H, D / H).

    Calls `jax.nn.dot_product_attention`, unless attention weights are to be dropped or returned,
    which it can't do. The softmax is float32 in either case.

    Args:
        impl: the implementation of `jax.nn.dot_product_attention`: "xla", "cudnn" or "auto".
        weights: a list that the weights after softmax, float32 (N, H, Lq, Lk), are appended to.
    """
    if weights is None and (deterministic or dropout_rate == 0.0):
        impl = None if impl == "auto" else impl
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=impl)
    scale = query.shape[-1] ** -0.5
    scores = jnp.einsum("nqhd,nkhd->nhqk", query * scale, key, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    probabilities = jax.nn.softmax(scores)
    if weights is not None:
        weights.append(probabilities)
    drop = nn.Dropout(dropout_rate, deterministic=deterministic)
    probabilities = drop(probabilities, rng=dropout_rng)
    return jnp.einsum("nhqk,nkhd->nqhd", probabilities.astype(dtype or value.dtype), value)
