"""The operations against Pillow's, and what RandAugment draws."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from vit_jax.data import randaugment


@pytest.fixture(scope="module")
def photo():
    """A real photograph, 96 x 128."""
    from sklearn.datasets import load_sample_image

    return np.asarray(Image.fromarray(load_sample_image("china.jpg")).resize((128, 96)))


def on_pillow(function, image):
    return np.asarray(function(Image.fromarray(image)))


def degenerates(photo):
    """Images with few values: where tables of values go wrong."""
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
def test_exactly_as_pillow(photo, ours, pillow):
    for image in degenerates(photo):
        np.testing.assert_array_equal(ours(tf.constant(image)), on_pillow(pillow, image))


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
def test_enhancements_as_pillow(photo, ours, pillow, factor):
    out = np.asarray(ours(tf.constant(photo), factor)).astype(int)
    expected = on_pillow(lambda image: pillow(image).enhance(factor), photo)
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
def test_geometry_as_pillow(photo, ours, rows):
    out = np.asarray(ours(tf.constant(photo)))
    expected = on_pillow(
        lambda image: image.transform(image.size, Image.AFFINE, rows, fillcolor=(128,) * 3), photo
    )
    assert (out != expected).any(-1).mean() < 0.005  # ties


@pytest.mark.parametrize("degrees", [30.0, -12.0])
def test_rotation_as_pillow(photo, degrees):
    out = np.asarray(randaugment.rotate(tf.constant(photo), degrees))
    expected = on_pillow(lambda image: image.rotate(degrees, fillcolor=(128,) * 3), photo)
    assert (out != expected).any(-1).mean() < 0.01


def test_solarize_add(photo):
    expected = np.where(photo < 128, np.minimum(photo.astype(int) + 110, 255), photo)
    np.testing.assert_array_equal(randaugment.solarize_add(tf.constant(photo), 110), expected)


def test_cutout_is_a_square_of_grey():
    image = tf.zeros((64, 64, 3), tf.uint8)
    centres = []
    for seed in range(100):
        out = np.asarray(randaugment.cutout(image, 8, [0, seed]))
        rows, columns = (out[..., 0] == 128).any(1), (out[..., 0] == 128).any(0)
        np.testing.assert_array_equal(out[..., 0] == 128, rows[:, None] & columns)
        assert 8 <= rows.sum() <= 16
        centres.append((np.flatnonzero(rows).mean(), np.flatnonzero(columns).mean()))
    assert np.ptp(centres, axis=0).min() > 45


def augmented(image, count, layers, magnitude):
    def one(seed):
        seed = tf.stack([tf.constant(3, tf.int64), seed])
        return randaugment.randaugment(tf.constant(image), seed, layers, magnitude)

    return list(tf.data.Dataset.range(count).map(one).as_numpy_iterator())


def test_every_operation_is_drawn_in_both_directions(photo):
    """One layer at a time, each result is an operation's; all sixteen come, evenly."""
    seen = dict.fromkeys(randaugment.OPERATIONS, 0)
    signs = set()
    plain = {
        (name, sign): np.asarray(op(tf.constant(photo), 0.9, sign, tf.constant([0, 0], tf.int64)))
        for name, op in randaugment.OPERATIONS.items()
        for sign in (-1.0, 1.0)
        if name != "cutout"
    }
    for out in augmented(photo, 400, 1, 9):
        matches = [key for key, image in plain.items() if np.array_equal(image, out)]
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
    """The published code's threshold is a uint8; at magnitude 0 a bit is left."""
    image, ops = tf.constant(photo), randaugment.OPERATIONS
    out = ops["solarize"](image, magnitude / 10, 1.0, None)
    np.testing.assert_array_equal(out, np.where(photo < threshold, photo, 255 - photo))
    out = ops["posterize"](image, magnitude / 10, 1.0, None)
    np.testing.assert_array_equal(out, on_pillow(lambda i: ImageOps.posterize(i, bits), photo))


def test_views_depend_on_the_seed_alone(photo):
    one, two = (augmented(photo, 8, 2, 15) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert len({image.tobytes() for image in one}) > 4


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [0, 10, 20])
def test_any_size_and_channels(channels, magnitude):
    image = np.random.default_rng(0).integers(0, 256, (16, 20, channels), np.uint8)
    for out in augmented(image, 40, 2, magnitude):
        assert out.shape == image.shape
        assert out.dtype == np.uint8


def test_color_jitter(photo):
    image = tf.constant(photo)
    out = [randaugment.color_jitter(image, [0, seed], (0.4, 0.0, 0.0)) for seed in range(50)]
    factors = [np.mean(o) / photo.mean() for o in out]
    assert 0.58 < min(factors) < 0.75
    assert 1.15 < max(factors) < 1.42  # the brightest pixels are cut off
    np.testing.assert_array_equal(randaugment.color_jitter(image, [0, 0], (0.0, 0.0, 0.0)), photo)
