"""Encoded image -> uint8 pixels of the size that the model sees, as stateless TensorFlow ops.

To add a host augmentation, edit two files: apply it in `train_image` and extend `check` and
`describe` here, and give its settings a default in `config.augment` in configs/common.py. A new
way to crop is a row in CROPS. All randomness comes from the seed of the image and epoch: for a new
augmentation, split one more off in `train_image`; the others keep what they draw.
"""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from vit_jax import checks
from vit_jax.data.randaugment import color_jitter, randaugment
from vit_jax.errors import UserError


def train_image(encoded, seed, *, size: tuple[int, int], channels: int, augment) -> tf.Tensor:
    """Returns an augmented view of a training image, uint8 (*size, channels).

    Args:
        encoded: a JPEG, PNG, BMP or GIF.
        seed: int64 (2,), the source of all randomness.
        size: (height, width) of the view.
        channels: 1 or 3.
        augment: `config.augment`. Used here: the fields of crops, flip, color jitter and
            RandAugment.
    """
    crop_seed, flip_seed, jitter_seed, randaugment_seed = tf.unstack(tf.random.split(seed, 4))
    image = CROPS[augment.crop].function(encoded, crop_seed, size, channels, augment)
    if augment.flip:
        image = tf.image.stateless_random_flip_left_right(image, flip_seed)
    image = tf.ensure_shape(image, (*size, channels))
    image = color_jitter(image, jitter_seed, tuple(augment.color_jitter))
    layers, magnitude = augment.randaugment_layers, augment.randaugment_magnitude
    return randaugment(image, randaugment_seed, layers, magnitude)


def eval_image(encoded, *, size: tuple[int, int], channels: int, keep: float) -> tf.Tensor:
    """Returns the view of an image for evaluation, uint8 (*size, channels).

    Resizes with the proportions kept until `keep` of the shorter side (0.875: 224 of 256 pixels)
    fills `size`, and crops the center.
    """
    return resize_and_crop(decode(encoded, channels), size, keep)


def check(augment) -> None:
    """Raises UserError for settings of `config.augment` that can't work on the host."""
    checks.check_choice("config.augment.crop", augment.crop, CROPS)
    for name in ("randaugment_layers", "randaugment_magnitude", "pad"):
        checks.check_range(f"config.augment.{name}", augment[name])
    strengths = tuple(augment.color_jitter)
    if len(strengths) != 3 or min(strengths) < 0:
        raise UserError(
            f"config.augment.color_jitter is {strengths}; it must be the strengths of brightness, "
            "contrast and color, each at least 0"
        )
    for name in ("eval_crop", "crop_keep"):
        if not 0 < augment[name] <= 1:
            raise UserError(
                f"config.augment.{name} is {augment[name]}; it must be above 0 and at most 1"
            )
    checks.check_interval("config.augment.crop_area", augment.crop_area)


def describe(augment) -> list[str]:
    """Returns a few words for each augmentation of `config.augment` that is on."""
    layers, magnitude = augment.randaugment_layers, augment.randaugment_magnitude
    strengths = "/".join(f"{strength:g}" for strength in augment.color_jitter)
    settings = (
        (True, CROPS[augment.crop].describe(augment)),
        (augment.flip, "flip"),
        (any(augment.color_jitter), f"color jitter {strengths}"),
        (layers, f"RandAugment({layers}, {magnitude:g})"),
    )
    return [words for is_on, words in settings if is_on]


def inception_crop(encoded, seed, size, channels, augment) -> tf.Tensor:
    """Crops a random part of the image and resizes it (arXiv:1409.4842, section 6).

    The part has a share `crop_area` of the image's area, at an aspect ratio of 3/4 to 4/3. Of a
    JPEG, only that part is decoded.
    """

    def window(shape):
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            shape,
            bounding_boxes=tf.zeros((0, 0, 4)),
            seed=seed,
            min_object_covered=0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=tuple(augment.crop_area),
            max_attempts=100,
            use_image_if_no_bounding_boxes=True,
        )
        return begin[0], begin[1], extent[0], extent[1]  # top, left, height, width

    def crop_jpeg():
        corners = tf.stack(window(tf.io.extract_jpeg_shape(encoded)))
        return tf.io.decode_and_crop_jpeg(encoded, corners, channels=channels)

    def crop_other():
        image = tf.io.decode_image(encoded, channels=channels, expand_animations=False)
        top, left, height, width = window(tf.shape(image))
        return image[top : top + height, left : left + width]

    return resize(tf.cond(tf.io.is_jpeg(encoded), crop_jpeg, crop_other), size)


def random_crop(encoded, seed, size, channels, augment) -> tf.Tensor:
    """Resizes as for evaluation, with `crop_keep` for `eval_crop`, and crops at a random place."""
    offset = tf.random.stateless_uniform((2,), seed)
    return resize_and_crop(decode(encoded, channels), size, augment.crop_keep, offset)


def pad_and_crop(encoded, seed, size, channels, augment) -> tf.Tensor:
    """Resizes, pads with `pad` zeros on each side, and crops back at a random place."""
    image, pad = resize(decode(encoded, channels), size), augment.pad
    image = tf.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    top, left = tf.unstack(tf.random.stateless_uniform((2,), seed, 0, 2 * pad + 1, tf.int32))
    return image[top : top + size[0], left : left + size[1]]


def no_crop(encoded, seed, size, channels, augment) -> tf.Tensor:
    """Resizes the whole image; its proportions aren't kept."""
    return resize(decode(encoded, channels), size)


class Crop(NamedTuple):
    """A way to crop.

    Attributes:
        function: (encoded, seed, size, channels, config.augment) -> uint8 (*size, channels).
        describe: config.augment -> a few words.
    """

    function: Callable
    describe: Callable


CROPS = {
    "inception": Crop(
        inception_crop, lambda augment: "Inception crop {:g} to {:g}".format(*augment.crop_area)
    ),
    "resize": Crop(random_crop, lambda augment: f"random crop of {augment.crop_keep:g}"),
    "pad": Crop(pad_and_crop, lambda augment: f"padded by {augment.pad}, cropped"),
    "none": Crop(no_crop, lambda augment: "resized"),
}


def decode(encoded, channels: int) -> tf.Tensor:
    """Decodes a JPEG, PNG or BMP, or a GIF's first frame, to uint8 (H, W, channels)."""
    return tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.decode_jpeg(encoded, channels=channels),
        lambda: tf.io.decode_image(encoded, channels=channels, expand_animations=False),
    )


def resize_and_crop(image, size: tuple[int, int], keep: float, offset=None) -> tf.Tensor:
    """Resizes with the proportions kept until `keep` of the image fills `size`, and crops.

    Shrinking averages over pixels. Pixels outside the crop aren't computed.

    Args:
        image: uint8 (H, W, C).
        size: (height, width) of the crop.
        keep: the share of the image, along the side that limits it, that the crop shows.
        offset: where the crop lies, float32 (2,) in [0, 1): 0 is the top or left; None: the center.

    Returns:
        uint8 (*size, C).
    """
    sides = tf.cast(tf.shape(image)[:2], tf.float32)
    scale = tf.reduce_max(tf.constant(size, tf.float32) / keep / sides)
    resized = tf.maximum(tf.round(sides * scale), size)
    margin = resized - size
    first = tf.floor(margin / 2.0 if offset is None else offset * (margin + 1.0))
    pixels = tf.raw_ops.ScaleAndTranslate(
        images=image[None],
        size=size,
        scale=resized / sides,
        translation=-first,
        kernel_type="triangle",
        antialias=True,
    )
    return tf.ensure_shape(to_uint8(pixels[0]), (*size, image.shape[-1]))


def resize(image, size: tuple[int, int]) -> tf.Tensor:
    """Resizes bilinearly, uint8 (H, W, C) -> uint8 (*size, C).

    If a side shrinks to less than half, averages over pixels: interpolation would skip some.
    """

    def bilinear(antialias):
        return lambda: tf.image.resize(image, size, method="bilinear", antialias=antialias)

    skips_pixels = tf.reduce_any(tf.shape(image)[:2] > 2 * tf.constant(size))
    return to_uint8(tf.cond(skips_pixels, bilinear(True), bilinear(False)))


def to_uint8(pixels) -> tf.Tensor:
    """Rounds float values from 0 to 255."""
    return tf.cast(pixels + 0.5, tf.uint8)
