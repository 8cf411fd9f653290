"""RandAugment (arXiv:1909.13719) and colour jitter, as stateless TensorFlow operations.

Images are uint8 (H, W, C) throughout. Operations that Pillow has compute what Pillow computes.
The magnitudes are those the ViT recipes were published with (big_vision's `randaug(n, m)`, after
TensorFlow's AutoAugment): 10 is the scale's unit, larger ones go on in proportion. Other than
there, contrast blends with the image's mean grey, as Pillow does, and lengths scale with the image.
"""

import tensorflow as tf

FILL = 128  # what geometry and cutout uncover

# Lengths in pixels at magnitude 10 were made for images of 224; they scale with the image.
TRANSLATE, CUTOUT, REFERENCE_SIZE = 100.0, 40.0, 224.0


def randaugment(image, seed, layers: int, magnitude: float) -> tf.Tensor:
    """`layers` operations in a row, each drawn from the sixteen, at that magnitude.

    seed: int64 (2,), all the randomness.
    """
    level = magnitude / 10.0
    for layer in range(layers):
        layer_seed = tf.random.fold_in(seed, layer)
        choice_seed, sign_seed, place_seed = tf.unstack(tf.random.split(layer_seed, 3))
        choice = tf.random.stateless_uniform((), choice_seed, 0, len(OPERATIONS), tf.int32)
        sign = tf.where(tf.random.stateless_uniform((), sign_seed) < 0.5, -1.0, 1.0)
        branches = [
            lambda op=op, image=image, sign=sign, seed=place_seed: op(image, level, sign, seed)
            for op in OPERATIONS.values()
        ]
        shape = image.shape
        image = tf.ensure_shape(tf.switch_case(choice, branches), shape)
    return image


def color_jitter(image, seed, strengths: tuple[float, float, float]) -> tf.Tensor:
    """Brightness, contrast and colour, each by a factor from [1 - strength, 1 + strength]."""
    for i, (enhance, strength) in enumerate(
        zip((brightness, contrast, color), strengths, strict=True)
    ):
        if strength:
            low, high = max(0.0, 1.0 - strength), 1.0 + strength
            factor = tf.random.stateless_uniform((), tf.random.fold_in(seed, i), low, high)
            image = enhance(image, factor)
    return image


def autocontrast(image) -> tf.Tensor:
    """Stretches each channel to 0 .. 255."""
    channels = planes(image)
    low, high = (tf.cast(f(channels, 1, True), tf.float64) for f in (tf.reduce_min, tf.reduce_max))
    scale = tf.where(high > low, 255.0 / (high - low), 1.0)
    offset = tf.where(high > low, low * scale, 0.0)
    stretched = tf.clip_by_value(tf.cast(channels, tf.float64) * scale - offset, 0.0, 255.0)
    return from_planes(tf.cast(stretched, tf.uint8), image)


def equalize(image) -> tf.Tensor:
    """Spreads each channel's histogram evenly."""
    channels = tf.cast(planes(image), tf.int32)
    counts = tf.math.bincount(channels, minlength=256, maxlength=256, axis=-1)  # (C, 256)
    brightest = tf.gather(counts, tf.reduce_max(channels, 1, True), batch_dims=1)
    step = (tf.reduce_sum(counts, 1, True) - brightest) // 255
    spread = (tf.cumsum(counts, axis=1, exclusive=True) + step // 2) // tf.maximum(step, 1)
    tables = tf.cast(tf.where(step > 0, tf.clip_by_value(spread, 0, 255), tf.range(256)), tf.uint8)
    places = channels + 256 * tf.range(image.shape[-1])[:, None]
    return from_planes(tf.gather(tf.reshape(tables, [-1]), places), image)


def planes(image) -> tf.Tensor:
    """(H, W, C) -> (C, H x W): TensorFlow is slow along a last axis of 3."""
    return tf.transpose(tf.reshape(image, (-1, image.shape[-1])))


def from_planes(channels, image) -> tf.Tensor:
    return tf.reshape(tf.transpose(channels), tf.shape(image))


def invert(image) -> tf.Tensor:
    return 255 - image


def posterize(image, bits: int) -> tf.Tensor:
    """Keeps the highest `bits` bits."""
    mask = 256 - (1 << (8 - bits))
    return tf.bitwise.bitwise_and(image, tf.constant(mask, tf.uint8))


def solarize(image, threshold: int) -> tf.Tensor:
    """Inverts what isn't below the threshold."""
    if threshold > 255:
        return image
    inverted = 255 * tf.cast(image >= tf.constant(threshold, tf.uint8), tf.uint8)
    return tf.bitwise.bitwise_xor(image, inverted)


def solarize_add(image, addition: int) -> tf.Tensor:
    """Brightens what is below 128."""
    room = tf.minimum(255 - image, tf.constant(min(addition, 255), tf.uint8))
    return image + room * tf.cast(image < 128, tf.uint8)


def color(image, factor) -> tf.Tensor:
    """0: grey; 1: as it is."""
    return blend(grey(image), image, factor)


def contrast(image, factor) -> tf.Tensor:
    """0: the mean grey; 1: as it is."""
    return blend(tf.floor(tf.reduce_mean(grey(image)) + 0.5), image, factor)


def brightness(image, factor) -> tf.Tensor:
    """0: black; 1: as it is."""
    return blend(0.0, image, factor)


def sharpness(image, factor) -> tf.Tensor:
    """0: smoothed; 1: as it is. The outermost pixels stay."""
    pixels = tf.cast(image, tf.float32)
    sums = pixels[:-2] + pixels[1:-1] + pixels[2:]
    sums = sums[:, :-2] + sums[:, 1:-1] + sums[:, 2:]  # of 3x3 pixels
    smooth = tf.floor((sums + 4.0 * pixels[1:-1, 1:-1]) / 13.0 + 0.5)
    inner = blend(smooth, image[1:-1, 1:-1], factor)
    rows = tf.concat([image[1:-1, :1], inner, image[1:-1, -1:]], axis=1)
    return tf.concat([image[:1], rows, image[-1:]], axis=0)


def grey(image) -> tf.Tensor:
    """Luma (ITU-R 601), float32, in each channel; an image of one channel is grey already."""
    pixels = tf.cast(image, tf.float32)
    if image.shape[-1] != 3:
        return pixels
    # In units of 1/65536, as whole numbers below 2**24, which float32 has exactly.
    weights = tf.constant([[19595.0], [38470.0], [7471.0]]) * tf.ones((1, 3))
    luma = tf.reshape(pixels, (-1, 3)) @ weights
    return tf.reshape(tf.floor((luma + 32768.0) / 65536.0), tf.shape(image))


def blend(degenerate, image, factor) -> tf.Tensor:
    """degenerate (float32) + factor x (image - degenerate), cut to 0 .. 255."""
    mixed = degenerate + factor * (tf.cast(image, tf.float32) - degenerate)
    return tf.cast(tf.clip_by_value(mixed, 0.0, 255.0), tf.uint8)


def shear_x(image, slope) -> tf.Tensor:
    return transform(image, ((1.0, slope, 0.0), (0.0, 1.0, 0.0)))


def shear_y(image, slope) -> tf.Tensor:
    return transform(image, ((1.0, 0.0, 0.0), (slope, 1.0, 0.0)))


def translate_x(image, pixels) -> tf.Tensor:
    return translate(image, pixels, axis=1)


def translate_y(image, pixels) -> tf.Tensor:
    return translate(image, pixels, axis=0)


def translate(image, pixels, axis: int) -> tf.Tensor:
    """Shows what lies `pixels` further along the axis, rounded to whole pixels."""
    shape = tf.unstack(tf.shape(image))
    side = shape[axis]
    shift = tf.clip_by_value(tf.cast(tf.floor(pixels + 0.5), tf.int32), -side, side)
    before, after = tf.maximum(-shift, 0), tf.maximum(shift, 0)
    kept = slice(after, side - before)
    kept = image[:, kept] if axis else image[kept]
    borders = [fill([*shape[:axis], width, *shape[axis + 1 :]]) for width in (before, after)]
    return tf.concat([borders[0], kept, borders[1]], axis)


def fill(shape) -> tf.Tensor:
    return tf.fill(shape, tf.constant(FILL, tf.uint8))


def rotate(image, degrees) -> tf.Tensor:
    """Anticlockwise about the centre."""
    angle = degrees * (3.141592653589793 / 180.0)
    cos, sin = tf.cos(angle), tf.sin(angle)
    height, width = (tf.cast(side, tf.float32) for side in tf.unstack(tf.shape(image)[:2]))
    x, y = width / 2, height / 2
    rows = ((cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y))
    return transform(image, rows)


def transform(image, rows) -> tf.Tensor:
    """The pixel at (x, y) comes from rows @ (x, y, 1), both in pixels from the image's corner.

    Nearest neighbour, as Pillow's `Image.transform(..., AFFINE)`.
    """
    (a, b, c), (d, e, f) = rows
    # The operation counts from the first pixel's centre.
    c, f = c + (a + b - 1.0) / 2, f + (d + e - 1.0) / 2
    matrix = tf.stack([tf.cast(v, tf.float32) for v in (a, b, c, d, e, f, 0.0, 0.0)])
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=image[None],
        transforms=matrix[None],
        output_shape=tf.shape(image)[:2],
        interpolation="NEAREST",
        fill_mode="CONSTANT",
        fill_value=float(FILL),
    )[0]


def cutout(image, half: int, seed) -> tf.Tensor:
    """A square with sides of 2 x half pixels about a random pixel, cut off at the borders."""
    height, width = tf.unstack(tf.shape(image)[:2])
    place = tf.random.stateless_uniform((2,), seed)
    y = tf.cast(place[0] * tf.cast(height, tf.float32), tf.int32)
    x = tf.cast(place[1] * tf.cast(width, tf.float32), tf.int32)
    top, bottom = tf.maximum(y - half, 0), tf.minimum(y + half, height)
    left, right = tf.maximum(x - half, 0), tf.minimum(x + half, width)
    square = fill([bottom - top, right - left, tf.shape(image)[2]])
    rows = tf.concat([image[top:bottom, :left], square, image[top:bottom, right:]], axis=1)
    return tf.concat([image[:top], rows, image[bottom:]], axis=0)


def pixels(image, at_reference: float):
    """A length on an image of 224 pixels, scaled to this one's width."""
    return at_reference * tf.cast(tf.shape(image)[1], tf.float32) / REFERENCE_SIZE


def half_side(image, level: float):
    return tf.cast(pixels(image, level * CUTOUT), tf.int32)


def enhanced(level: float) -> float:
    """The factor of the four enhancements."""
    return 1.8 * level + 0.1


# Each takes (image, magnitude / 10, a random sign, a seed).
OPERATIONS = {
    "autocontrast": lambda image, level, sign, seed: autocontrast(image),
    "equalize": lambda image, level, sign, seed: equalize(image),
    "invert": lambda image, level, sign, seed: invert(image),
    "rotate": lambda image, level, sign, seed: rotate(image, 30.0 * level * sign),
    "posterize": lambda image, level, sign, seed: posterize(image, min(max(int(4 * level), 1), 8)),
    # The published recipes computed this in uint8: 256 was 0, and inverted the image.
    "solarize": lambda image, level, sign, seed: solarize(image, int(256 * level) % 256),
    "color": lambda image, level, sign, seed: color(image, enhanced(level)),
    "contrast": lambda image, level, sign, seed: contrast(image, enhanced(level)),
    "brightness": lambda image, level, sign, seed: brightness(image, enhanced(level)),
    "sharpness": lambda image, level, sign, seed: sharpness(image, enhanced(level)),
    "shear_x": lambda image, level, sign, seed: shear_x(image, 0.3 * level * sign),
    "shear_y": lambda image, level, sign, seed: shear_y(image, 0.3 * level * sign),
    "translate_x": lambda image, level, sign, seed: translate_x(
        image, pixels(image, TRANSLATE * level) * sign
    ),
    "translate_y": lambda image, level, sign, seed: translate_y(
        image, pixels(image, TRANSLATE * level) * sign
    ),
    "cutout": lambda image, level, sign, seed: cutout(image, half_side(image, level), seed),
    "solarize_add": lambda image, level, sign, seed: solarize_add(image, int(110 * level)),
}
