"""RandAugment's operations compared with Pillow's, and how they are drawn."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vit_jax.data.preprocess import randaugment


@pytest.fixture(scope="module")
def photo():
    """A photograph of 96 x 128 pixels."""
    from sklearn.datasets import load_sample_image

    return np.asarray(Image.fromarray(load_sample_image("china.jpg")).resize((128, 96)))


def with_pillow(function, image):
    """Returns the result of a function of Pillow images."""
    return np.asarray(function(Image.fromarray(image)))


def unusual_images(photo):
    """Returns images with few values or pixels, besides the photograph."""
    return [
        photo,
        np.full_like(photo, 77),
        np.where(photo > 90, 200, 10).astype(np.uint8),
        photo[:1, :7],
        np.clip(photo, 60, 61),
    ]


@pytest.mark.parametrize(
    ("ours", "pillow"),
    [
        (randaugment.autocontrast, ImageOps.autocontrast),
        (randaugment.equalize, ImageOps.equalize),
        (randaugment.invert, ImageOps.invert),
        *[
            (
                lambda x, b=bits: randaugment.posterize(x, b),
                lambda x, b=bits: ImageOps.posterize(x, b),
            )
            for bits in (1, 4, 8)
        ],
        *[
            (lambda x, t=t: randaugment.solarize(x, t), lambda x, t=t: ImageOps.solarize(x, t))
            for t in (0, 100, 256)
        ],
    ],
)
def test_color_operations_equal_pillows(photo, ours, pillow):
    for image in unusual_images(photo):
        np.testing.assert_array_equal(ours(tf.constant(image)), with_pillow(pillow, image))


@pytest.mark.parametrize("factor", [0.0, 0.1, 1.0, 1.9, 3.7])
@pytest.mark.parametrize(
    ("ours", "pillow"),
    [
        (randaugment.color, ImageEnhance.Color),
        (randaugment.contrast, ImageEnhance.Contrast),
        (randaugment.brightness, ImageEnhance.Brightness),
        (randaugment.sharpness, ImageEnhance.Sharpness),
    ],
)
def test_enhancements_match_pillows(photo, ours, pillow, factor):
    out = np.asarray(ours(tf.constant(photo), factor)).astype(int)
    expected = with_pillow(lambda image: pillow(image).enhance(factor), photo)
    difference = np.abs(out - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.02


@pytest.mark.parametrize(
    ("ours", "rows"),
    [
        (lambda x: randaugment.shear_x(x, 0.3), (1, 0.3, 0, 0, 1, 0)),
        (lambda x: randaugment.shear_y(x, -0.17), (1, 0, 0, -0.17, 1, 0)),
        (lambda x: randaugment.translate_x(x, 12.0), (1, 0, 12, 0, 1, 0)),
        (lambda x: randaugment.translate_y(x, -7.0), (1, 0, 0, 0, 1, -7)),
    ],
)
def test_shears_and_translations_match_pillows(photo, ours, rows):
    out = np.asarray(ours(tf.constant(photo)))
    expected = with_pillow(
        lambda image: image.transform(image.size, Image.AFFINE, rows, fillcolor=(128,) * 3), photo
    )
    assert (out != expected).any(-1).mean() < 0.005  # pixels on a boundary


@pytest.mark.parametrize("degrees", [30.0, -12.0])
def test_rotation_matches_pillows(photo, degrees):
    out = np.asarray(randaugment.rotate(tf.constant(photo), degrees))
    expected = with_pillow(lambda image: image.rotate(degrees, fillcolor=(128,) * 3), photo)
    assert (out != expected).any(-1).mean() < 0.01


def test_solarize_add(photo):
    expected = np.where(photo < 128, np.minimum(photo.astype(int) + 110, 255), photo)
    np.testing.assert_array_equal(randaugment.solarize_add(tf.constant(photo), 110), expected)


def test_cutout_is_a_gray_square():
    image = tf.zeros((64, 64, 3), tf.uint8)
    centers = []
    for seed in range(100):
        out = np.asarray(randaugment.cutout(image, 8, [0, seed]))
        rows, columns = (out[..., 0] == 128).any(1), (out[..., 0] == 128).any(0)
        np.testing.assert_array_equal(out[..., 0] == 128, rows[:, None] & columns)
        assert 8 <= rows.sum() <= 16
        centers.append((np.flatnonzero(rows).mean(), np.flatnonzero(columns).mean()))
    assert np.ptp(centers, axis=0).min() > 45


def augmented(image, count, layers, magnitude, kind="pillow", mean=(0.5,)):
    """Returns the results of RandAugment for the seeds 0 .. count - 1, each computed twice."""

    def augment(seed):
        seed = tf.stack([tf.constant(3, tf.int64), seed])
        return randaugment.randaugment(tf.constant(image), seed, layers, magnitude, kind, mean)

    results = tf.data.Dataset.range(count).map(augment)
    return [list(results.as_numpy_iterator()) for _ in range(2)]


@pytest.mark.slow
def test_operations_are_drawn_evenly_and_in_both_directions(photo):
    """With one layer, each result is that of one of the sixteen operations."""
    seen = dict.fromkeys(randaugment.OPERATIONS, 0)
    signs = set()
    expected = {
        (name, sign): np.asarray(op(tf.constant(photo), 0.9, sign, tf.constant([0, 0], tf.int64)))
        for name, op in randaugment.OPERATIONS.items()
        for sign in (-1.0, 1.0)
        if name != "cutout"
    }
    for out in augmented(photo, 400, 1, 9)[0]:
        matches = [key for key, image in expected.items() if np.array_equal(image, out)]
        if matches:
            seen[matches[0][0]] += 1
            signs.update(matches if len(matches) == 1 else ())
        else:
            seen["cutout"] += 1
    assert min(seen.values()) >= 10
    assert max(seen.values()) <= 45
    for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
        assert {(name, -1.0), (name, 1.0)} <= signs


@pytest.mark.parametrize(
    ("magnitude", "threshold", "bits"),
    [(0, 0, 1), (2, 51, 1), (9, 230, 3), (10, 0, 4), (15, 128, 6), (20, 0, 8)],
)
def test_solarize_and_posterize_at_published_magnitudes(photo, magnitude, threshold, bits):
    """The threshold wraps around at 256; at least one bit is kept."""
    image, ops = tf.constant(photo), randaugment.OPERATIONS
    out = ops["solarize"](image, magnitude / 10, 1.0, None)
    np.testing.assert_array_equal(out, np.where(photo < threshold, photo, 255 - photo))
    out = ops["posterize"](image, magnitude / 10, 1.0, None)
    np.testing.assert_array_equal(out, with_pillow(lambda i: ImageOps.posterize(i, bits), photo))


@pytest.mark.parametrize("kind", randaugment.KINDS)
@pytest.mark.parametrize(
    ("magnitude", "channels"), [(0, 1), pytest.param(20, 3, marks=pytest.mark.slow)]
)
def test_the_seed_decides_the_result(magnitude, channels, kind):
    """At any magnitude, number of channels and size."""
    image = np.random.default_rng(0).integers(0, 256, (16, 20, channels), np.uint8)
    first, second = augmented(image, 40, 2, magnitude, kind)
    np.testing.assert_array_equal(first, second)
    assert np.shape(first) == (40, 16, 20, channels)
    assert first[0].dtype == np.uint8
    assert len({out.tobytes() for out in first}) > (5 if kind == "timm" else 10)


def test_color_jitter(photo):
    image = tf.constant(photo)
    out = [randaugment.color_jitter(image, [0, seed], (0.4, 0.0, 0.0)) for seed in range(50)]
    factors = [np.mean(o) / photo.mean() for o in out]
    assert 0.58 < min(factors) < 0.75
    assert 1.15 < max(factors) < 1.42  # the brightest pixels are cut off
    np.testing.assert_array_equal(randaugment.color_jitter(image, [0, 0], (0.0, 0.0, 0.0)), photo)


def test_published_contrast_depends_on_the_image_size(photo):
    """As TensorFlow's AutoAugment computes it: the histogram's mean, not the gray values'."""
    gray = tf.image.rgb_to_grayscale(photo)
    histogram = tf.histogram_fixed_width(tf.cast(gray, tf.int32), [0, 255], nbins=256)
    mean = float(tf.reduce_sum(tf.cast(histogram, tf.float32)) / 256.0)
    assert mean == 96 * 128 / 256
    for level in (0.2, 1.5):
        factor = 1.8 * level + 0.1
        expected = np.clip(mean + np.float32(factor) * (photo.astype(np.float32) - mean), 0, 255)
        contrast = randaugment.KINDS["tensorflow"]((0.5,))["contrast"]
        np.testing.assert_allclose(
            contrast(tf.constant(photo), level, 1.0, None), expected.astype(np.uint8), atol=1
        )
    large = tf.zeros((300, 300, 3), tf.uint8)
    assert int(tf.reduce_max(randaugment.contrast_by_size(large, 0.0))) == 255


MEAN = (0.485, 0.456, 0.406)
FILL = (124, 116, 104)


def as_timm(name, image, level, sign):
    """Returns what timm's rand-m9-mstd0.5-inc1 does at magnitude 10 * level, by Pillow."""
    strength = level * sign
    width, height = image.size
    matrices = {
        "shear_x": (1, 0.3 * strength, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * strength, 1, 0),
        "translate_x": (1, 0, 0.45 * strength * width, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, 0.45 * strength * height),
    }
    enhancers = ("color", "contrast", "brightness", "sharpness")
    if name in matrices:
        options = dict(resample=Image.BICUBIC, fillcolor=FILL)
        return image.transform(image.size, Image.AFFINE, matrices[name], **options)
    if name == "rotate":
        return image.rotate(30 * strength, resample=Image.BICUBIC, fillcolor=FILL)
    if name in enhancers:
        enhancer = getattr(ImageEnhance, name.capitalize())
        return enhancer(image).enhance(max(1 + 0.9 * strength, 0.1))
    if name == "posterize":  # newer versions of Pillow refuse to keep no bit
        bits = 4 - int(4 * level)
        return ImageOps.posterize(image, bits) if bits else image.point(lambda value: 0)
    if name == "solarize":
        return ImageOps.solarize(image, 256 - int(256 * level))
    if name == "solarize_add":
        addition = int(110 * level)
        return image.point([min(i + addition, 255) if i < 128 else i for i in range(256)] * 3)
    return getattr(ImageOps, name)(image)


@pytest.mark.parametrize("name", randaugment.timm_operations(MEAN))
def test_timms_operations_match_pillows(name, photo):
    operation = randaugment.timm_operations(MEAN)[name]
    for level in (0.0, 0.86, 1.0):
        for sign in (-1.0, 1.0):
            level_and_sign = tf.constant(level), tf.constant(sign)
            out = np.asarray(operation(tf.constant(photo), *level_and_sign, None)).astype(int)
            expected = np.asarray(as_timm(name, Image.fromarray(photo), level, sign))
            off = np.abs(out - expected).max(-1)
            assert (off > 0).mean() < 0.1  # by rounding, or of pixels on a boundary
            assert (off > 1).mean() < 0.005


@pytest.mark.slow
def test_timms_operations_are_applied_half_of_the_time_at_varying_magnitudes(photo):
    """A single layer; only solarize_add adds a constant to the darkest pixels."""
    unchanged, additions = 0, []
    dark = np.where(photo < 16, 16, np.minimum(photo, 127)).astype(np.uint8)
    for out in augmented(dark, 600, 1, 9, "timm", MEAN)[0]:
        unchanged += np.array_equal(out, dark)
        difference = out.astype(int) - dark
        if 0 < difference.min() == difference.max():
            additions.append(difference.max())
    assert 240 < unchanged < 400  # and by contrast or color near a factor of 1
    assert len(set(additions)) > 3
    assert all(int(11 * 7) <= addition <= 110 for addition in additions)  # N(9, 0.5), up to 10


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_gaussian_blur_is_close_to_pillows(photo, sigma):
    """Pillow approximates the Gaussian by box filters."""
    out = np.asarray(randaugment.gaussian_blur(tf.constant(photo), sigma)).astype(int)
    expected = with_pillow(lambda image: image.filter(ImageFilter.GaussianBlur(sigma)), photo)
    assert np.abs(out - expected).mean() < 0.8
    assert (np.abs(out - photo).mean() > 2) == (sigma > 0.5)


def test_three_augment_draws_its_three_evenly(photo):
    results = tf.data.Dataset.range(300).map(
        lambda seed: randaugment.three_augment(tf.constant(photo), tf.stack([seed, seed]))
    )
    gray = np.asarray(Image.fromarray(photo).convert("L"))[..., None].repeat(3, -1)
    solarized = np.where(photo < 128, photo, 255 - photo)
    counts, sharpest = [0, 0, 0], []
    for out in results.as_numpy_iterator():
        is_gray, is_solarized = np.array_equal(out, gray), np.array_equal(out, solarized)
        counts[0 if is_gray else 1 if is_solarized else 2] += 1
        if not is_gray and not is_solarized:
            sharpest.append(np.abs(out.astype(int) - photo).mean())
    assert min(counts) > 70
    assert min(sharpest) < 1
    assert max(sharpest) > 6
