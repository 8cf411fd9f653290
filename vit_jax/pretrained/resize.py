"""Resizes parameters that depend on the image size: position embeddings and patch kernels."""

import numpy as np

from vit_jax.interpolation import cubic_weights, linear_weights, multiply_axis

OFFSET = 0.1  # DINOv2's `interpolate_offset`, in positions


def google_weights(old: int, new: int) -> np.ndarray:
    """Interpolates linearly with the corners aligned, as Google's code (arXiv:2010.11929, 3.2)."""
    return linear_weights(np.linspace(0.0, old - 1, new), np.arange(old))


def torch_weights(old: int, new: int) -> np.ndarray:
    """Interpolates as DINOv2's code: PyTorch's bicubic by a factor of (new + 0.1) / old.

    The kernel is that of Keys (1981) with a = -3/4; positions beyond the edges are the edges'.
    https://github.com/facebookresearch/dinov2, `interpolate_pos_encoding`.
    """
    centers = (np.arange(new) + 0.5) * old / (new + OFFSET) - 0.5
    first = np.floor(centers).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        x = np.abs(centers - first - tap)
        near, far = (1.25 * x - 2.25) * x**2 + 1.0, ((-0.75 * x + 3.75) * x - 6.0) * x + 3.0
        columns = np.clip(first + tap, 0, old - 1)
        np.add.at(weights, (np.arange(new), columns), np.where(x < 1.0, near, far))
    return weights


def torch_antialiased_weights(old: int, new: int) -> np.ndarray:
    """Interpolates as DINOv2 with registers, and timm: PyTorch's bicubic with antialiasing."""
    centers = (np.arange(new) + 0.5) * old / new - 0.5
    return cubic_weights(centers, np.arange(old), max(old / new, 1.0))


# How positions are resized -> the weights of one axis, for models without and with registers.
METHODS = {
    "google": (google_weights, google_weights),
    "torch": (torch_weights, torch_antialiased_weights),
}


def resize_positions(
    positions,
    old: tuple[int, int],
    new: tuple[int, int],
    num_prefix: int,
    method: str = "google",
    has_registers: bool = False,
) -> np.ndarray:
    """Resizes position embeddings to another grid.

    Args:
        positions: (1, L, D), in row order.
        old, new: (rows, columns).
        num_prefix: how many positions before the patches' there are, which are kept.
        method: a key of METHODS.
        has_registers: whether the model has register tokens.
    """
    if old == new:
        return positions
    first, rest = np.split(np.asarray(positions, np.float32), [int(num_prefix)], axis=1)
    table = rest.reshape(*old, -1)
    weights = METHODS[method][has_registers]
    for axis in (0, 1):
        table = multiply_axis(weights(old[axis], new[axis]), table, axis)
    table = table.reshape(1, new[0] * new[1], -1).astype(np.float32)
    return np.concatenate([first, table], axis=1)


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
