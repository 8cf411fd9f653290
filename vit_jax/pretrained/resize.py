"""Resizes parameters that depend on the image size: position embeddings and patch kernels."""

import numpy as np

from vit_jax.interpolation import linear_weights, multiply_axis


def resize_positions(
    positions, old: tuple[int, int], new: tuple[int, int], has_class_token: bool
) -> np.ndarray:
    """Resizes position embeddings to another grid.

    Interpolates linearly with the corners aligned, as Google's code does (arXiv:2010.11929,
    section 3.2).

    Args:
        positions: (1, L, D), in row order.
        old, new: (rows, columns).
        has_class_token: whether the first position is the class token's, which is kept.
    """
    if old == new:
        return positions
    first, rest = np.split(np.asarray(positions, np.float32), [int(has_class_token)], axis=1)
    table = rest.reshape(*old, -1)
    for axis in (0, 1):
        centers = np.linspace(0.0, old[axis] - 1, new[axis])
        table = multiply_axis(linear_weights(centers, np.arange(old[axis])), table, axis)
    table = table.reshape(1, new[0] * new[1], -1).astype(np.float32)
    return np.concatenate([first, table], axis=1)


def add_class_position(positions) -> np.ndarray:
    """Prepends a row of zeros for the class token to positions (1, L, D)."""
    return np.pad(positions, ((0, 0), (1, 0), (0, 0)))


def resize_patches(kernel, new: tuple[int, int]) -> np.ndarray:
    """Resizes the patch embedding's kernel (FlexiViT's PI-resize; arXiv:2212.08013, section 3.4).

    Returns the kernel whose products with bilinearly resized patches are closest to those of the
    old kernel with the patches themselves; they are equal if patches grow.

    Args:
        kernel: (h, w, C, D).
        new: the new (h, w).
    """
    kernel = np.asarray(kernel, np.float64)
    for axis in (0, 1):
        old_side, side = kernel.shape[axis], new[axis]
        centers = (np.arange(side) + 0.5) * old_side / side - 0.5
        inverse = np.linalg.pinv(linear_weights(centers, np.arange(old_side)).T)  # (side, old_side)
        kernel = multiply_axis(inverse, kernel, axis)
    return kernel.astype(np.float32)
