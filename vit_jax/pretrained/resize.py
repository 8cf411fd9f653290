"""Parameters tied to the image's size, for another one: position grids and patches."""

import jax
import jax.numpy as jnp
import numpy as np


def resize_positions(
    positions, old: tuple[int, int], new: tuple[int, int], has_class_token: bool
) -> np.ndarray:
    """Position embeddings (1, L, D) of a grid (h, w) -> of another, row by row.

    Linear between the old positions with the corners aligned, as Google's code does it
    (arXiv:2010.11929, section 3.2). The class token's row is kept.
    """
    if old == new:
        return positions
    first, rest = positions[:, : int(has_class_token)], positions[0, int(has_class_token) :]
    table = np.asarray(rest, np.float32).reshape(*old, -1)
    for axis, size in enumerate(new):
        table = interpolated(table, size, axis)
    return np.concatenate([first, table.reshape(1, new[0] * new[1], -1)], axis=1)


def interpolated(table, size: int, axis: int) -> np.ndarray:
    """The table at `size` places from its first to its last along an axis, linearly between."""
    places = np.linspace(0.0, table.shape[axis] - 1, size)
    low = np.minimum(places.astype(int), max(table.shape[axis] - 2, 0))
    high = np.minimum(low + 1, table.shape[axis] - 1)
    shape = [-1 if i == axis else 1 for i in range(table.ndim)]
    share = (places - low).reshape(shape).astype(np.float32)
    return table.take(low, axis) * (1 - share) + table.take(high, axis) * share


def resize_patches(kernel, new: tuple[int, int]) -> np.ndarray:
    """The patch embedding's kernel (h, w, C, D) -> for patches of another size (FlexiViT).

    The one whose product with a bilinearly resized patch is nearest to the old kernel's with the
    patch itself: the same, where patches grow (arXiv:2212.08013, section 3.4, "PI-resize").
    """
    kernel = np.asarray(kernel, np.float64)
    for axis, (old_side, side) in enumerate(zip(kernel.shape, new, strict=False)):
        inverse = np.linalg.pinv(resizing_matrix(old_side, side).T)  # (side, old_side)
        kernel = np.moveaxis(np.tensordot(inverse, kernel, (1, axis)), 0, axis)
    return kernel.astype(np.float32)


def resizing_matrix(old: int, new: int) -> np.ndarray:
    """(new, old): bilinear resizing along one side."""
    identity = jnp.eye(old, dtype=jnp.float32)
    with jax.default_matmul_precision("float32"):
        resized = jax.image.resize(identity, (new, old), "bilinear", antialias=False)
    return np.asarray(resized, np.float64)
