"""Crops, resizing and decoding of images on the host."""

import functools
import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from vit_jax.data import preprocess


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, kind, **options)
    return tf.constant(buffer.getvalue())


def decoded(image, channels=3, exif=False):
    return preprocess.EncodedImage(image, channels, exif).decode().numpy().astype(int)


def as_pillow_decodes(image, channels=3):
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(image.numpy())))
    pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    return pixels.reshape(*pixels.shape[:2], channels).astype(int)


@pytest.fixture(scope="module")
def ramp():
    """An image of 60 x 100 pixels; red gives a pixel's row, green its column."""
    y, x = np.mgrid[:60, :100]
    return np.stack([4 * y, 2 * x, np.full_like(x, 90)], axis=-1).astype(np.uint8)


def train_views(image, count, config, size=(32, 32), channels=3, exif=False):
    """Returns the views of an image for the seeds 0 .. count - 1."""

    def view(seed):
        seed = tf.stack([tf.constant(0, tf.int64), seed])
        kwargs = dict(size=size, channels=channels, augment=config.augment, exif=exif)
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


def test_uniform_areas_are_drawn_as_torchvision_draws_them(tiny_config):
    """Areas are uniform; TensorFlow's favor small ones; Beta(2, 5) has the mean 2 / 7."""
    shape, means = tf.constant((1000, 1000, 3)), {}
    tiny_config.augment.update(crop_area=(0.1, 0.5), crop_beta=(2.0, 5.0))
    for name, window in preprocess.CROP_DISTRIBUTIONS.items():

        def draw(seed, window=window):
            return tf.stack(window(shape, tf.stack([seed, seed]), tiny_config.augment))

        windows = np.array(list(tf.data.Dataset.range(1000).map(draw).as_numpy_iterator()))
        top, left, height, width = windows.T
        assert (windows >= 0).all()
        assert (top + height).max() <= 1000 >= (left + width).max()
        shares, ratios = height * width / 1e6, width / height
        assert 0.09 < shares.min() < 0.12
        assert 0.73 < ratios.min() < 0.78
        assert 1.29 < ratios.max() < 1.35
        means[name] = shares.mean()
        if name == "area":
            assert np.quantile(shares, (0.25, 0.5, 0.75)) == pytest.approx(
                (0.2, 0.3, 0.4), abs=0.02
            )
            assert np.log(ratios).mean() == pytest.approx(0, abs=0.02)
            assert np.quantile(top / (1001 - height), (0.25, 0.75)) == pytest.approx(
                (0.25, 0.75), abs=0.04
            )
    assert means["tensorflow"] < means["area"] - 0.01
    assert means["beta"] == pytest.approx(0.1 + 0.4 * 2 / 7, abs=0.01)


@pytest.mark.parametrize(
    ("sides", "expected"),
    [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10)), ((90, 100), (0, 0, 90, 100))],
)
def test_without_a_valid_window_uniform_crops_are_central(sides, expected, tiny_config):
    """At the valid aspect ratio that is nearest to the image's."""
    tiny_config.augment.crop_area = (1.0, 1.0)
    for seed in range(5):
        seed = tf.constant((0, seed), tf.int64)
        window = preprocess.area_window(tf.constant((*sides, 3)), seed, tiny_config.augment)
        assert tuple(map(int, window)) == expected


@pytest.mark.parametrize("sides", [(60, 100), (100, 60), (90, 90), (20, 31)])
def test_simple_crops_are_those_of_torchvision(sides, tiny_config):
    """The shorter side resized as by Pillow, mirrored pixels around it, and a random place."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (6, 6, 3), np.uint8)
    image = np.asarray(Image.fromarray(image).resize(sides[::-1], Image.BICUBIC))
    short = min(sides)
    resized = tuple(32 if side == short else 32 * side // short for side in sides)
    whole = Image.fromarray(image).resize(resized[::-1], Image.BICUBIC)
    padded = np.pad(np.asarray(whole), ((4, 4), (4, 4), (0, 0)), "reflect").astype(int)
    tiny_config.augment.update(crop="simple", resize_method="bicubic", flip=False)
    places = set()
    for view in train_views(encoded(image), 60, tiny_config):
        offs = {
            (y, x): np.abs(padded[y : y + 32, x : x + 32] - view).max()
            for y in range(resized[0] + 8 - 31)
            for x in range(resized[1] + 8 - 31)
        }
        place = min(offs, key=offs.get)
        assert offs[place] <= 4  # Pillow rounds between the two axes
        places.add(place)
    for axis in (0, 1):
        assert min(place[axis] for place in places) <= 2
        assert max(place[axis] for place in places) >= resized[axis] + 8 - 32 - 2


@pytest.mark.parametrize("size", [(32, 48), (90, 140)])
def test_bicubic_resizing_is_pillows(size):
    from sklearn.datasets import load_sample_image

    photo = Image.fromarray(load_sample_image("flower.jpg")).resize((128, 96))
    expected = np.asarray(photo.resize(size[::-1], Image.BICUBIC)).astype(int)
    out = preprocess.resize(np.asarray(photo), size, "bicubic").numpy()
    difference = np.abs(out - expected)  # Pillow rounds between the two axes
    assert difference.max() <= 5
    assert (difference > 1).mean() < 0.01


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
@pytest.mark.parametrize("channels", [1, 3])
def test_image_formats(ramp, mode, channels, tiny_config):
    kind = "PNG" if mode in ("RGBA", "P") else "JPEG"
    image = encoded(Image.fromarray(ramp).convert(mode), kind, quality=95)
    expected = as_pillow_decodes(image, channels)
    assert np.abs(decoded(image, channels) - expected).mean() < 3
    tiny_config.augment.update(crop_area=(1.0, 1.0), flip=False)
    (view,) = train_views(image, 1, tiny_config, channels=channels)
    assert abs(view.mean() - expected.mean()) < 8  # a crop of a JPEG is decoded differently


def exif_data(orientation, endian="<"):
    exif = Image.Exif()
    exif.endian = endian
    exif.update({0x010F: "a maker", 0x0112: orientation, 0x0131: "software"})
    return exif.tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("endian", ["<", ">"])
def test_orientations(ramp, kind, endian):
    """All eight, and numbers that mean nothing; after other data and in both byte orders."""
    options = {"quality": 100, "subsampling": 0, "comment": b"hello", "icc_profile": b"x" * 300}
    for orientation in range(10):
        image = encoded(ramp, kind, exif=exif_data(orientation, endian), **options)
        expected = as_pillow_decodes(image)
        assert expected.shape[:2] == ((100, 60) if orientation in (5, 6, 7, 8) else (60, 100))
        upright = decoded(image, exif=True)
        assert np.abs(upright - expected).mean() < 1.5, orientation
        if orientation < 2 or orientation > 8:
            np.testing.assert_array_equal(upright, decoded(image))


def test_crops_of_turned_jpegs_are_those_of_upright_images(ramp, tiny_config):
    """The same windows, although only they are decoded."""

    @functools.partial(tf.function, autograph=False)
    def view(image, seed):
        kwargs = dict(size=(32, 32), channels=3, augment=tiny_config.augment, exif=True)
        return preprocess.train_image(image, tf.stack([seed, seed]), **kwargs)

    for orientation in range(1, 9):
        exif = exif_data(orientation)
        image = encoded(ramp, "JPEG", exif=exif, quality=100, subsampling=0)
        upright = encoded(np.uint8(as_pillow_decodes(image)))
        for seed in map(tf.constant, range(4)):
            difference = view(image, seed).numpy().astype(int) - view(upright, seed).numpy()
            assert np.abs(difference).mean() < 1.5, orientation


def test_broken_exif_data_changes_nothing(ramp):
    """Wherever a byte is wrong or the file ends, the orientation is a number from 1 to 8.

    Unreadable data means upright, as it does to Pillow.
    """
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG"):
        content = encoded(ramp, kind, exif=exif_data(6)).numpy()
        for i in range(100):
            broken = np.frombuffer(content, np.uint8).copy()
            broken[rng.integers(2, 100, 2)] = rng.integers(0, 256, 2)
            broken = broken[:i].tobytes() if i % 2 else broken.tobytes()
            assert 1 <= preprocess.exif_orientation(broken) <= 8
        assert preprocess.exif_orientation(content) == 6
        start = content.index(b"Exif" if kind == "JPEG" else b"eXIf")
        assert preprocess.exif_orientation(content[:start]) == 1
        assert preprocess.exif_orientation(content.replace(b"II*\x00", b"XX*\x00")) == 1


@pytest.mark.parametrize("crop", preprocess.CROPS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_crop_has_views_and_a_description(crop, channels, ramp, tiny_config):
    tiny_config.augment.update(crop=crop, three_augment=True, resize_method="bicubic")
    preprocess.check(tiny_config.augment)
    (view,) = train_views(encoded(ramp), 1, tiny_config, (24, 32), channels)
    assert view.shape == (24, 32, channels)
    assert view.dtype == np.uint8
    assert preprocess.describe(tiny_config.augment)[0]
