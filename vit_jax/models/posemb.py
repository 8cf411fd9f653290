"""Fixed position embeddings."""

import jax.numpy as jnp
import numpy as np


def sincos_2d(h: int, w: int, width: int, temperature: float = 10_000.0):
    """Sines and cosines of row and column, as in MoCo v3 (arXiv:2104.02057, section 4.1).

    Returns float32 (1, h * w, width): a quarter of the channels each for sin x, cos x, sin y
    and cos y. `width` is a multiple of 4.
    """
    frequencies = temperature ** -(jnp.arange(width // 4) / max(width // 4 - 1, 1))
    y, x = jnp.mgrid[:h, :w].reshape(2, h * w, 1) * frequencies  # (h * w, width / 4) each
    return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=-1)[None]


def sincos_1d(length: int, width: int, temperature: float = 10_000.0):
    """Sines and cosines of the index in row order (arXiv:1706.03762, section 3.5).

    Returns float32 (1, length, width), sines in the even channels. `width` is even.
    """
    frequencies = temperature ** -(jnp.arange(0, width, 2) / width)
    angles = jnp.arange(length)[:, None] * frequencies  # (length, width / 2)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(1, length, width)


def table(kind: str, h: int, w: int, width: int, has_class_token: bool) -> np.ndarray:
    """What a model without learned positions adds to its tokens: float32 (1, L, width).

    kind: "sincos2d", "sincos1d" or "none". Nothing is added to the class token.
    """
    if kind == "sincos2d":
        added = np.asarray(sincos_2d(h, w, width))
    elif kind == "sincos1d":
        added = np.asarray(sincos_1d(h * w, width))
    else:
        added = np.zeros((1, h * w, width), np.float32)
    return np.pad(added, ((0, 0), (int(has_class_token), 0), (0, 0)))
