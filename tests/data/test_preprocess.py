"""Crops, resizing and decoding of images on the host."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from vit_jax.data import preprocess


def encoded(pixels, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return tf.constant(buffer.getvalue())


@pytest.fixture(scope="module")
def ramp():
    """An image of 60 x 100 pixels; red gives a pixel's row, green its column."""
    y, x = np.mgrid[:60, :100]
    return np.stack([4 * y, 2 * x, np.full_like(x, 90)], axis=-1).astype(np.uint8)


def train_views(image, count, config, size=(32, 32), channels=3):
    """Returns the views of an image for the seeds 0 .. count - 1."""

    def view(seed):
        seed = tf.stack([tf.constant(0, tf.int64), seed])
        kwargs = dict(size=size, channels=channels, augment=config.augment)
        return preprocess.train_image(image, seed, **kwargs)

    return list(tf.data.Dataset.range(count).map(view).as_numpy_iterator())


def test_inception_crops_have_the_published_areas_and_ratios(ramp, tiny_config):
    """Areas of 5 to 100 %, aspect ratios from 3/4 to 4/3, anywhere in the image."""
    tiny_config.augment.flip = False
    image = encoded(ramp)
    areas, ratios, centers = [], [], []
    for view in train_views(image, 300, tiny_config):
        view = view.astype(float)
        # Bilinear resizing puts pixel centers half a step inside the window's borders.
        height = (view[-1, 0, 0] - view[0, 0, 0]) / 4 * 32 / 31
        width = (view[0, -1, 1] - view[0, 0, 1]) / 2 * 32 / 31
        areas.append(height * width / 6000)
        ratios.append(width / height)
        centers.append(view[16, 16, 1] / 200)
    assert 0.02 < min(areas) < 0.12
    assert 0.55 < max(areas) <= 1.1  # no window at these ratios covers a 60x100 image
    assert 0.6 < min(ratios) < 0.85
    assert 1.2 < max(ratios) < 1.6
    assert min(centers) < 0.2
    assert max(centers) > 0.8


def test_crops_of_jpegs_are_those_of_decoded_images(ramp, tiny_config):
    jpeg = encoded(ramp, "JPEG", quality=100, subsampling=0)
    whole = encoded(np.asarray(Image.open(io.BytesIO(jpeg.numpy()))))
    a, b = (np.stack(train_views(image, 10, tiny_config)).astype(int) for image in (jpeg, whole))
    assert np.abs(a - b).mean() < 1.5


def test_half_of_the_images_are_flipped(ramp, tiny_config):
    tiny_config.augment.crop = "none"
    unflipped = preprocess.resize(ramp, (32, 32)).numpy()
    flipped = 0
    for view in train_views(encoded(ramp), 200, tiny_config):
        if np.array_equal(view, unflipped[:, ::-1]):
            flipped += 1
        else:
            np.testing.assert_array_equal(view, unflipped)
    assert 70 < flipped < 130


def test_pad_and_crop_shifts_the_image(tiny_config):
    pixels = np.arange(1, 65, dtype=np.uint8).reshape(8, 8)
    tiny_config.augment.update(crop="pad", pad=2, flip=False)
    padded = np.pad(pixels, 2)
    seen = set()
    for view in train_views(encoded(pixels), 300, tiny_config, (8, 8), channels=1):
        windows = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if np.array_equal(view[..., 0], padded[y : y + 8, x : x + 8])
        ]
        seen.update(windows)
        assert windows
    assert len(seen) == 25


def test_random_crops_keep_proportions(ramp, tiny_config):
    """A window of 7/8 of the shorter side, anywhere in the image."""
    tiny_config.augment.update(crop="resize", crop_keep=0.875, flip=False)
    tops, lefts = [], []
    for view in train_views(encoded(ramp), 200, tiny_config):
        view = view.astype(float)
        # 52.5 of the 60 rows, 4 levels of red apart; 52.5 columns, 2 levels of green apart.
        np.testing.assert_allclose(view[-1, 0, 0] - view[0, 0, 0], 4 * 52.5 * 31 / 32, atol=8)
        np.testing.assert_allclose(view[0, -1, 1] - view[0, 0, 1], 2 * 52.5 * 31 / 32, atol=5)
        tops.append(view[0, 0, 0] / 4)
        lefts.append(view[0, 0, 1] / 2)
    assert min(tops) < 2.5
    assert max(tops) > 6
    assert min(lefts) < 4
    assert max(lefts) > 42


def test_shrinking_averages_over_pixels(tiny_config):
    """A fine checkerboard becomes gray, whatever the crop."""
    board = np.uint8(255 * (np.indices((128, 128)).sum(0) % 2))[..., None].repeat(3, -1)
    for crop in ("none", "resize", "pad"):
        tiny_config.augment.update(crop=crop, pad=0, flip=False)
        for view in train_views(encoded(board), 2, tiny_config):
            assert abs(view[2:-2, 2:-2].astype(int) - 127).max() < 24, crop


def test_the_seed_decides_the_view(ramp, tiny_config):
    one, other = (train_views(encoded(ramp, "JPEG"), 3, tiny_config) for _ in range(2))
    np.testing.assert_array_equal(one, other)
    assert not np.array_equal(one[1], one[2])


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (100, 40)])
@pytest.mark.parametrize("keep", [0.875, 1.0])
def test_evaluation_sees_the_center(ramp, size, keep):
    view = preprocess.eval_image(encoded(ramp), size=size, channels=3, keep=keep).numpy()
    assert view.shape == (*size, 3)
    np.testing.assert_allclose(view[size[0] // 2 - 1 : size[0] // 2 + 1, 0, 0].mean(), 118, atol=3)
    np.testing.assert_allclose(view[0, size[1] // 2 - 1 : size[1] // 2 + 1, 1].mean(), 99, atol=3)
    scale = max(size[0] / 60, size[1] / 100) / keep
    seen = float(view[-1, 0, 0]) - float(view[0, 0, 0])
    np.testing.assert_allclose(seen, 4 * (size[0] - 1) / scale, atol=6)


def test_an_image_of_the_target_size_is_unchanged(ramp):
    view = preprocess.eval_image(encoded(ramp[:32, :32]), size=(32, 32), channels=3, keep=1.0)
    np.testing.assert_array_equal(view, ramp[:32, :32])


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "RGBA", "P"])
def test_image_formats(ramp, mode):
    buffer = io.BytesIO()
    kind = "PNG" if mode in ("RGBA", "P") else "JPEG"
    Image.fromarray(ramp).convert(mode).save(buffer, kind, quality=95)
    pixels = preprocess.decode(tf.constant(buffer.getvalue()), channels=3).numpy()
    expected = np.asarray(Image.fromarray(ramp).convert(mode).convert("RGB"))
    assert pixels.shape == (60, 100, 3)
    assert np.abs(pixels.astype(int) - expected).mean() < 3


@pytest.mark.parametrize("crop", preprocess.CROPS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_crop_has_views_and_a_description(crop, channels, ramp, tiny_config):
    tiny_config.augment.crop = crop
    preprocess.check(tiny_config.augment)
    (view,) = train_views(encoded(ramp), 1, tiny_config, (24, 32), channels)
    assert view.shape == (24, 32, channels)
    assert view.dtype == np.uint8
    assert preprocess.describe(tiny_config.augment)[0]
