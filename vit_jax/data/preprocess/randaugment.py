"""RandAugment (arXiv:1909.13719), 3-Augment (arXiv:2204.07118) and color jitter, in TensorFlow.

All operations are stateless. Images are uint8 (H, W, C). Operations that Pillow has give Pillow's
results, except for `gaussian_blur`, which Pillow approximates. RandAugment is one of three kinds,
`config.augment.randaugment_kind`:

* "pillow": the operations and magnitudes that the ViT recipes were published with (`randaug(n, m)`
  of big_vision, from TensorFlow's AutoAugment): strengths grow linearly with the magnitude, and 10
  is the unit. Two things differ from that code: contrast blends with the image's mean gray, as in
  Pillow, and lengths in pixels scale with the image.
* "tensorflow": the same, except that contrast is what that code has: see `contrast_by_size`.
* "timm": as DeiT used it (`rand-m9-mstd0.5-inc1` of timm): each operation is applied with
  probability 0.5, at a magnitude that varies; strengths grow with the magnitude for all operations;
  geometry interpolates bicubically, and fills with the mean of the dataset.

To add an operation, write the function and give it a row in OPERATIONS or in `timm_operations`;
every row is drawn equally often.
"""

from __future__ import annotations

from collections.abc import Callable

from vit_jax.data import tf

FILL = 128  # the value of pixels that geometry and cutout leave empty; "timm" fills with the mean
BLUR_RADIUS = 6  # pixels: three standard deviations at most
TIMM_PROB, TIMM_STD = 0.5, 0.5  # of applying an operation; of the magnitude

# Lengths in pixels at magnitude 10, for images that are 224 pixels wide.
TRANSLATE, CUTOUT, REFERENCE_WIDTH = 100.0, 40.0, 224.0


def randaugment(
    image, seed, layers: int, magnitude: float, kind: str = "pillow", mean=(0.5,)
) -> tf.Tensor:
    """Applies `layers` operations in a row, each drawn at random.

    Args:
        image: uint8 (H, W, C).
        seed: int64 (2,), the source of all randomness.
        layers: the number of operations.
        magnitude: their strength; 10 is the unit.
        kind: one of KINDS.
        mean: `config.augment.mean`; used by the kind "timm".
    """
    operations = KINDS[kind](mean)
    for layer in range(layers):
        layer_seed = tf.random.fold_in(seed, layer)
        if kind == "timm":
            image = apply_as_timm(operations, image, layer_seed, magnitude)
        else:
            image = apply_one(operations, image, layer_seed, magnitude / 10.0)
    return image


def apply_one(operations: dict, image, seed, level) -> tf.Tensor:
    """Applies one of the operations, drawn at random.

    Args:
        operations: name -> function of (image, level, sign, seed), such as OPERATIONS.
        image: uint8 (H, W, C).
        seed: int64 (2,).
        level: magnitude / 10.
    """
    choice_seed, sign_seed, operation_seed = tf.unstack(tf.random.split(seed, 3))
    choice = tf.random.stateless_uniform((), choice_seed, 0, len(operations), tf.int32)
    sign = tf.where(tf.random.stateless_uniform((), sign_seed) < 0.5, -1.0, 1.0)
    branches = [
        lambda op=op: tf.ensure_shape(op(image, level, sign, operation_seed), image.shape)
        for op in operations.values()
    ]
    return tf.ensure_shape(tf.switch_case(choice, branches), image.shape)


def apply_as_timm(operations: dict, image, seed, magnitude: float) -> tf.Tensor:
    """Applies one operation half of the time, at a magnitude from N(magnitude, 0.5)."""
    apply_seed, level_seed, operation_seed = tf.unstack(tf.random.split(seed, 3))
    level = magnitude + TIMM_STD * tf.random.stateless_normal((), level_seed)
    level = tf.clip_by_value(level, 0.0, 10.0) / 10.0
    return tf.cond(
        tf.random.stateless_uniform((), apply_seed) < TIMM_PROB,
        lambda: apply_one(operations, image, operation_seed, level),
        lambda: image,
    )


def three_augment(image, seed) -> tf.Tensor:
    """Applies grayscale, solarize or a Gaussian blur, equally likely (arXiv:2204.07118, 3.2).

    The blur's standard deviation is from 0.1 to 2 pixels.

    Args:
        image: uint8 (H, W, C).
        seed: int64 (2,), the source of all randomness.
    """
    choice_seed, blur_seed = tf.unstack(tf.random.split(seed, 2))
    sigma = tf.random.stateless_uniform((), blur_seed, 0.1, 2.0)
    branches = [
        lambda: tf.cast(grayscale(image), tf.uint8),
        lambda: solarize(image, 128),
        lambda: gaussian_blur(image, sigma),
    ]
    choice = tf.random.stateless_uniform((), choice_seed, 0, len(branches), tf.int32)
    return tf.ensure_shape(tf.switch_case(choice, branches), image.shape)


def color_jitter(image, seed, strengths: tuple[float, float, float]) -> tf.Tensor:
    """Scales brightness, contrast and color, each by a random factor.

    Args:
        image: uint8 (H, W, C).
        seed: int64 (2,), the source of all randomness.
        strengths: of brightness, contrast and color; factors are in [1 - strength, 1 + strength].
    """
    for i, (enhance, strength) in enumerate(
        zip((brightness, contrast, color), strengths, strict=True)
    ):
        if strength:
            low, high = max(0.0, 1.0 - strength), 1.0 + strength
            factor = tf.random.stateless_uniform((), tf.random.fold_in(seed, i), low, high)
            image = enhance(image, factor)
    return image


def autocontrast(image) -> tf.Tensor:
    """Stretches the values of each channel to 0 .. 255."""
    channels = to_planes(image)
    low, high = (tf.cast(f(channels, 1, True), tf.float64) for f in (tf.reduce_min, tf.reduce_max))
    scale = tf.where(high > low, 255.0 / (high - low), 1.0)
    offset = tf.where(high > low, low * scale, 0.0)
    stretched = tf.clip_by_value(tf.cast(channels, tf.float64) * scale - offset, 0.0, 255.0)
    return from_planes(tf.cast(stretched, tf.uint8), image)


def equalize(image) -> tf.Tensor:
    """Equalizes the histogram of each channel."""
    channels = tf.cast(to_planes(image), tf.int32)
    counts = tf.math.bincount(channels, minlength=256, maxlength=256, axis=-1)  # (C, 256)
    brightest = tf.gather(counts, tf.reduce_max(channels, 1, True), batch_dims=1)
    step = (tf.reduce_sum(counts, 1, True) - brightest) // 255
    spread = (tf.cumsum(counts, axis=1, exclusive=True) + step // 2) // tf.maximum(step, 1)
    tables = tf.cast(tf.where(step > 0, tf.clip_by_value(spread, 0, 255), tf.range(256)), tf.uint8)
    indices = channels + 256 * tf.range(image.shape[-1])[:, None]
    return from_planes(tf.gather(tf.reshape(tables, [-1]), indices), image)


def to_planes(image) -> tf.Tensor:
    """Returns (C, H x W), since TensorFlow is slow along a last axis of size 3."""
    return tf.transpose(tf.reshape(image, (-1, image.shape[-1])))


def from_planes(channels, image) -> tf.Tensor:
    """Returns planes (C, H x W) in the shape of `image`."""
    return tf.reshape(tf.transpose(channels), tf.shape(image))


def invert(image) -> tf.Tensor:
    return 255 - image


def posterize(image, bits) -> tf.Tensor:
    """Keeps the highest `bits` bits of each value, 0 to 8."""
    mask = 256 - tf.bitwise.left_shift(1, 8 - bits)
    return tf.bitwise.bitwise_and(image, tf.cast(mask, tf.uint8))


def solarize(image, threshold) -> tf.Tensor:
    """Inverts values from the threshold up, 0 to 256."""
    inverted = 255 * tf.cast(tf.cast(image, tf.int32) >= threshold, tf.uint8)
    return tf.bitwise.bitwise_xor(image, inverted)


def solarize_add(image, addition) -> tf.Tensor:
    """Adds to values below 128."""
    added = tf.minimum(255 - image, tf.cast(tf.minimum(addition, 255), tf.uint8))
    return image + added * tf.cast(image < 128, tf.uint8)


def color(image, factor) -> tf.Tensor:
    """Scales the saturation; factor 0 is gray, 1 the image."""
    return blend(grayscale(image), image, factor)


def contrast(image, factor) -> tf.Tensor:
    """Scales the contrast; factor 0 is the mean gray, 1 the image."""
    return blend(tf.floor(tf.reduce_mean(grayscale(image)) + 0.5), image, factor)


def contrast_by_size(image, factor) -> tf.Tensor:
    """Scales the contrast as TensorFlow's AutoAugment and big_vision do.

    Factor 0 is a gray that depends on the image's size alone: what should be the mean of a
    histogram is the mean number of pixels in its 256 bins, up to 255, such as 196 for 224 x 224
    pixels.
    """
    height, width = tf.unstack(tf.shape(image)[:2])
    return blend(tf.cast(tf.minimum(height * width // 256, 255), tf.float32), image, factor)


def brightness(image, factor) -> tf.Tensor:
    """Scales the brightness; factor 0 is black, 1 the image."""
    return blend(0.0, image, factor)


def sharpness(image, factor) -> tf.Tensor:
    """Scales the sharpness; factor 0 is smoothed, 1 the image. Border pixels don't change."""
    pixels = tf.cast(image, tf.float32)
    sums = pixels[:-2] + pixels[1:-1] + pixels[2:]
    sums = sums[:, :-2] + sums[:, 1:-1] + sums[:, 2:]  # over 3x3 pixels
    smooth = tf.floor((sums + 4.0 * pixels[1:-1, 1:-1]) / 13.0 + 0.5)
    inner = blend(smooth, image[1:-1, 1:-1], factor)
    rows = tf.concat([image[1:-1, :1], inner, image[1:-1, -1:]], axis=1)
    return tf.concat([image[:1], rows, image[-1:]], axis=0)


def grayscale(image) -> tf.Tensor:
    """Returns the luma (ITU-R 601) in every channel, float32 (H, W, C)."""
    pixels = tf.cast(image, tf.float32)
    if image.shape[-1] != 3:
        return pixels
    # In units of 1/65536: whole numbers below 2**24, which float32 represents exactly.
    weights = tf.constant([[19595.0], [38470.0], [7471.0]]) * tf.ones((1, 3))
    luma = tf.reshape(pixels, (-1, 3)) @ weights
    return tf.reshape(tf.floor((luma + 32768.0) / 65536.0), tf.shape(image))


def blend(degenerate, image, factor) -> tf.Tensor:
    """Returns degenerate + factor x (image - degenerate), clipped to 0 .. 255."""
    mixed = degenerate + factor * (tf.cast(image, tf.float32) - degenerate)
    return tf.cast(tf.clip_by_value(mixed, 0.0, 255.0), tf.uint8)


def gaussian_blur(image, sigma) -> tf.Tensor:
    """Blurs with a Gaussian of up to 2 pixels; the border's pixels are repeated beyond it."""
    offsets = tf.range(-BLUR_RADIUS, BLUR_RADIUS + 1)
    weights = tf.exp(-0.5 * tf.square(tf.cast(offsets, tf.float32) / sigma))
    weights /= tf.reduce_sum(weights)
    channels = image.shape[-1]
    pixels = tf.cast(image, tf.float32)
    for axis in (0, 1):
        side = tf.shape(image)[axis]
        padded = tf.clip_by_value(tf.range(-BLUR_RADIUS, side + BLUR_RADIUS), 0, side - 1)
        shape = (-1, 1, 1, 1) if axis == 0 else (1, -1, 1, 1)
        kernel = tf.reshape(weights, shape) * tf.ones((1, 1, channels, 1))
        pixels = tf.gather(pixels, padded, axis=axis)[None]
        pixels = tf.nn.depthwise_conv2d(pixels, kernel, (1, 1, 1, 1), "VALID")[0]
    return tf.cast(pixels + 0.5, tf.uint8)


def shear_x(image, slope) -> tf.Tensor:
    """Shears along the rows, by `slope` pixels per row."""
    return transform(image, ((1.0, slope, 0.0), (0.0, 1.0, 0.0)))


def shear_y(image, slope) -> tf.Tensor:
    """Shears along the columns, by `slope` pixels per column."""
    return transform(image, ((1.0, 0.0, 0.0), (slope, 1.0, 0.0)))


def translate_x(image, pixels) -> tf.Tensor:
    """Shifts the content to the left."""
    return translate(image, pixels, axis=1)


def translate_y(image, pixels) -> tf.Tensor:
    """Shifts the content up."""
    return translate(image, pixels, axis=0)


def translate(image, pixels, axis: int) -> tf.Tensor:
    """Shifts the content towards the start of an axis, by a rounded number of pixels."""
    shape = tf.unstack(tf.shape(image))
    side = shape[axis]
    shift = tf.clip_by_value(tf.cast(tf.floor(pixels + 0.5), tf.int32), -side, side)
    before, after = tf.maximum(-shift, 0), tf.maximum(shift, 0)
    remaining = slice(after, side - before)
    content = image[:, remaining] if axis else image[remaining]
    borders = [filled([*shape[:axis], width, *shape[axis + 1 :]]) for width in (before, after)]
    return tf.concat([borders[0], content, borders[1]], axis)


def filled(shape) -> tf.Tensor:
    return tf.fill(shape, tf.constant(FILL, tf.uint8))


def rotate(image, degrees) -> tf.Tensor:
    """Rotates counterclockwise about the center."""
    return transform(image, rotation(image, degrees))


def rotation(image, degrees) -> tuple:
    """Returns the rows of a rotation about the center of an image, for `transform`."""
    angle = degrees * (3.141592653589793 / 180.0)
    cos, sin = tf.cos(angle), tf.sin(angle)
    height, width = (tf.cast(side, tf.float32) for side in tf.unstack(tf.shape(image)[:2]))
    x, y = width / 2, height / 2
    return (cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y)


def transform(image, rows) -> tf.Tensor:
    """Applies an affine transform with nearest-neighbor sampling.

    As Pillow's `Image.transform(..., AFFINE)`: the output pixel at (x, y) is the input's at
    rows @ (x, y, 1), both in pixels from the top left corner of the image.
    """
    (a, b, c), (d, e, f) = rows
    # TensorFlow's operation counts from the center of the first pixel.
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


def transform_bicubic(image, rows, fill, axes=(0, 1)) -> tf.Tensor:
    """Applies an affine transform with bicubic sampling, as Pillow's `Image.transform` does.

    Args:
        image: uint8 (H, W, C).
        rows: as in `transform`.
        fill: the value of pixels from outside the image: one number, or one per channel.
        axes: the axes, 0 or 1, along which the transform moves pixels.
    """
    (a, b, c), (d, e, f) = rows
    height, width = tf.unstack(tf.shape(image)[:2])
    x = tf.range(width, dtype=tf.float32)[None] + 0.5
    y = tf.range(height, dtype=tf.float32)[:, None] + 0.5
    x, y = a * x + b * y + c, d * x + e * y + f  # (H, W): where each pixel is from
    inside = (
        (x >= 0) & (x < tf.cast(width, tf.float32)) & (y >= 0) & (y < tf.cast(height, tf.float32))
    )
    row_taps = cubic_taps(y, height)[slice(None) if 0 in axes else slice(1, 2)]
    column_taps = cubic_taps(x, width)[slice(None) if 1 in axes else slice(1, 2)]
    pixels = tf.cast(tf.reshape(image, (-1, image.shape[-1])), tf.float32)
    total = 0.0
    for row, row_weight in row_taps:
        for column, column_weight in column_taps:
            found = tf.gather(pixels, row * width + column)  # (H, W, C)
            total += (row_weight * column_weight)[..., None] * found
    sampled = tf.where(inside[..., None], tf.clip_by_value(total, 0.0, 255.0), fill)
    return tf.cast(sampled, tf.uint8)


def cubic_taps(position, side) -> list[tuple]:
    """Returns the indices and weights of four pixels around each position along an axis.

    The weights are Pillow's for transforms, Keys's with a = -1 (for resizing, a = -1/2).
    """
    first = tf.floor(position - 0.5)
    t = position - 0.5 - first
    weights = (
        t * (-1.0 + t * (2.0 - t)),
        1.0 + t * t * (t - 2.0),
        t * (1.0 + t * (1.0 - t)),
        t * t * (t - 1.0),
    )
    first = tf.cast(first, tf.int32)
    return [
        (tf.clip_by_value(first + offset, 0, side - 1), weight)
        for offset, weight in zip((-1, 0, 1, 2), weights, strict=True)
    ]


def cutout(image, half_side: int, seed) -> tf.Tensor:
    """Fills a square of 2 x `half_side` pixels around a random pixel (arXiv:1708.04552)."""
    height, width = tf.unstack(tf.shape(image)[:2])
    center = tf.random.stateless_uniform((2,), seed)
    y = tf.cast(center[0] * tf.cast(height, tf.float32), tf.int32)
    x = tf.cast(center[1] * tf.cast(width, tf.float32), tf.int32)
    top, bottom = tf.maximum(y - half_side, 0), tf.minimum(y + half_side, height)
    left, right = tf.maximum(x - half_side, 0), tf.minimum(x + half_side, width)
    square = filled([bottom - top, right - left, tf.shape(image)[2]])
    rows = tf.concat([image[top:bottom, :left], square, image[top:bottom, right:]], axis=1)
    return tf.concat([image[:top], rows, image[bottom:]], axis=0)


def scaled(length: float, image):
    """Returns a length, given for an image of REFERENCE_WIDTH, in pixels of this image."""
    return length * tf.cast(tf.shape(image)[1], tf.float32) / REFERENCE_WIDTH


def cutout_half_side(image, level: float):
    return tf.cast(scaled(level * CUTOUT, image), tf.int32)


def enhancement_factor(level: float) -> float:
    """Returns the factor of color, contrast, brightness and sharpness."""
    return 1.8 * level + 0.1


def published_contrast(image, level: float, sign, seed) -> tf.Tensor:
    return contrast_by_size(image, enhancement_factor(level))


# Name -> function of (image, level, sign, seed): level is magnitude / 10, and sign, -1 or 1, is
# drawn at random.
OPERATIONS = {
    "autocontrast": lambda image, level, sign, seed: autocontrast(image),
    "equalize": lambda image, level, sign, seed: equalize(image),
    "invert": lambda image, level, sign, seed: invert(image),
    "rotate": lambda image, level, sign, seed: rotate(image, 30.0 * level * sign),
    "posterize": lambda image, level, sign, seed: posterize(image, min(max(int(4 * level), 1), 8)),
    # The published recipes computed the threshold in uint8, where 256 is 0: all is inverted.
    "solarize": lambda image, level, sign, seed: solarize(image, int(256 * level) % 256),
    "color": lambda image, level, sign, seed: color(image, enhancement_factor(level)),
    "contrast": lambda image, level, sign, seed: contrast(image, enhancement_factor(level)),
    "brightness": lambda image, level, sign, seed: brightness(image, enhancement_factor(level)),
    "sharpness": lambda image, level, sign, seed: sharpness(image, enhancement_factor(level)),
    "shear_x": lambda image, level, sign, seed: shear_x(image, 0.3 * level * sign),
    "shear_y": lambda image, level, sign, seed: shear_y(image, 0.3 * level * sign),
    "translate_x": lambda image, level, sign, seed: translate_x(
        image, scaled(TRANSLATE * level, image) * sign
    ),
    "translate_y": lambda image, level, sign, seed: translate_y(
        image, scaled(TRANSLATE * level, image) * sign
    ),
    "cutout": lambda image, level, sign, seed: cutout(image, cutout_half_side(image, level), seed),
    "solarize_add": lambda image, level, sign, seed: solarize_add(image, int(110 * level)),
}


def timm_operations(mean) -> dict[str, Callable]:
    """Returns the operations of the kind "timm", as functions like those of OPERATIONS.

    Args:
        mean: `config.augment.mean`, which geometry fills with.
    """
    fill = tf.constant([round(255 * value) for value in mean], tf.float32)

    def shear(axis):
        def operation(image, level, sign, seed):
            slope = 0.3 * level * sign
            rows = (
                ((1.0, slope, 0.0), (0.0, 1.0, 0.0))
                if axis
                else ((1.0, 0.0, 0.0), (slope, 1.0, 0.0))
            )
            return transform_bicubic(image, rows, fill, (axis,))

        return operation

    def translate(axis):
        def operation(image, level, sign, seed):
            pixels = 0.45 * level * sign * tf.cast(tf.shape(image)[axis], tf.float32)
            x, y = (pixels, 0.0) if axis else (0.0, pixels)
            return transform_bicubic(image, ((1.0, 0.0, x), (0.0, 1.0, y)), fill, (axis,))

        return operation

    def rotate(image, level, sign, seed):
        return transform_bicubic(image, rotation(image, 30.0 * level * sign), fill)

    def enhance(function):
        # 1 changes nothing; with the magnitude, the factor moves away from it in both directions.
        return lambda image, level, sign, seed: function(
            image, tf.maximum(1.0 + 0.9 * level * sign, 0.1)
        )

    def whole(strength):
        return tf.cast(strength, tf.int32)  # rounded down

    return {
        "autocontrast": OPERATIONS["autocontrast"],
        "equalize": OPERATIONS["equalize"],
        "invert": OPERATIONS["invert"],
        "rotate": rotate,
        "posterize": lambda image, level, sign, seed: posterize(image, 4 - whole(4 * level)),
        "solarize": lambda image, level, sign, seed: solarize(image, 256 - whole(256 * level)),
        "solarize_add": lambda image, level, sign, seed: solarize_add(image, whole(110 * level)),
        "color": enhance(color),
        "contrast": enhance(contrast),
        "brightness": enhance(brightness),
        "sharpness": enhance(sharpness),
        "shear_x": shear(axis=1),
        "shear_y": shear(axis=0),
        "translate_x": translate(axis=1),
        "translate_y": translate(axis=0),
    }


# Name -> function from `config.augment.mean` to its operations.
KINDS = {
    "pillow": lambda mean: OPERATIONS,
    "tensorflow": lambda mean: OPERATIONS | {"contrast": published_contrast},
    "timm": timm_operations,
}
