"""The layers around attention, and functions that drop or select tokens.

In shapes, N: images, L: tokens, D: width.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.checks import lookup
from vit_jax.models.attention import MultiHeadDotProductAttention

xavier_uniform = nn.initializers.xavier_uniform()

# The MLP's activations: the values of the field `gelu`, named so in every recorded configuration.
# To add one, give it a row here, and its formula a row of ACTIVATIONS in
# tests/models/test_models.py.
GELUS = {
    "tanh": functools.partial(nn.gelu, approximate=True),  # Google's and big_vision's
    "exact": functools.partial(nn.gelu, approximate=False),  # PyTorch's default
    "quick": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's CLIP
}
NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


def norm(kind: str, epsilon: float, dtype) -> Callable:
    """Returns what makes norms of one kind, a key of NORMS, given their names."""
    return functools.partial(NORMS[kind], epsilon=epsilon, dtype=dtype)


class MlpBlock(nn.Module):
    """Two dense layers with an activation in between: the MLP of Eq. 3.

    With `layer` "swiglu" a third one gates the hidden layer (arXiv:2002.05202). `norm` makes a norm
    of the hidden layer.
    """

    mlp_dim: int
    gelu: str = "tanh"
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32
    layer: str = "mlp"
    norm: Callable | None = None

    @nn.compact
    def __call__(self, x, key=None):  # (N, L, D) -> (N, L, D)
        dense = functools.partial(
            nn.Dense,
            dtype=self.dtype,
            kernel_init=xavier_uniform,
            bias_init=nn.initializers.normal(stddev=1e-6),
        )
        y = dense(self.mlp_dim, name="Dense_0")(x)  # (N, L, mlp_dim)
        if self.layer == "swiglu":
            y = nn.silu(dense(self.mlp_dim, name="gate")(x)) * y
        else:
            y = lookup("model.gelu", self.gelu, GELUS)(y)
        y = dropout(y, self.dropout_rate, key)
        if self.norm is not None:
            y = self.norm(name="LayerNorm_0")(y)
        return dense(x.shape[-1], name="Dense_1")(y)


class LayerScale(nn.Module):
    """Multiplies each channel of a residual branch by a learned weight (arXiv:2103.17239).

    Without an initial value it is the identity.
    """

    init_value: float | None

    @nn.compact
    def __call__(self, x):  # (N, L, D)
        if self.init_value is None:
            return x
        gamma = self.param("gamma", nn.initializers.constant(self.init_value), x.shape[-1:])
        return x * gamma.astype(x.dtype)


class MAPHead(nn.Module):
    """Pools the tokens by attention from one learned query (arXiv:2106.04560, section 3.3)."""

    num_heads: int
    mlp_dim: int
    gelu: str
    norm_layer: str
    layer_norm_eps: float
    attention_impl: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, mask):  # (N, L, D), (N, L) or None -> (N, D)
        probe = self.param("probe", xavier_uniform, (1, 1, x.shape[-1]))
        probe = jnp.broadcast_to(probe, (x.shape[0], 1, x.shape[-1])).astype(x.dtype)
        x = MultiHeadDotProductAttention(
            self.num_heads,
            xavier_uniform,
            self.dtype,
            impl=self.attention_impl,
            name="MultiHeadDotProductAttention_0",
        )(probe, x, mask=mask)
        y = norm(self.norm_layer, self.layer_norm_eps, self.dtype)(name="LayerNorm_0")(x)
        x = x + MlpBlock(self.mlp_dim, self.gelu, dtype=self.dtype, name="MlpBlock_0")(y)
        return x[:, 0]


def mean_patch(x, mask, first: int):  # (N, L, D), (N, L) or None -> (N, D)
    """Returns the mean of the tokens from `first` on, which are the patches."""
    where = None if mask is None else mask[:, first:, None]
    return jnp.mean(x[:, first:], axis=1, where=where)


def take_tokens(x, indices):  # (N or 1, L, ...), (N, K) -> (N, K, ...); None -> None
    if x is None:
        return None
    x = jnp.broadcast_to(x, (len(indices), *x.shape[1:]))
    return jnp.take_along_axis(x, indices.reshape(*indices.shape, *[1] * (x.ndim - 2)), axis=1)


def draw_patches(key, n: int, length: int, share: float):
    """Draws a share of each image's patches, at least one; returns their indices (N, K)."""
    order = jnp.argsort(jax.random.uniform(key, (n, length)), axis=1)
    return jnp.sort(order[:, : max(1, int(length * share))], axis=1)


def dropout(x, rate, key):
    """Zeroes elements with probability `rate`, and scales up the rest; no-op without a key."""
    return nn.Dropout(rate, deterministic=key is None)(x, rng=key)


def drop_path(x, rate, key):
    """Stochastic depth (arXiv:1603.09382): drops the whole branch of an example.

    Args:
        x: (N, L, D).
        rate: float (), may be traced; None: the identity.
        key: None: the identity.
    """
    if key is None or rate is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, (len(x), 1, 1))
    return jnp.where(keep, x / (1.0 - rate).astype(x.dtype), 0)
