"""Encoded image -> uint8 pixels of the size the model sees, as stateless TensorFlow operations."""

import tensorflow as tf

from vit_jax import checks
from vit_jax.data.randaugment import color_jitter, randaugment
from vit_jax.errors import UserError

CROPS = ("inception", "resize", "pad", "none")


def train_image(encoded, seed, *, size: tuple[int, int], channels: int, augment) -> tf.Tensor:
    """A training view: uint8 (*size, channels).

    seed: int64 (2,), all the randomness of this view. augment: config.augment, of which `crop`
    ("inception": an area of `crop_area` of the image at an aspect ratio of 3/4 to 4/3, resized,
    arXiv:1409.4842 section 6; "resize": resized as for evaluation, then a random window of it;
    "pad": resized, zero-padded by `pad` pixels, cropped back; "none": resized), `flip` (left-right,
    half of the time), `color_jitter` and RandAugment are for here.
    """
    crop_seed, flip_seed, jitter_seed, randaugment_seed = tf.unstack(tf.random.split(seed, 4))
    if augment.crop == "inception":
        image = inception_crop(encoded, crop_seed, tuple(augment.crop_area), channels)
        image = resize(image, size)
    elif augment.crop == "resize":
        place = tf.random.stateless_uniform((2,), crop_seed)
        image = resize_and_crop(decode(encoded, channels), size, augment.crop_keep, place)
    elif augment.crop == "pad":
        image = pad_and_crop(resize(decode(encoded, channels), size), crop_seed, augment.pad)
    else:
        image = resize(decode(encoded, channels), size)
    if augment.flip:
        image = tf.image.stateless_random_flip_left_right(image, flip_seed)
    image = tf.ensure_shape(image, (*size, channels))
    image = color_jitter(image, jitter_seed, tuple(augment.color_jitter))
    layers, magnitude = augment.randaugment_layers, augment.randaugment_magnitude
    return randaugment(image, randaugment_seed, layers, magnitude)


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
    crops = {
        "inception": f"Inception crop {augment.crop_area[0]:g} to {augment.crop_area[1]:g}",
        "resize": f"resized, {augment.crop_keep:g} of it kept",
        "pad": f"padded by {augment.pad}, cropped",
        "none": "resized",
    }
    layers, magnitude = augment.randaugment_layers, augment.randaugment_magnitude
    strengths = "/".join(f"{strength:g}" for strength in augment.color_jitter)
    settings = (
        (True, crops[augment.crop]),
        (augment.flip, "flip"),
        (any(augment.color_jitter), f"color jitter {strengths}"),
        (layers, f"RandAugment({layers}, {magnitude:g})"),
    )
    return [words for is_on, words in settings if is_on]


def eval_image(encoded, *, size: tuple[int, int], channels: int, keep: float) -> tf.Tensor:
    """The view for evaluation: uint8 (*size, channels).

    Resized, its proportions kept, until `keep` of the shorter side (0.875: 224 of 256) fills the
    size; of that the centre.
    """
    return resize_and_crop(decode(encoded, channels), size, keep)


def resize_and_crop(image, size: tuple[int, int], keep: float, place=None) -> tf.Tensor:
    """A window of the image resized, its proportions kept, until `keep` of it fills the size.

    place: float32 (2,) in [0, 1), where in the room that is left the window lies; None: in its
    middle. Averages over pixels where it shrinks; what lies outside the window is not computed.
    """
    sides = tf.cast(tf.shape(image)[:2], tf.float32)
    scale = tf.reduce_max(tf.constant(size, tf.float32) / keep / sides)
    resized = tf.maximum(tf.round(sides * scale), size)
    room = resized - size
    first = tf.floor(room / 2.0 if place is None else place * (room + 1.0))
    pixels = tf.raw_ops.ScaleAndTranslate(
        images=image[None],
        size=size,
        scale=resized / sides,
        translation=-first,
        kernel_type="triangle",
        antialias=True,
    )
    return tf.ensure_shape(to_uint8(pixels[0]), (*size, image.shape[-1]))


def decode(encoded, channels: int) -> tf.Tensor:
    """JPEG (grey and CMYK too), PNG, BMP or GIF's first frame -> uint8 (H, W, channels)."""
    return tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.decode_jpeg(encoded, channels=channels),
        lambda: tf.io.decode_image(encoded, channels=channels, expand_animations=False),
    )


def inception_crop(encoded, seed, area_range: tuple[float, float], channels: int) -> tf.Tensor:
    """A random window of the image; of a JPEG only that window is decoded."""

    def window(shape):
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            shape,
            bounding_boxes=tf.zeros((0, 0, 4)),
            seed=seed,
            min_object_covered=0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=area_range,
            max_attempts=100,
            use_image_if_no_bounding_boxes=True,
        )
        return begin[0], begin[1], extent[0], extent[1]

    def jpeg():
        top_left_size = tf.stack(window(tf.io.extract_jpeg_shape(encoded)))
        return tf.io.decode_and_crop_jpeg(encoded, top_left_size, channels=channels)

    def other():
        image = tf.io.decode_image(encoded, channels=channels, expand_animations=False)
        top, left, height, width = window(tf.shape(image))
        return image[top : top + height, left : left + width]

    return tf.cond(tf.io.is_jpeg(encoded), jpeg, other)


def pad_and_crop(image, seed, pad: int) -> tf.Tensor:
    """A random window of the image's own size, out of the image with `pad` zeros around it."""
    shape = tf.shape(image)
    image = tf.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    top, left = tf.unstack(tf.random.stateless_uniform((2,), seed, 0, 2 * pad + 1, tf.int32))
    return image[top : top + shape[0], left : left + shape[1]]


def resize(image, size: tuple[int, int]) -> tf.Tensor:
    """uint8 -> uint8 of that size, bilinear.

    Where it shrinks to less than half, and would pass over pixels, it averages over them.
    """

    def bilinear(antialias):
        return lambda: tf.image.resize(image, size, method="bilinear", antialias=antialias)

    passes_over = tf.reduce_any(tf.shape(image)[:2] > 2 * tf.constant(size))
    return to_uint8(tf.cond(passes_over, bilinear(True), bilinear(False)))


def to_uint8(pixels) -> tf.Tensor:
    """Rounds values from 0 to 255."""
    return tf.cast(pixels + 0.5, tf.uint8)
