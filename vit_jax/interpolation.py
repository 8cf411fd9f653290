"""Interpolation along an axis of an array, by matrices."""

from collections.abc import Callable

import numpy as np

BLOCK_WEIGHTS = 2**13  # computed at a time, unless a single sample has more


def linear_weights(centers, pixels, width: float = 1.0) -> np.ndarray:
    """Returns the matrix that samples a row of pixels by linear interpolation.

    Each sample is a weighted mean of the pixels by a triangle kernel.

    Args:
        centers: where to sample, (n,), in pixels: 0 is the center of the first one.
        pixels: the positions of the pixels, (m,): `np.arange(m)` for a whole row.
        width: half the base of the triangle; 1 interpolates between neighbors, more averages.

    Returns:
        float64 (n, m), each row summing to 1.
    """
    distances = np.abs(pixels - np.asarray(centers)[:, None])
    return normalize_rows(np.maximum(1.0 - distances / width, 0.0))


def cubic_weights(centers, pixels, width: float = 1.0) -> np.ndarray:
    """Returns the matrix that samples a row of pixels by cubic interpolation.

    By the kernel of Keys (1981) with a = -1/2, as in Pillow and TensorFlow. The arguments are those
    of `linear_weights`; `width` is half of the kernel's positive part.
    """
    x = np.abs(pixels - np.asarray(centers)[:, None]) / width
    near = (1.5 * x - 2.5) * x**2 + 1.0
    far = ((2.5 - 0.5 * x) * x - 4.0) * x + 2.0
    return normalize_rows(np.select([x < 1.0, x < 2.0], [near, far], 0.0))


def area_weights(centers, pixels, width: float) -> np.ndarray:
    """Returns the matrix that averages a row of pixels over areas, `width` pixels wide each.

    The arguments are those of `linear_weights`.
    """
    centers = np.asarray(centers)[:, None]
    ends = np.minimum(centers + width / 2, pixels + 0.5)
    starts = np.maximum(centers - width / 2, pixels - 0.5)
    return normalize_rows(np.maximum(ends - starts, 0.0))


def normalize_rows(weights: np.ndarray) -> np.ndarray:
    """Divides each row by its sum."""
    return weights / weights.sum(axis=1, keepdims=True)


def sample_axis(image, axis: int, centers, weights: Callable, reach: float) -> np.ndarray:
    """Interpolates an image along an axis, by matrices of the pixels that count only.

    A matrix of all pixels would need memory for each pair of a pixel and a sample.

    Args:
        image: of any dtype; it is converted block by block.
        axis: of the image, of size m; it gets size n.
        centers: where to sample, (n,), ascending, in pixels, none of them outside of the image.
        weights: (centers, pixels) -> the matrix, such as `linear_weights`.
        reach: the distance in pixels beyond which `weights` are 0, at least 1.

    Returns:
        float32.
    """
    num_pixels, num_samples = image.shape[axis], len(centers)
    step = max((centers[-1] - centers[0]) / num_samples, 1.0)
    block = max(int((BLOCK_WEIGHTS / step) ** 0.5), 1)
    results = []
    for start in range(0, num_samples, block):
        samples = centers[start : start + block]
        first = max(int(np.ceil(samples[0] - reach)), 0)
        last = min(int(samples[-1] + reach) + 1, num_pixels)
        matrix = weights(samples, np.arange(first, last)).astype(np.float32)
        part = image[(slice(None),) * axis + (slice(first, last),)]
        results.append(multiply_axis(matrix, part.astype(np.float32, copy=False), axis))
    return np.concatenate(results, axis)


def multiply_axis(matrix, array, axis: int) -> np.ndarray:
    """Multiplies a matrix (m, n) with one axis of an array, of size n; the axis gets size m."""
    return np.moveaxis(np.tensordot(matrix, array, (1, axis)), 0, axis)
