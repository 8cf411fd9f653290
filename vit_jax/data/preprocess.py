"""Encoded image -> uint8 pixels of the size that the model sees, as stateless TensorFlow ops.

To add a host augmentation, apply it in `train_image` here, after `ensure_shape`; add a line to
`describe`, and its valid values to RANGES (numbers; `checks.SHARE` for a probability) or to `check`
(others). In configs/common.py, give its settings a default in `config.augment`. A new way to crop
is a row in CROPS, and another distribution of Inception crops one in CROP_DISTRIBUTIONS.
randaugment.py has functions of decoded images, uint8 (H, W, C) to the same, such
as `solarize(image, threshold)`, `grayscale(image)` and `blend(degenerate, image, factor)`; a row in
its OPERATIONS would change RandAugment.

All randomness comes from the seed of the image, epoch and copy: for a new augmentation, split off
one more seed in `train_image`; the others still draw the same. Conditions on tensors are `tf.cond`
or `tf.where`; a Python `if` can only test settings. To look at the result: python
input_pipeline.py --config=FILE --show=sheet.png
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

from vit_jax import checks
from vit_jax.data import tf
from vit_jax.data.randaugment import KINDS, color_jitter, randaugment, three_augment
from vit_jax.errors import UserError

RESIZE_METHODS = ("bilinear", "bicubic")
RATIOS = (3 / 4, 4 / 3)  # of Inception crops: width / height
ATTEMPTS = 10  # at an Inception crop that lies inside the image
STRENGTH = checks.Range(0, 100)
BETA = checks.Range(0.1, 100)
RANGES = {
    "crop_keep": checks.Range(0, 1, above=True),
    "pad": checks.COUNT_OR_ZERO,
    "randaugment_layers": checks.Range(0, 10, whole=True),
    "randaugment_magnitude": STRENGTH,
}


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
    checks.check_numbers("config.augment.color_jitter", augment.color_jitter)
    strengths = tuple(augment.color_jitter)
    if len(strengths) != 3 or any(strength not in STRENGTH for strength in strengths):
        raise UserError(
            f"config.augment.color_jitter is {strengths}; it must be the strengths of brightness, "
            f"contrast and color, each {STRENGTH}"
        )
    checks.check_interval("config.augment.crop_area", augment.crop_area)
    checks.check_numbers("config.augment.crop_beta", augment.crop_beta)
    beta = tuple(augment.crop_beta)
    if len(beta) != 2 or any(parameter not in BETA for parameter in beta):
        raise UserError(
            f"config.augment.crop_beta is {beta}; it must be the two parameters of a Beta "
            f"distribution, each {BETA}"
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


class EncodedImage(NamedTuple):
    """An image of which only the part that is needed is decoded.

    Attributes:
        encoded: a JPEG, PNG or BMP, or a GIF, whose first frame is used.
        channels: 1 or 3; images are converted. Of 16-bit values, the high byte is used.
        exif: whether the image is turned upright: as the orientation in the EXIF data of a JPEG
            or PNG says.
    """

    encoded: tf.Tensor
    channels: int
    exif: bool

    def decode(self, window: Callable | None = None) -> tf.Tensor:
        """Returns the image or a part of it, uint8 (H, W, channels).

        Args:
            window: the image's shape (3,) -> top, left, height and width of the part; None: the
                whole image. Of a JPEG, only the part is decoded.
        """
        if not self.exif:
            return self.decode_stored(window)
        orientation = exif_orientation(self.encoded)

        def decode_and_turn():
            stored = window and functools.partial(stored_window, window, orientation)
            return turn_upright(self.decode_stored(stored), orientation)

        is_upright = tf.equal(orientation, 1)
        return tf.cond(is_upright, lambda: self.decode_stored(window), decode_and_turn)

    def decode_stored(self, window: Callable | None) -> tf.Tensor:
        """Returns the image, or a part of it, as it is stored."""

        def from_jpeg():
            shape = window and tf.io.extract_jpeg_shape(self.encoded)
            return self.decode_jpeg(window and tf.stack(window(shape)))

        def from_other():
            image = tf.io.decode_image(
                self.encoded, channels=self.channels, expand_animations=False
            )
            if window is None:
                return image
            top, left, height, width = window(tf.shape(image))
            return image[top : top + height, left : left + width]

        return tf.cond(tf.io.is_jpeg(self.encoded), from_jpeg, from_other)

    def decode_jpeg(self, corners) -> tf.Tensor:
        """Decodes the part of a JPEG at `corners`, (top, left, height, width), or None: all."""

        def decode(channels):
            if corners is None:
                return tf.io.decode_jpeg(self.encoded, channels=channels)
            return tf.io.decode_and_crop_jpeg(self.encoded, corners, channels=channels)

        if self.channels == 3:
            return decode(3)
        # The JPEG library converts CMYK to color, but not to gray.
        is_cmyk = tf.equal(tf.io.extract_jpeg_shape(self.encoded)[2], 4)
        return tf.cond(is_cmyk, lambda: to_gray(decode(3)), lambda: decode(1))


# How a stored image becomes upright, for each EXIF orientation from 1: whether rows and columns are
# swapped, and then whether the rows, and whether the columns, are reversed.
ORIENTATIONS = (
    (False, False, False),
    (False, False, True),
    (False, True, True),
    (False, True, False),
    (True, False, False),
    (True, False, True),
    (True, True, True),
    (True, True, False),
)


def turn_upright(image, orientation) -> tf.Tensor:
    """Turns a stored image, (H, W, C), as its EXIF orientation, int32 (), says."""
    swapped, *is_reversed = tf.unstack(tf.gather(ORIENTATIONS, orientation - 1))
    upright = tf.cond(swapped, lambda: tf.transpose(image, (1, 0, 2)), lambda: image)
    row_step, column_step = (tf.where(reverse, -1, 1) for reverse in is_reversed)
    return tf.ensure_shape(upright[::row_step, ::column_step], (None, None, image.shape[-1]))


def stored_window(window: Callable, orientation, shape) -> list[tf.Tensor]:
    """Returns where a window of the upright image lies in the stored one.

    Args:
        window: the upright image's shape (3,) -> top, left, height and width.
        orientation: the EXIF orientation, int32 ().
        shape: the stored image's shape (3,).
    """
    swapped, reversed_rows, reversed_columns = tf.unstack(tf.gather(ORIENTATIONS, orientation - 1))
    shape = tf.where(swapped, tf.gather(shape, (1, 0, 2)), shape)
    top, left, height, width = window(shape)
    top = tf.where(reversed_rows, shape[0] - top - height, top)
    left = tf.where(reversed_columns, shape[1] - left - width, left)
    corners = tf.stack([top, left, height, width])
    return tf.unstack(tf.where(swapped, tf.gather(corners, (1, 0, 3, 2)), corners))


def exif_orientation(encoded) -> tf.Tensor:
    """Returns the orientation in an image's EXIF data, int32 () from 1 to 8; 1 if it has none."""
    return traced_search()(encoded)


@functools.cache
def traced_search() -> Callable:
    """Returns `search_orientation`, traced once instead of for each pipeline."""
    signature = [tf.TensorSpec((), tf.string)]
    return tf.function(search_orientation, input_signature=signature, autograph=False)


def search_orientation(encoded) -> tf.Tensor:
    """Returns the orientation in an image's EXIF data; see `exif_orientation`."""

    def parse(start, little_endian):
        read = functools.partial(read_numbers, encoded, little_endian=little_endian)
        directory = start + read(start + 4, tf.int32, 1)[0]
        num_entries = tf.maximum(read(directory, tf.uint16, 1)[0], 1)
        # An entry has 12 bytes: tag, type, number of values (4 bytes), value (4 bytes).
        entries = tf.reshape(read(directory + 2, tf.uint16, 6 * num_entries), (-1, 6))
        is_orientation = tf.equal(entries[:, 0], 0x0112)
        value = tf.reduce_max(tf.where(is_orientation, entries[:, 4], 1))
        return tf.where((value >= 1) & (value <= 8), value, 1)

    def parse_either(start):
        order = read_numbers(encoded, start, tf.uint16, 1)[0]
        is_little_endian = tf.equal(order, int.from_bytes(b"II"))  # or b"MM"
        return tf.cond(is_little_endian, lambda: parse(start, True), lambda: parse(start, False))

    def search():
        start = tf.cond(
            tf.io.is_jpeg(encoded), lambda: exif_in_jpeg(encoded), lambda: exif_in_png(encoded)
        )
        return tf.cond(tf.equal(start, 0), lambda: tf.constant(1), lambda: parse_either(start))

    return tf.cond(may_have_exif(encoded), search, lambda: tf.constant(1))


def may_have_exif(encoded) -> tf.Tensor:
    """Returns False for JPEGs whose only application data is JFIF's; faster than searching."""
    marker, length = tf.unstack(read_numbers(encoded, 2, tf.uint16, 2))
    after_jfif = tf.where(tf.equal(marker, 0xFFE0), 4 + length, 2)
    marker = read_numbers(encoded, after_jfif, tf.uint16, 1)[0]
    return tf.equal(marker // 16, 0xFFE) | ~tf.io.is_jpeg(encoded)


def exif_in_jpeg(encoded) -> tf.Tensor:
    """Returns where the EXIF data of a JPEG starts, int32 (); 0 if it has none."""

    def read_segment(start):  # marker, length, "Exif"
        return start, read_numbers(encoded, start, tf.uint16, 4)

    def is_exif(segment):
        return tf.reduce_all(tf.equal(segment * (1, 0, 1, 1), (0xFFE1, 0, 0x4578, 0x6966)))

    def is_other_data(_, segment):  # of an application, before the image
        return tf.equal(segment[0] // 16, 0xFFE) & ~is_exif(segment)

    start, segment = tf.while_loop(
        is_other_data,
        lambda start, segment: read_segment(start + 2 + segment[1]),
        read_segment(tf.constant(2)),
    )
    return tf.where(is_exif(segment), start + 10, 0)


def exif_in_png(encoded) -> tf.Tensor:
    """Returns where the EXIF data of a PNG starts, int32 (); 0 if it has none or isn't a PNG."""

    def read_chunk(start):  # length, kind
        return start, read_numbers(encoded, start, tf.int32, 2)

    def is_before_exif(_, chunk):
        stops = tf.equal(chunk[1], [int.from_bytes(kind) for kind in (b"eXIf", b"IDAT", b"\0" * 4)])
        return (chunk[0] >= 0) & ~tf.reduce_any(stops)

    _, signature = read_chunk(0)
    is_png = tf.equal(signature[1], int.from_bytes(b"\r\n\x1a\n"))
    start, chunk = tf.while_loop(
        is_before_exif,
        lambda start, chunk: read_chunk(start + 12 + chunk[0]),
        read_chunk(tf.where(is_png, 8, tf.strings.length(encoded))),
    )
    return tf.where(tf.equal(chunk[1], int.from_bytes(b"eXIf")), start + 8, 0)


def read_numbers(encoded, start, dtype, count, little_endian: bool = False) -> tf.Tensor:
    """Returns `count` numbers from the bytes of an image, int32; zeros after its end."""
    start = tf.clip_by_value(start, 0, tf.strings.length(encoded))
    num_bytes = dtype.size * count
    raw = tf.strings.substr(encoded, start, num_bytes)
    numbers = tf.io.decode_raw(raw, dtype, little_endian=little_endian, fixed_length=num_bytes)
    return tf.cast(numbers, tf.int32)


def to_gray(image) -> tf.Tensor:
    """Converts an image to gray, uint8 (H, W, 3) -> (H, W, 1)."""
    return to_uint8(tf.tensordot(tf.cast(image, tf.float32), [[0.2989], [0.587], [0.114]], 1))


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
