"""Interpolation along an axis of an array, by matrices."""

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
