"""Images as evaluation sees them, computed without TensorFlow."""

import contextlib
import functools
import os

import numpy as np

from vit_jax import checks
from vit_jax.errors import UserError
from vit_jax.interpolation import area_weights, cubic_weights, linear_weights, sample_axis

# The weights, and how many widths from a sample they end (half a pixel further, for areas).
KERNELS = {
    "bilinear": (linear_weights, 1.0),
    "bicubic": (cubic_weights, 2.0),
    "area": (area_weights, 0.5),
}


def evaluation_view(
    image,
    size: tuple[int, int],
    channels: int,
    eval_crop: float | str,
    eval_method: str = "bilinear",
) -> np.ndarray:
    """Resizes and center-crops an image as `eval_image` of `vit_jax/data/preprocess/views.py` does.

    Args:
        image: a PIL image, which is turned upright as its EXIF data says, or uint8 (H, W) or
            (H, W, 1, 3 or 4). Transparency is dropped; of 16-bit values, the high byte is used.
        size: (height, width) of the view.
        channels: 1 or 3.
        eval_crop: the share of the resized image's shorter side that is kept; or "squeeze": the
            whole image, whose proportions aren't kept.
        eval_method: one of EVAL_METHODS in vit_jax/checks.py.

    Returns:
        uint8 (*size, channels).

    Raises:
        UserError: not an image, an image without pixels, or a file that can't be decoded.
    """
    if isinstance(image, (str, os.PathLike)):
        raise UserError(f"An image is the path {str(image)!r}: open it with PIL.Image.open first")
    if is_pillow(image):
        image = pillow_pixels(image, channels)
    image = check_pixels(np.asarray(image))
    sides = image.shape[:2]
    starts, shrinkages = crop(sides, size, eval_crop)
    name, _, aliased = eval_method.partition("_")
    kernel, num_widths = KERNELS[name]
    # Rows first is faster, but a wide image of few rows would become a large one.
    rows, columns = np.divide(sides, size)
    for axis in (1, 0) if columns > 4 * rows else (0, 1):
        shrinkage = shrinkages[axis]
        centers = (np.arange(size[axis]) + starts[axis] + 0.5) * shrinkage - 0.5
        width = shrinkage if name == "area" else 1.0 if aliased else max(shrinkage, 1.0)
        weights = functools.partial(kernel, width=width)
        image = sample_axis(image, axis, centers, weights, num_widths * width + 0.5)
    image = with_channels(image, channels)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def crop(
    sides: tuple[int, int], size: tuple[int, int], eval_crop: float | str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns where an image's view starts, and how much the image was shrunk for it.

    Args:
        sides: (height, width) of the image.
        size, eval_crop: see `evaluation_view`.

    Returns:
        The view's first row and column in the resized image, and the pixels of the image per pixel
        of the view, along its height and width.
    """
    sides = np.array(sides)
    if eval_crop == checks.SQUEEZE:
        return np.zeros(2), sides / size
    scale = np.max(np.array(size) / eval_crop / sides)
    resized = np.maximum(np.round(sides * scale), size)
    return np.floor((resized - size) / 2), sides / resized


def view_box(
    sides: tuple[int, int], size: tuple[int, int], eval_crop: float | str
) -> tuple[float, float, float, float]:
    """Returns the part of an image that its view shows: (top, left, bottom, right), in its pixels.

    Args:
        sides, size, eval_crop: see `crop`.
    """
    starts, shrinkages = crop(sides, size, eval_crop)
    corners = *(starts * shrinkages), *((starts + size) * shrinkages)
    return tuple(float(side) for side in corners)


def is_pillow(image) -> bool:
    """Whether an object is a PIL image; Pillow itself needn't be installed."""
    return hasattr(image, "convert")


def pillow_pixels(image, channels: int) -> np.ndarray:
    """Returns the pixels of a PIL image, uint8 (H, W) or (H, W, 3), upright.

    Raises:
        UserError: the file can't be decoded, or the values have no known range.
    """
    from PIL import ExifTags, ImageOps

    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"An image can't be decoded: {error}") from None
    with contextlib.suppress(Exception):  # Pillow raises many kinds for EXIF data that is broken
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else it would be copied
            image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise UserError("An image has the mode 'F', of any range: convert it to 'L' first")
    if image.mode.startswith("I"):  # 16 bits; `convert` would clip them
        return np.uint8(np.clip(np.asarray(image), 0, 2**16 - 1) >> 8)
    mode = "L" if channels == 1 else "RGB"
    return np.asarray(image if image.mode == mode else image.convert(mode))


def check_pixels(image: np.ndarray) -> np.ndarray:
    """Returns an array of pixels as (H, W, 1 or 3), without transparency.

    Raises:
        UserError: it isn't an image, or has no pixels.
    """
    if image.ndim == 2:
        image = image[..., None]
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3, 4):
        raise UserError(
            f"An image is {image.dtype} {image.shape}; it must be a PIL image, or uint8 (H, W) or "
            "(H, W, 1, 3 or 4)"
        )
    if not image.size:
        raise UserError(f"An image is {image.shape[0]} x {image.shape[1]} pixels, so it is empty")
    return image[..., :3]


def with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Converts a gray or color image, float32 (H, W, 1 or 3), to (H, W, channels)."""
    if channels == 1 and image.shape[-1] == 3:
        return image @ np.array([[0.2989], [0.587], [0.114]], np.float32)
    return np.repeat(image, channels, axis=-1) if image.shape[-1] == 1 < channels else image
