"""Views of an image for training and for evaluation.

To add a host augmentation, apply it in `train_image` here, after `ensure_shape`; add a line to
`describe`, and its valid values to RANGES (numbers; `checks.SHARE` for a probability) or to `check`
(others). In configs/common.py, give its settings a default in `config.augment`. A new way to crop
is a row in CROPS in crops.py, and another distribution of Inception crops one in
CROP_DISTRIBUTIONS. randaugment.py has functions of decoded images, uint8 (H, W, C) to the same,
such as `solarize(image, threshold)`, `grayscale(image)` and `blend(degenerate, image, factor)`; a
row in its OPERATIONS would change RandAugment.

All randomness comes from the seed of the image, epoch and copy: for a new augmentation, split off
one more seed in `train_image`; the others still draw the same. Conditions on tensors are `tf.cond`
or `tf.where`; a Python `if` can only test settings. To look at the result: python
input_pipeline.py --config=FILE --show=sheet.png
"""

from __future__ import annotations

from vit_jax import checks
from vit_jax.data import tf
from vit_jax.data.preprocess.crops import BETA, CROP_DISTRIBUTIONS, CROPS
from vit_jax.data.preprocess.decoding import EncodedImage
from vit_jax.data.preprocess.randaugment import KINDS, color_jitter, randaugment, three_augment
from vit_jax.data.preprocess.resizing import RESIZE_METHODS, resize_and_crop

STRENGTH = checks.Range(0, 100)
RANGES = {
    "crop_keep": checks.Range(0, 1, above=True),
    "pad": checks.COUNT_OR_ZERO,
    "randaugment_layers": checks.Range(0, 10, whole=True),
    "randaugment_magnitude": STRENGTH,
}


def image_shape(config) -> tuple[int, int, int]:
    """Returns (height, width, channels) of the images that the model sees."""
    return *checks.size_pair("config.image_size", config.image_size), config.dataset.channels


def train_image(
    encoded, seed, *, size: tuple[int, int], channels: int, augment, exif: bool = False
) -> tf.Tensor:
    """Returns an augmented view of a training image, uint8 (*size, channels).

    Args:
        encoded: a JPEG, PNG, BMP or GIF.
        seed: int64 (2,), the source of all randomness.
        size: (height, width) of the view.
        channels: 1 or 3.
        augment: `config.augment`. Used here: the fields of crops, flip, 3-Augment, color jitter
            and RandAugment.
        exif: whether the image is turned upright; see `EncodedImage`.
    """
    seeds = tf.unstack(tf.random.split(seed, 5))
    crop_seed, flip_seed, jitter_seed, randaugment_seed, three_augment_seed = seeds
    image = EncodedImage(encoded, channels, exif)
    image = CROPS[augment.crop].function(image, crop_seed, size, augment)
    if augment.flip:
        image = tf.image.stateless_random_flip_left_right(image, flip_seed)
    image = tf.ensure_shape(image, (*size, channels))
    if augment.three_augment:
        image = three_augment(image, three_augment_seed)
    image = color_jitter(image, jitter_seed, tuple(augment.color_jitter))
    return randaugment(
        image,
        randaugment_seed,
        augment.randaugment_layers,
        augment.randaugment_magnitude,
        augment.randaugment_kind,
        tuple(augment.mean),
    )


def eval_image(
    encoded,
    *,
    size: tuple[int, int],
    channels: int,
    keep: float | str,
    method: str = "bilinear",
    exif: bool = False,
) -> tf.Tensor:
    """Returns the view of an image for evaluation, uint8 (*size, channels).

    Resizes with the proportions kept until `keep` of the shorter side (0.875: 224 of 256 pixels)
    fills `size`, and crops the center; if `keep` is "squeeze", resizes the whole image to `size`.

    Args:
        encoded, size, channels, exif: see `train_image`.
        keep, method: `eval_crop` and `eval_method` of `config.augment`.
    """
    image = EncodedImage(encoded, channels, exif).decode()
    return resize_and_crop(image, size, keep, method=method)


def check(augment) -> None:
    """Raises UserError for settings of `config.augment` that are invalid on the host."""
    for field, choices in (
        ("crop", CROPS),
        ("crop_distribution", CROP_DISTRIBUTIONS),
        ("resize_method", RESIZE_METHODS),
        ("randaugment_kind", KINDS),
        ("three_augment", (False, True)),
    ):
        checks.check_choice(f"config.augment.{field}", augment[field], choices)
    checks.check_ranges("config.augment", augment, RANGES)
    checks.check_eval_view(augment.eval_crop, augment.eval_method, "config.augment.")
    checks.check_interval("config.augment.crop_area", augment.crop_area)
    checks.check_each(
        "config.augment.color_jitter",
        augment.color_jitter,
        3,
        STRENGTH,
        "the strengths of brightness, contrast and color",
    )
    checks.check_each(
        "config.augment.crop_beta",
        augment.crop_beta,
        2,
        BETA,
        "the two parameters of a Beta distribution",
    )


def describe(augment) -> list[str]:
    """Returns a few words for each augmentation of `config.augment` that is on."""
    layers, magnitude = augment.randaugment_layers, augment.randaugment_magnitude
    kind = "" if augment.randaugment_kind == "pillow" else f" as in {augment.randaugment_kind}"
    strengths = "/".join(f"{strength:g}" for strength in augment.color_jitter)
    settings = (
        (True, CROPS[augment.crop].describe(augment)),
        (augment.resize_method != "bilinear", augment.resize_method),
        (augment.flip, "flip"),
        (augment.three_augment, "3-Augment"),
        (any(augment.color_jitter), f"color jitter {strengths}"),
        (layers, f"RandAugment({layers}, {magnitude:g}){kind}"),
    )
    return [words for is_on, words in settings if is_on]
