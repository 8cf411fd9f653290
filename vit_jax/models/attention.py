"""Multi-head attention, with the parameters of Flax's `nn.MultiHeadDotProductAttention`.

The heads stay side by side, (N, L, H * d), from the projections to the attention function and
back: given an axis of their own, XLA copies the activations between layouts. The attention function
is the fastest that the device has, see `fastest`.
"""

import functools
import logging
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vit_jax.errors import UserError
from vit_jax.models import posemb, tpu_attention
from vit_jax.models.tpu_attention import ATTENTION_OUTPUT
from vit_jax.parallel import sharding

logger = logging.getLogger("vit_jax")

IMPLS = ("auto", "xla", "cudnn", "pallas")


class MultiHeadDotProductAttention(nn.Module):
    """Attention of one sequence to another, or to itself (arXiv:1706.03762, section 3.2.2).

    In shapes, D: width, H: heads, d: D / H.
    """

    num_heads: int
    kernel_init: Callable
    dtype: jnp.dtype
    dropout_rate: float = 0.0
    impl: str = "auto"
    qkv_bias: bool = True
    qk_norm: Callable | None = None  # makes a norm of each head's queries or keys
    rope: str = "none"
    rope_temperature: float = 100.0

    @nn.compact
    def __call__(
        self, x, context=None, mask=None, key=None, weights: list | None = None, coords=None
    ):
        """Returns what the tokens of `x` gather from those of `context`, (N, Lq, D).

        Args:
            x: (N, Lq, D).
            context: (N, Lk, D); None: `x`.
            mask: bool (N, Lk), False for tokens of `context` to ignore; or None.
            key: drops attention weights; None: drops none.
            weights: a list that the weights after softmax, float32 (N, H, Lq, Lk), are added to.
            coords: float (N or 1, L, 2), row and column of each token, for `rope`; or None.
        """
        context = x if context is None else context
        width = x.shape[-1]
        head_dim = width // self.num_heads
        heads = (self.num_heads, head_dim)
        project = functools.partial(Projection, kernel_init=self.kernel_init, dtype=self.dtype)
        query = project((width,), heads, self.qkv_bias, name="query")(x)
        keys = project((width,), heads, self.qkv_bias, name="key")(context)
        value = project((width,), heads, self.qkv_bias, name="value")(context)
        if self.qk_norm is not None:
            query, keys = (split_heads(x, self.num_heads) for x in (query, keys))
            query, keys = self.qk_norm(name="query_ln")(query), self.qk_norm(name="key_ln")(keys)
            query, keys = join_heads(query), join_heads(keys)
        if coords is not None:
            angles = self.angles(coords, head_dim)
            query, keys = posemb.rotate(query, angles), posemb.rotate(keys, angles)
        if weights is None and (key is None or not self.dropout_rate):
            y = attend(query, keys, value, mask, self.num_heads, self.impl)
            y = checkpoint_name(y, ATTENTION_OUTPUT)
        else:
            dropout = nn.Dropout(self.dropout_rate, deterministic=key is None)
            drop = functools.partial(dropout, rng=key)
            y = plain_attention(query, keys, value, mask, self.num_heads, drop, weights)
        return project(heads, (width,), name="out")(y)

    def angles(self, coords, head_dim: int):
        """Returns by how much pairs of channels turn: (N or 1, L, 1 or H, d / 2)."""
        if self.rope == "axial":
            frequencies = posemb.axial_frequencies(head_dim, self.rope_temperature)
        else:
            init = functools.partial(posemb.mixed_frequencies, temperature=self.rope_temperature)
            frequencies = self.param("rope_freqs", init, (2, self.num_heads, head_dim // 2))
        rows, columns = coords[..., :1, None], coords[..., 1:, None]  # (N or 1, L, 1, 1)
        return rows * frequencies[0] + columns * frequencies[1]


class Projection(nn.Module):
    """A dense layer whose kernel has an axis for the heads, computed as if it had none.

    The kernel is (D, H, d), or (H, d, D) for the output, as in Flax's `nn.DenseGeneral`, and its
    initial values are the same.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    use_bias: bool = True
    kernel_init: Callable = nn.initializers.xavier_uniform()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):  # (N, L, inputs), flattened -> (N, L, outputs), flattened
        flat_shape = math.prod(self.inputs), math.prod(self.outputs)

        def init(key, shape):
            return self.kernel_init(key, flat_shape, jnp.float32).reshape(shape)

        kernel = self.param("kernel", init, (*self.inputs, *self.outputs))
        x = x.astype(self.dtype) @ kernel.astype(self.dtype).reshape(flat_shape)
        if not self.use_bias:
            return x
        bias = self.param("bias", nn.initializers.zeros, self.outputs)
        bias = bias.astype(self.dtype).reshape(-1)
        # Without a gradient of our own elsewhere: it excludes forward-mode differentiation.
        return add_bias(x, bias) if sharding.device_in_use().platform == "tpu" else x + bias


@jax.custom_vjp
def add_bias(x, bias):  # (N, L, D), (D,)
    """Adds a bias whose gradient is summed by a matrix product: on a TPU faster than a sum."""
    return x + bias


def add_bias_forward(x, bias):
    return x + bias, None


def add_bias_backward(_, gradient):
    flat = gradient.reshape(math.prod(gradient.shape[:-1]), gradient.shape[-1])
    ones = jnp.ones((1, len(flat)), flat.dtype)
    # The model's `default_matmul_precision` doesn't reach here.
    precision = "highest" if flat.dtype == jnp.float32 else None
    return gradient, jnp.dot(ones, flat, precision=precision)[0]


add_bias.defvjp(add_bias_forward, add_bias_backward)


def attend(query, key, value, mask, num_heads: int, impl: str):
    """Returns scaled dot-product attention, (N, Lq, H * d); the softmax is in float32.

    Args:
        query: (N, Lq, H * d).
        key, value: (N, Lk, H * d).
        mask: bool (N, Lk), False for tokens to ignore; or None.
        impl: one of IMPLS. What an implementation doesn't serve is computed by "xla".
    """
    device, head_dim = sharding.device_in_use(), query.shape[-1] // num_heads
    if impl == "auto":
        impl = fastest(device, query.dtype, head_dim)
    elif reason := problem(impl, device, query.dtype, head_dim):
        log_once(f"Attention is computed by XLA: model.attention_impl {impl!r} {reason}")
        impl = "xla"
    # A kernel isn't split over devices by itself, only by `tpu_attention` on a run's mesh.
    is_split = sharding.has_mesh() or jax.device_count() == 1
    if impl == "pallas" and is_split and query.shape[1] == key.shape[1]:
        if tpu_attention.fits(*query.shape[1:], num_heads, query.dtype):
            return tpu_attention.attention(query, key, value, mask, num_heads)
        log_once(
            f"Attention is computed by XLA: {query.shape[1]:,} tokens and {num_heads} heads of "
            f"{head_dim} are too many for the kernel 'pallas'"
        )
    query, key, value = (split_heads(x, num_heads) for x in (query, key, value))
    xla_attention = cpu_attention if device.platform == "cpu" else library_attention
    function = cudnn_attention if impl == "cudnn" else xla_attention
    return join_heads(function(query, key, value, mask))


def fastest(device, dtype, head_dim: int) -> str:
    """Returns the fastest implementation that serves a device: "pallas", "cudnn" or "xla"."""
    served = (impl for impl in ("pallas", "cudnn") if not problem(impl, device, dtype, head_dim))
    return next(served, "xla")


def problem(impl: str, device, dtype, head_dim: int) -> str | None:
    """Returns why an implementation doesn't serve a device, such as "needs a TPU"; or None."""
    if impl == "pallas":
        return tpu_attention.problem(device, head_dim)
    if impl == "cudnn":
        if device.platform not in ("gpu", "cuda") or "AMD" in device.device_kind:
            return f"needs an NVIDIA GPU, not {device.device_kind}"
        if float(getattr(device, "compute_capability", 8)) < 8:
            return f"needs compute capability 8.0, not {device.compute_capability}"
        if dtype != jnp.bfloat16:
            return "needs config.dtype 'bfloat16'"
        if head_dim % 8 or head_dim > 128:
            return f"needs heads whose width is a multiple of 8, up to 128, not {head_dim}"
    return None


def resolve(model, device) -> str:
    """Returns the implementation that a model's training uses on a device, not "auto".

    Raises:
        UserError: `model.attention_impl` doesn't serve the device.
    """
    head_dim = model.width // model.num_heads
    best = fastest(device, model.dtype, head_dim)
    if model.attention_impl == "auto":
        return best
    if reason := problem(model.attention_impl, device, model.dtype, head_dim):
        raise UserError(
            f"model.attention_impl {model.attention_impl!r} {reason}: use 'auto', which chooses "
            f"{best!r} here"
        )
    return model.attention_impl


def describe(model, impl: str, num_tokens: int) -> str:
    """Returns in words how a model's attention is computed.

    Args:
        model: the VisionTransformer.
        impl: the result of `resolve`.
        num_tokens: of an image.
    """
    if impl == "pallas":
        sizes = num_tokens, model.width, model.num_heads, model.dtype
        if not tpu_attention.fits(*sizes):
            return f"xla, since {num_tokens:,} tokens are too many for the kernel 'pallas'"
    if impl != "xla" and model.attention_dropout_rate:
        return f"xla in training, because of attention dropout; {impl} in evaluation"
    return impl


def library_attention(query, key, value, mask):
    """Attention by `jax.nn`, as matrix products, (N, Lq, H, d)."""
    mask = None if mask is None else mask[:, None, None, :]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")


def cpu_attention(query, key, value, mask):
    """Attention as matrix products that suit a CPU, (N, Lq, H, d).

    Heads come before tokens, so that the products are batched ones, and the division by the
    softmax's denominator comes after the product with the values: a pass over (N, H, Lq, d)
    instead of (N, H, Lq, Lk).
    """
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))  # (N, H, L, d)
    products = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = products("nhqd,nhkd->nhqk", query * query.shape[-1] ** -0.5, key)
    scores = hide_scores(scores, mask)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    y = products("nhqk,nhkd->nhqd", weights.astype(value.dtype), value)
    y /= weights.sum(axis=-1, keepdims=True)
    return y.astype(value.dtype).swapaxes(1, 2)


def hide_scores(scores, mask):
    """Gives tokens to ignore, False in mask (N, Lk), very low scores (N, H, Lq, Lk)."""
    if mask is None:
        return scores
    return jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)


def cudnn_attention(query, key, value, mask):
    """Attention by cuDNN (FlashAttention), (N, Lq, H, d).

    It serves only even numbers of tokens: zeros are appended up to a multiple of 8, and ignored.
    """
    n, length, key_length = len(query), query.shape[1], key.shape[1]
    lengths = {}
    if length % 8 or key_length % 8:
        lengths["query_seq_lengths"] = jnp.full(n, length, jnp.int32)
        lengths["key_value_seq_lengths"] = jnp.full(n, key_length, jnp.int32)
    if mask is not None:
        mask = pad_tokens(mask)[:, None, None, :]
    y = jax.nn.dot_product_attention(
        *map(pad_tokens, (query, key, value)), mask=mask, implementation="cudnn", **lengths
    )
    return y[:, :length]


def pad_tokens(x):  # (N, L, ...) -> (N, L', ...), L' a multiple of 8
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), *[(0, 0)] * (x.ndim - 2)))


@functools.cache
def log_once(message: str) -> None:
    logger.warning(message)


def plain_attention(query, key, value, mask, num_heads: int, drop: Callable, weights: list | None):
    """Returns attention as `attend` does, and can drop and return the weights.

    Args:
        drop: drops weights.
        weights: a list that the weights before that, float32 (N, H, Lq, Lk), are added to; or None.
    """
    query, key, value = (split_heads(x, num_heads) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5
    scores = jnp.einsum("nqhd,nkhd->nhqk", query * scale, key, preferred_element_type=jnp.float32)
    probabilities = jax.nn.softmax(hide_scores(scores, mask))
    if weights is not None:
        weights.append(probabilities)
    y = jnp.einsum("nhqk,nkhd->nqhd", drop(probabilities).astype(value.dtype), value)
    return join_heads(y)


def split_heads(x, num_heads: int):  # (N, L, H * d) -> (N, L, H, d)
    return x.reshape(*x.shape[:2], num_heads, x.shape[2] // num_heads)


def join_heads(x):  # (N, L, H, d) -> (N, L, H * d)
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3])
