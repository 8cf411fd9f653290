"""Resizes decoded images, uint8 (H, W, C)."""

from __future__ import annotations

from vit_jax import checks
from vit_jax.data import tf

RESIZE_METHODS = ("bilinear", "bicubic")


def resize_and_crop(
    image, size: tuple[int, int], keep: float | str, offset=None, method: str = "bilinear"
) -> tf.Tensor:
    """Resizes with the proportions kept until `keep` of the image fills `size`, and crops.

    Pixels outside the crop aren't computed.

    Args:
        image: uint8 (H, W, C).
        size: (height, width) of the crop.
        keep: the share of the image, along the side that limits it, that the crop shows; or
            "squeeze": all of it, whatever its proportions.
        offset: where the crop lies, float32 (2,) in [0, 1): 0 is the top or left; None: the center.
        method: one of EVAL_METHODS in vit_jax/checks.py.

    Returns:
        uint8 (*size, C).
    """
    sides = tf.cast(tf.shape(image)[:2], tf.float32)
    if keep == checks.SQUEEZE:
        resized = tf.constant(size, tf.float32)
    else:
        scale = tf.reduce_max(tf.constant(size, tf.float32) / keep / sides)
        resized = tf.maximum(tf.round(sides * scale), size)
    margin = resized - size
    first = tf.floor(margin / 2.0 if offset is None else offset * (margin + 1.0))
    if method == "area":
        pixels = tf.cast(image, tf.float32)
        for axis in (0, 1):
            shrinkage = sides[axis] / resized[axis]
            pixels = average_areas(pixels, axis, first[axis], size[axis], shrinkage)
    else:
        kernel, _, aliased = method.partition("_")
        pixels = tf.raw_ops.ScaleAndTranslate(
            images=image[None],
            size=size,
            scale=resized / sides,
            translation=-first,
            kernel_type={"bilinear": "triangle", "bicubic": "keyscubic"}[kernel],
            antialias=not aliased,
        )[0]
        if kernel == "bicubic":  # it overshoots
            pixels = tf.clip_by_value(pixels, 0.0, 255.0)
    return tf.ensure_shape(to_uint8(pixels), (*size, image.shape[-1]))


def average_areas(pixels, axis: int, first, size: int, shrinkage) -> tf.Tensor:
    """Averages an axis over the area of each new pixel, as `tf.image.resize(method="area")` does.

    Args:
        pixels: float32 (H, W, C).
        axis: 0 or 1.
        first, size: the first new pixel, float32 (), and how many there are.
        shrinkage: old pixels per new one, float32 ().
    """
    starts = (tf.range(size, dtype=tf.float32)[:, None] + first) * shrinkage
    overlapped = tf.range(tf.math.ceil(shrinkage) + 1.0)
    old = tf.floor(starts) + overlapped  # (size, old pixels per new one)
    shares = tf.minimum(starts + shrinkage, old + 1.0) - tf.maximum(starts, old)
    shares = tf.maximum(shares, 0.0)
    last = tf.shape(pixels)[axis] - 1
    parts = tf.gather(pixels, tf.minimum(tf.cast(old, tf.int32), last), axis=axis)
    equation = ("ikwc,ik->iwc", "hikc,ik->hic")[axis]
    return tf.einsum(equation, parts, shares / shrinkage)


def resize(image, size, method: str = "bilinear") -> tf.Tensor:
    """Resizes, uint8 (H, W, C) -> uint8 (*size, C).

    Args:
        image: uint8 (H, W, C).
        size: (height, width), or int32 (2,).
        method: "bicubic" averages over the pixels that a new one covers, as Pillow does;
            "bilinear" only if a side shrinks to less than half: interpolation would skip some.
    """
    if method == "bicubic":
        pixels = tf.image.resize(image, size, method="bicubic", antialias=True)
        return to_uint8(tf.clip_by_value(pixels, 0.0, 255.0))  # it overshoots

    def bilinear(antialias):
        return lambda: tf.image.resize(image, size, method="bilinear", antialias=antialias)

    skips_pixels = tf.reduce_any(tf.shape(image)[:2] > 2 * tf.constant(size))
    return to_uint8(tf.cond(skips_pixels, bilinear(True), bilinear(False)))


def to_uint8(pixels) -> tf.Tensor:
    """Rounds float values from 0 to 255."""
    return tf.cast(pixels + 0.5, tf.uint8)
