"""Position embeddings: fixed ones, and rotary ones."""

import jax
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


def table(kind: str, h: int, w: int, width: int, num_prefix: int) -> np.ndarray:
    """Returns what a model without learned positions adds to its tokens, float32 (1, L, width).

    Args:
        kind: a key of FIXED, or "none".
        num_prefix: how many rows of zeros to prepend, for the class token and register tokens.
    """
    added = np.zeros((1, h * w, width), np.float32)
    if kind in FIXED:
        added = np.asarray(FIXED[kind][0](h, w, width))
    return np.pad(added, ((0, 0), (num_prefix, 0), (0, 0)))


def coordinates(h: int, w: int, grid) -> jax.Array:
    """Returns the row and column of each patch that rotary positions count, float32 (1, h * w, 2).

    Args:
        grid: "index": from 0; (rows, columns): of an image resized to so many; "centered": patches'
            centers from -2 pi to 2 pi.
    """
    rows_columns = jnp.mgrid[:h, :w].reshape(2, h * w).T
    if grid == "centered":
        return (2 * jnp.pi * (2 * (rows_columns + 0.5) / jnp.array([h, w]) - 1))[None]
    scale = (1, 1) if grid == "index" else (grid[0] / h, grid[1] / w)
    return (rows_columns * jnp.array(scale, jnp.float32))[None]


def axial_frequencies(head_dim: int, temperature: float):
    """Returns the frequencies of rows and columns for each pair of channels, (2, 1, d / 2)."""
    bands = temperature ** -(jnp.arange(head_dim // 4) / (head_dim // 4))
    zeros = jnp.zeros_like(bands)
    return jnp.stack([jnp.r_[bands, zeros], jnp.r_[zeros, bands]])[:, None]


def mixed_frequencies(key, shape: tuple[int, ...], temperature: float):
    """Draws initial frequencies (2, H, d / 2): axial ones, turned by an angle for each head.

    As in arXiv:2403.13298, section 3.2, and the authors' code.
    """
    _, num_heads, half = shape
    bands = temperature ** -(jnp.arange(half // 2) / (half // 2))
    turn = jax.random.uniform(key, (num_heads, 1), maxval=2 * jnp.pi)
    turns = turn, turn + jnp.pi / 2
    columns = jnp.concatenate([bands * jnp.cos(angle) for angle in turns], axis=-1)
    rows = jnp.concatenate([bands * jnp.sin(angle) for angle in turns], axis=-1)
    return jnp.stack([rows, columns])


def rotate(x, angles):
    """Turns channels i and i + d / 2 of each head by an angle, computed in float32.

    Args:
        x: (N, L, H * d).
        angles: (N or 1, L, 1 or H, d / 2).
    """
    *shape, width = x.shape
    heads = x.reshape(*shape, -1, 2, angles.shape[-1])  # (N, L, H, 2, d / 2)
    first, second = heads[..., 0, :], heads[..., 1, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-2)
    return turned.astype(x.dtype).reshape(*shape, width)
