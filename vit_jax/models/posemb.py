"""Fixed position embeddings."""

import jax.numpy as jnp
import numpy as np


def sincos_2d(h: int, w: int, width: int, temperature: float = 10_000.0):
    """Returns sines and cosines of row and column, float32 (1, h * w, width).

    Each of sin x, cos x, sin y and cos y takes a quarter of the channels, as in MoCo v3
    (arXiv:2104.02057, section 4.1). `width` must be a multiple of 4.
    """
    frequencies = temperature ** -(jnp.arange(width // 4) / max(width // 4 - 1, 1))
    y, x = jnp.mgrid[:h, :w].reshape(2, h * w, 1) * frequencies  # (h * w, width / 4) each
    return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=-1)[None]


def sincos_1d(h: int, w: int, width: int, temperature: float = 10_000.0):
    """Returns sines and cosines of the index in row order, float32 (1, h * w, width).

    Even channels hold the sines, odd ones the cosines (arXiv:1706.03762, section 3.5). `width`
    must be even.
    """
    frequencies = temperature ** -(jnp.arange(0, width, 2) / width)
    angles = jnp.arange(h * w)[:, None] * frequencies  # (h * w, width / 2)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(1, h * w, width)


# Name -> (function of (h, w, width), what the width must be divisible by).
FIXED = {"sincos2d": (sincos_2d, 4), "sincos1d": (sincos_1d, 2)}


def table(kind: str, h: int, w: int, width: int, has_class_token: bool) -> np.ndarray:
    """Returns what a model without learned positions adds to its tokens, float32 (1, L, width).

    Args:
        kind: a key of FIXED, or "none".
        has_class_token: whether to prepend a row of zeros for the class token.
    """
    added = np.zeros((1, h * w, width), np.float32)
    if kind in FIXED:
        added = np.asarray(FIXED[kind][0](h, w, width))
    return np.pad(added, ((0, 0), (int(has_class_token), 0), (0, 0)))
