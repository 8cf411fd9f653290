"""An image as evaluation sees it, without TensorFlow."""

import numpy as np

from vit_jax.errors import UserError


def evaluation_view(image, size: tuple[int, int], channels: int, keep: float) -> np.ndarray:
    """An image of any size -> uint8 (*size, channels), as `preprocess.eval_image` has it.

    Resized, its proportions kept, until `keep` of the shorter side fills the size; of that the
    centre. Averages over pixels where it shrinks.

    Args:
        image: uint8 (H, W, C), grey (H, W), or PIL's, of any mode.

    Raises:
        UserError: something else.
    """
    if hasattr(image, "convert"):  # PIL's
        image = image.convert("L" if channels == 1 else "RGB")
    image = with_channels(np.asarray(image), channels)
    sides = np.array(image.shape[:2])
    scale = np.max(np.array(size) / keep / sides)
    resized = np.maximum(np.round(sides * scale), size)
    first = np.floor((resized - size) / 2)
    for axis in (0, 1):
        matrix = resizing_matrix(sides[axis], size[axis], resized[axis] / sides[axis], first[axis])
        image = np.moveaxis(np.tensordot(matrix, image, (1, axis)), 0, axis)
    return (image + 0.5).astype(np.uint8)


def with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """float32 (H, W, channels) of a grey, coloured or transparent image."""
    if image.ndim == 2:
        image = image[..., None]
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3, 4):
        raise UserError(
            f"An image is {image.dtype} {image.shape}: expected uint8 (H, W) or (H, W, 1, 3 or 4)"
        )
    image = image[..., :3].astype(np.float32)
    if channels == 1 and image.shape[-1] == 3:
        return image @ np.array([[0.2989], [0.587], [0.114]], np.float32)
    return np.repeat(image, channels, axis=-1) if image.shape[-1] == 1 < channels else image


def resizing_matrix(old: int, new: int, scale: float, first: float) -> np.ndarray:
    """(new, old): rows `first` .. `first + new - 1` of what is resized by `scale`."""
    centres = (np.arange(new) + first + 0.5) / scale
    distance = np.abs(np.arange(old) + 0.5 - centres[:, None]) / max(1.0 / scale, 1.0)
    weights = np.maximum(1.0 - distance, 0.0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
