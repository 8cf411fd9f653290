"""What the figures share: titles, mosaics of maps, images and their views, principal components."""

import math
import textwrap

import numpy as np

from vit_jax.checks import PNG_METADATA

DPI = 100
OUTSIDE = 0.4  # the brightness of an image outside the part that the model sees
DARKEST = 0.3  # the brightness of black under values, whose colors couldn't be told there
MANY_PIXELS = 64  # smaller images are smoothed when they are enlarged


def create_figure(title: str, width: float, height: float):
    """Returns an empty figure with a title, which is wrapped to the width, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(textwrap.fill(title, int(12 * width)), fontsize=11, parse_math=False)
    return figure


def save(figure, path) -> None:
    """Writes a figure as a PNG that a later call may overwrite, see `checks.check_png`."""
    figure.savefig(path, dpi=DPI, metadata=PNG_METADATA)


def as_rgb(image) -> np.ndarray:
    """Returns a gray or color image, uint8 (H, W) or (H, W, 1, 3 or 4), as (H, W, 3)."""
    image = np.asarray(image)
    image = image[..., None] if image.ndim == 2 else image[..., :3]
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image


def mean_aspect(images) -> float:
    """Returns the mean ratio of height to width, to size figures by; within 0.5 to 2."""
    return float(np.clip(np.mean([len(image) / len(image[0]) for image in images]), 0.5, 2))


def show_image(axis, image, caption: str = "", smooth: bool = True) -> None:
    """Draws an image with a caption above it; a small one smoothed, unless `smooth` is False."""
    image = as_rgb(image)
    is_small = max(image.shape) < MANY_PIXELS
    smoothing = ("bicubic" if smooth else "nearest") if is_small else "antialiased"
    axis.imshow(image, interpolation=smoothing)
    axis.set_title(caption, fontsize=9, loc="left", parse_math=False)  # "$" is no formula
    axis.axis("off")


def show_over(axis, image, values, box=None, **style):
    """Draws values over a gray version of an image, in the part that the model sees.

    Args:
        axis: where to draw.
        image: uint8, see `as_rgb`.
        values: (rows, columns), or colors (rows, columns, 3).
        box: (top, left, bottom, right) of that part, in the image's pixels, as `view_box` of
            `vit_jax/inference/images.py` returns it; None: all of the image.
        **style: how `imshow` draws the values.

    Returns:
        The drawn values, for a color bar.
    """
    height, width = np.shape(image)[:2]
    top, left, bottom, right = (0, 0, height, width) if box is None else box
    gray = DARKEST + (1 - DARKEST) * as_rgb(image).mean(axis=-1) / 255
    brightness = np.full_like(gray, OUTSIDE)
    brightness[round(top) : round(bottom), round(left) : round(right)] = 1.0
    smoothing = "bicubic" if max(gray.shape) < MANY_PIXELS else "antialiased"
    style_below = dict(vmin=0, vmax=1, extent=(0, width, height, 0), interpolation=smoothing)
    axis.imshow(gray * brightness, "gray", **style_below)
    drawn = axis.imshow(values, extent=(left, right, bottom, top), **style)
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.axis("off")
    return drawn


def mosaic(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arranges maps (R, C, h, w) in one array, with gaps of NaN between them.

    Small maps are enlarged, each value to a square, so that the gaps are thin.

    Returns:
        The array, and where the centers of its R rows and C columns of maps are.
    """
    zoom = math.ceil(24 / max(maps.shape[2:]))
    maps = maps.repeat(zoom, axis=2).repeat(zoom, axis=3)
    rows, columns, h, w = maps.shape
    gap = math.ceil(max(h, w) / 12)
    padded = np.pad(maps, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=np.nan)
    joined = padded.swapaxes(1, 2).reshape(rows * (h + gap), columns * (w + gap))[:-gap, :-gap]
    centers = (
        np.arange(n) * (side + gap) + (side - 1) / 2 for n, side in ((rows, h), (columns, w))
    )
    return joined, *centers


def principal_components(vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the directions in which vectors vary most, and their shares of the variance.

    The directions are in decreasing order of variance, and the largest coordinate of each, by
    absolute value, is positive.

    Args:
        vectors: (n, d).
        count: how many directions; there are fewer if the vectors span fewer.

    Returns:
        (k, d), of length 1, and (k,).
    """
    vectors = np.asarray(vectors, np.float64)
    _, scales, directions = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    spanned = scales > scales.max(initial=0.0) * max(vectors.shape) * np.finfo(np.float32).eps
    directions, shares = directions[spanned][:count], scales**2 / max(np.sum(scales**2), 1e-30)
    largest = np.abs(directions).argmax(axis=1)[:, None]
    return directions * np.sign(np.take_along_axis(directions, largest, 1)), shares[spanned][:count]
