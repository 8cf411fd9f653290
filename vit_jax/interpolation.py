"""Linear interpolation along an axis of an array."""

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
    weights = np.maximum(1.0 - distances / width, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def multiply_axis(matrix, array, axis: int) -> np.ndarray:
    """Multiplies a matrix (m, n) with one axis of an array, of size n; the axis gets size m."""
    return np.moveaxis(np.tensordot(matrix, array, (1, axis)), 0, axis)
