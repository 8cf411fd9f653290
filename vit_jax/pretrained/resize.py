"""Resizes parameters that depend on the image size: position embeddings and patch kernels."""

import numpy as np


def linear_weights(centers, size: int, width: float = 1.0) -> np.ndarray:
    """Returns the matrix that samples a row of pixels by linear interpolation.

    Each sample is a weighted mean of the pixels by a triangle kernel.

    Args:
        centers: where to sample, (n,), in pixels: 0 is the center of the first one.
        size: the number of pixels.
        width: half the base of the triangle; 1 interpolates between neighbors, more averages.

    Returns:
        float64 (n, size), each row summing to 1.
    """
    distances = np.abs(np.arange(size) - np.asarray(centers)[:, None])
    return normalize_rows(np.maximum(1.0 - distances / width, 0.0))


def cubic_weights(centers, size: int, width: float = 1.0) -> np.ndarray:
    """Returns the matrix that samples a row of pixels by cubic interpolation.

    By the kernel of Keys (1981) with a = -1/2, as in Pillow and TensorFlow. The arguments are those
    of `linear_weights`; `width` is half of the kernel's positive part.
    """
    x = np.abs(np.arange(size) - np.asarray(centers)[:, None]) / width
    near = (1.5 * x - 2.5) * x**2 + 1.0
    far = ((2.5 - 0.5 * x) * x - 4.0) * x + 2.0
    return normalize_rows(np.select([x < 1.0, x < 2.0], [near, far], 0.0))


def area_weights(centers, size: int, width: float) -> np.ndarray:
    """Returns the matrix that averages a row of pixels over areas, `width` pixels wide each.

    The arguments are those of `linear_weights`.
    """
    pixels, centers = np.arange(size), np.asarray(centers)[:, None]
    ends = np.minimum(centers + width / 2, pixels + 0.5)
    starts = np.maximum(centers - width / 2, pixels - 0.5)
    return normalize_rows(np.maximum(ends - starts, 0.0))


def normalize_rows(weights: np.ndarray) -> np.ndarray:
    """Divides each row by its sum."""
    return weights / weights.sum(axis=1, keepdims=True)


def multiply_axis(matrix, array, axis: int) -> np.ndarray:
    """Multiplies a matrix (m, n) with one axis of an array, of size n; the axis gets size m."""
    return np.moveaxis(np.tensordot(matrix, array, (1, axis)), 0, axis)


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
        table = multiply_axis(linear_weights(centers, old[axis]), table, axis)
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
        inverse = np.linalg.pinv(linear_weights(centers, old_side).T)  # (side, old_side)
        kernel = multiply_axis(inverse, kernel, axis)
    return kernel.astype(np.float32)
