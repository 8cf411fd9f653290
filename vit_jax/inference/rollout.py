"""Attention rollout: how much each patch contributes to the output."""

import jax
import jax.numpy as jnp


def attention_rollout(attention, has_class_token: bool, num_prefix_tokens: int | None = None):
    """Multiplies the attention of all blocks (arXiv:2005.00928, section 3).

    Each block counts as half identity, for the residual branch, and half attention, averaged over
    the heads.

    Args:
        attention: the weights captured from a model, (depth, N, H, L, L), each row summing to 1.
        has_class_token: whether the output is the first token; otherwise it is the mean of the
            patches.
        num_prefix_tokens: how many tokens come before the patches; None: only the class token.

    Returns:
        The share of each patch in the output, (N, patches), each row summing to 1.
    """

    def multiply_block(product, weights):  # (N, L, L), (N, H, L, L)
        mixed = (weights.mean(axis=1) + jnp.eye(weights.shape[-1])) / 2
        return jnp.einsum("nij,njk->nik", mixed, product, precision="float32"), None

    _, n, _, length, _ = attention.shape
    identity = jnp.broadcast_to(jnp.eye(length), (n, length, length))
    product, _ = jax.lax.scan(multiply_block, identity, attention)
    first = int(has_class_token) if num_prefix_tokens is None else num_prefix_tokens
    to_patches = product[..., first:]
    shares = to_patches[:, 0] if has_class_token else to_patches[:, first:].mean(axis=1)
    return shares / shares.sum(axis=-1, keepdims=True)
