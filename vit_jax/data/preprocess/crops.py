"""Ways to crop training images: functions of (EncodedImage, seed, size, config.augment)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from vit_jax import checks
from vit_jax.data import tf
from vit_jax.data.preprocess.resizing import resize, resize_and_crop

RATIOS = (3 / 4, 4 / 3)  # of Inception crops: width / height
ATTEMPTS = 10  # at an Inception crop that lies inside the image
BETA = checks.Range(0.1, 100)


def inception_crop(image, seed, size, augment) -> tf.Tensor:
    """Crops a random part of the image and resizes it (arXiv:1409.4842, section 6).

    The part has a share `crop_area` of the image's area, at an aspect ratio of 3/4 to 4/3. Of a
    JPEG, only that part is decoded.
    """
    window = CROP_DISTRIBUTIONS[augment.crop_distribution]
    part = image.decode(lambda shape: window(shape, seed, augment))
    return resize(part, size, augment.resize_method)


def tensorflow_window(shape, seed, augment) -> tuple:
    """Returns top, left, height and width as TensorFlow's operation draws them.

    It draws the aspect ratio uniformly, and then the height uniformly among those that give a valid
    area: small areas are more frequent.
    """
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape,
        bounding_boxes=tf.zeros((0, 0, 4)),
        seed=seed,
        min_object_covered=0,
        aspect_ratio_range=RATIOS,
        area_range=tuple(augment.crop_area),
        max_attempts=100,
        use_image_if_no_bounding_boxes=True,
    )
    return begin[0], begin[1], extent[0], extent[1]


def area_window(shape, seed, augment) -> tuple:
    """Returns top, left, height and width, drawn as torchvision's RandomResizedCrop does.

    The share of the area is uniform and the logarithm of the aspect ratio is. After ATTEMPTS at a
    window that lies inside the image, the window is the central part of the image at the nearest
    valid ratio.
    """
    share_seed, seed = tf.unstack(tf.random.split(seed, 2))
    return window_of_shares(
        tf.random.stateless_uniform((ATTEMPTS,), share_seed), shape, seed, augment
    )


def beta_window(shape, seed, augment) -> tuple:
    """Returns a window as `area_window` does, but for the distribution of the area's share.

    It is Beta(*crop_beta), scaled to `crop_area`.
    """
    seed_a, seed_b, seed = tf.unstack(tf.random.split(seed, 3))
    a, b = augment.crop_beta
    # X / (X + Y), if X and Y are drawn from Gamma(a) and Gamma(b), is drawn from Beta(a, b).
    x = tf.random.stateless_gamma((ATTEMPTS,), seed_a, a)
    y = tf.random.stateless_gamma((ATTEMPTS,), seed_b, b)
    return window_of_shares(tf.math.divide_no_nan(x, x + y), shape, seed, augment)


def window_of_shares(shares, shape, seed, augment) -> tuple:
    """Returns top, left, height and width of the first window that lies inside the image.

    Args:
        shares: float32 (ATTEMPTS,) in [0, 1], where the area lies in `crop_area`.
        shape: the image's shape (3,).
        seed: int64 (2,), for the aspect ratios and the place.
        augment: `config.augment`.
    """
    ratio_seed, place_seed = tf.unstack(tf.random.split(seed, 2))
    sides = tf.cast(shape[:2], tf.float32)  # height, width
    low, high = augment.crop_area
    area = (low + shares * (high - low)) * tf.reduce_prod(sides)
    limit = math.log(RATIOS[1])
    ratio = tf.exp(tf.random.stateless_uniform((ATTEMPTS,), ratio_seed, -limit, limit))
    windows = tf.round(tf.sqrt(tf.stack([area / ratio, area * ratio], axis=1)))  # (ATTEMPTS, 2)
    is_inside = tf.reduce_all((windows > 0) & (windows <= sides), axis=1)
    first = windows[tf.argmax(is_inside)]
    height, width = tf.unstack(sides)
    widest = tf.stack(
        [
            tf.minimum(height, tf.round(width / RATIOS[0])),
            tf.minimum(width, tf.round(height * RATIOS[1])),
        ]
    )
    is_any = tf.reduce_any(is_inside)
    window = tf.where(is_any, first, widest)
    place = tf.where(is_any, tf.random.stateless_uniform((2,), place_seed), 0.5)
    corner = tf.floor(place * (sides - window + tf.where(is_any, 1.0, 0.0)))
    return tuple(tf.unstack(tf.cast(tf.concat([corner, window], 0), tf.int32)))


# `config.augment.crop_distribution` -> function of (shape, seed, config.augment).
CROP_DISTRIBUTIONS = {
    "tensorflow": tensorflow_window,
    "area": area_window,
    "beta": beta_window,
}


def simple_crop(image, seed, size, augment) -> tf.Tensor:
    """Crops at a random place, after resizing and padding (arXiv:2204.07118, section 3.2).

    Resizes with the proportions kept until the shorter side fits `size`, and pads with `pad` pixels
    on each side, which mirror the image.
    """
    image, pad = image.decode(), augment.pad
    height, width = tf.unstack(tf.cast(tf.shape(image)[:2], tf.int64))
    resized = tf.cond(  # rounded down, as in torchvision
        width * size[0] >= height * size[1],
        lambda: tf.stack([size[0], width * size[0] // height]),
        lambda: tf.stack([height * size[1] // width, size[1]]),
    )
    resized = tf.cast(resized, tf.int32)
    image = resize(image, resized, augment.resize_method)
    image = tf.pad(image, ((pad, pad), (pad, pad), (0, 0)), "REFLECT")
    place = tf.random.stateless_uniform((2,), seed)
    room = tf.cast(resized - size + 2 * pad + 1, tf.float32)
    top, left = tf.unstack(tf.cast(tf.floor(place * room), tf.int32))
    return image[top : top + size[0], left : left + size[1]]


def random_crop(image, seed, size, augment) -> tf.Tensor:
    """Resizes as for evaluation, with `crop_keep` for `eval_crop`, and crops at a random place."""
    offset = tf.random.stateless_uniform((2,), seed)
    method = augment.resize_method
    return resize_and_crop(image.decode(), size, augment.crop_keep, offset, method)


def pad_and_crop(image, seed, size, augment) -> tf.Tensor:
    """Resizes, pads with `pad` zeros on each side, and crops back at a random place."""
    image, pad = resize(image.decode(), size, augment.resize_method), augment.pad
    image = tf.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    top, left = tf.unstack(tf.random.stateless_uniform((2,), seed, 0, 2 * pad + 1, tf.int32))
    return image[top : top + size[0], left : left + size[1]]


def no_crop(image, seed, size, augment) -> tf.Tensor:
    """Resizes the whole image; its proportions aren't kept."""
    return resize(image.decode(), size, augment.resize_method)


def describe_inception(augment) -> str:
    """Returns a few words on `inception_crop`."""
    words = "Inception crop {:g} to {:g}".format(*augment.crop_area)
    if augment.crop_distribution == "beta":
        return words + ", Beta({:g}, {:g})".format(*augment.crop_beta)
    return words + {"tensorflow": "", "area": ", uniform area"}[augment.crop_distribution]


class Crop(NamedTuple):
    """A way to crop.

    Attributes:
        function: (EncodedImage, seed, size, config.augment) -> uint8 (*size, channels).
        describe: config.augment -> a few words.
    """

    function: Callable
    describe: Callable


CROPS = {
    "inception": Crop(inception_crop, describe_inception),
    "simple": Crop(simple_crop, lambda augment: f"simple random crop padded by {augment.pad}"),
    "resize": Crop(random_crop, lambda augment: f"random crop of {augment.crop_keep:g}"),
    "pad": Crop(pad_and_crop, lambda augment: f"padded by {augment.pad}, cropped"),
    "none": Crop(no_crop, lambda augment: "resized"),
}
