"""Evaluation views computed without TensorFlow."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import tensorflow as tf
from datasets import picture
from PIL import Image

from vit_jax.checks import EVAL_METHODS
from vit_jax.data import preprocess
from vit_jax.errors import UserError
from vit_jax.inference.images import evaluation_view, view_box


def noise(shape, channels) -> np.ndarray:
    """Returns random pixels, uint8 (*shape, channels), many of them black or white."""
    rng = np.random.default_rng(0)
    return np.uint8(np.clip(rng.normal(128, 150, (*shape, channels)), 0, 255))


@pytest.mark.parametrize("shape", [(40, 30), (300, 500), (32, 32), (7, 90), (224, 225)])
@pytest.mark.parametrize("eval_crop", [1.0, 0.875, "squeeze"])
@pytest.mark.parametrize("channels", [1, 3])
def test_view_is_the_same_as_in_the_input_pipeline(shape, eval_crop, channels):
    image = noise(shape, channels)
    encoded = tf.io.encode_png(image)
    for method in EVAL_METHODS:
        expected = preprocess.eval_image(
            encoded, size=(32, 24), channels=channels, keep=eval_crop, method=method
        )
        view = evaluation_view(image, (32, 24), channels, eval_crop, method)
        assert view.shape == (32, 24, channels)
        assert view.dtype == np.uint8
        # Values close to one half may be rounded either way.
        assert np.abs(view.astype(int) - expected.numpy()).max() <= 1, method


@pytest.mark.parametrize("shape", [(40, 30), (300, 500), (7, 90)])
@pytest.mark.parametrize("method", EVAL_METHODS)
def test_methods_are_those_of_tensorflow(shape, method):
    """Google's code resizes by "bilinear_aliased" to a square, big_vision by "area", and crops."""
    image, size = noise(shape, 3), (32, 24)
    kernel, _, aliased = method.partition("_")
    for eval_crop in ("squeeze", 0.5):
        resized = size
        if eval_crop != "squeeze":
            resized = np.round(np.multiply(shape, np.max(np.divide(size, shape)) / eval_crop))
        pixels = tf.image.resize(image, np.int32(resized), kernel, antialias=not aliased)
        top, left = np.int32(np.subtract(resized, size)) // 2
        expected = np.clip(pixels[top : top + size[0], left : left + size[1]], 0, 255)
        view = evaluation_view(image, size, 3, eval_crop, method)
        # Half a level by rounding; the kernel of "bicubic_aliased" comes from a table there.
        assert np.abs(view - expected).max() <= (1.0 if method == "bicubic_aliased" else 0.51)


@pytest.mark.parametrize(("method", "pillow"), [("bilinear", 2), ("bicubic", 3)])
def test_methods_with_antialiasing_are_those_of_pillow(method, pillow):
    """Thus those of timm and transformers."""
    image = noise((300, 500), 3)
    expected = np.asarray(Image.fromarray(image).resize((24, 32), pillow))
    view = evaluation_view(image, (32, 24), 3, "squeeze", method)
    assert np.abs(view.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("shape", [(16, 100_000), (100_000, 16), (1, 800_000)])
@pytest.mark.parametrize("method", EVAL_METHODS)
def test_extreme_proportions_need_no_more_memory_than_the_image(shape, method):
    """Stripes along the long side become stripes of the view, whatever the method."""
    axis = int(np.argmax(shape))
    ramp = np.linspace(0, 255, shape[axis])
    image = np.uint8(np.broadcast_to(ramp if axis else ramp[:, None], shape))
    for eval_crop in (0.875, "squeeze"):
        tracemalloc.start()
        try:
            view = evaluation_view(image, (64, 64), 3, eval_crop, method)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 4 * image.size
    expected = np.broadcast_to((np.arange(64) + 0.5) * 4, (64, 64))
    np.testing.assert_allclose(view[..., 0], expected if axis else expected.T, atol=2)


def test_images_of_all_kinds():
    """PIL images and arrays in color, gray or with transparency; other values are refused."""
    color = picture(3)
    gray = np.asarray(Image.fromarray(color).convert("L"))
    size = (24, 24)
    view = evaluation_view(color, size, 3, 1.0)
    np.testing.assert_array_equal(evaluation_view(Image.fromarray(color), size, 3, 1.0), view)
    transparent = np.dstack([color, np.full(color.shape[:2], 7, np.uint8)])
    np.testing.assert_array_equal(evaluation_view(transparent, size, 3, 1.0), view)
    from_gray = evaluation_view(gray, size, 3, 1.0)
    assert (from_gray == from_gray[..., :1]).all()
    from_color = evaluation_view(color, size, 1, 1.0)
    assert np.abs(from_color.astype(int) - evaluation_view(gray, size, 1, 1.0)).max() <= 2
    for invalid in (color / 255, color[None], np.zeros((4, 4, 2), np.uint8)):
        with pytest.raises(ValueError, match=r"must be a PIL image, or uint8 \(H, W\)"):
            evaluation_view(invalid, size, 3, 1.0)


def encode_png(pixels) -> bytes:
    """Returns the PNG of 16-bit pixels (H, W, C): gray, gray and alpha, color, color and alpha."""

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    height, width, channels = pixels.shape
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*item) for item in chunks)


def file_bytes(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def image_files() -> dict[str, bytes]:
    """Files that Pillow and TensorFlow might decode differently."""
    color = Image.fromarray(picture(3))
    exif = Image.Exif()
    exif[0x0112] = 8
    pixels = np.random.default_rng(0).integers(0, 2**16, (30, 40, 4), np.uint16)
    palette = color.quantize(16)
    return {
        **{f"16 bits, {c} channels": encode_png(pixels[..., :c]) for c in (1, 2, 3, 4)},
        "palette": file_bytes(palette),
        "palette, transparent": file_bytes(palette, transparency=3),
        "palette, 2 bits": file_bytes(color.quantize(4), bits=2),
        "black and white": file_bytes(color.convert("1")),
        "gray, alpha": file_bytes(color.convert("LA")),
        "color, transparent": file_bytes(color, transparency=(0, 0, 58)),
        "CMYK": file_bytes(color.convert("CMYK"), "JPEG", quality=98),
        "turned": file_bytes(color, "JPEG", quality=98, exif=exif),
    }


@pytest.mark.parametrize("channels", [1, 3])
def test_files_are_the_same_as_in_the_input_pipeline(channels):
    """The high byte of 16 bits, no transparency, colors of palettes and CMYK, turned upright."""
    for name, content in image_files().items():
        options = dict(size=(24, 24), channels=channels, keep=1.0, exif=True)
        expected = preprocess.eval_image(tf.constant(content), **options).numpy().astype(int)
        view = evaluation_view(Image.open(io.BytesIO(content)), (24, 24), channels, 1.0)
        tolerance = 8 if name in ("CMYK", "turned") else 1
        assert np.abs(view - expected).max() <= tolerance, name


def test_files_that_pillow_refuses():
    content = file_bytes(Image.effect_noise((64, 64), 50), "JPEG")
    with pytest.raises(UserError, match="An image can't be decoded: .*truncated"):
        evaluation_view(Image.open(io.BytesIO(content[:-200])), (24, 24), 3, 1.0)
    with pytest.raises(UserError, match="the mode 'F'"):
        evaluation_view(Image.new("F", (8, 8)), (24, 24), 3, 1.0)


@pytest.mark.parametrize(("sides", "size"), [((60, 200), (32, 48)), ((200, 60), (16, 16))])
@pytest.mark.parametrize("eval_crop", [0.875, "squeeze"])
def test_box_is_the_part_that_the_view_shows(sides, size, eval_crop):
    """The pixels of a ramp tell their places."""
    top, left, bottom, right = view_box(sides, size, eval_crop)
    ends = ((top, bottom), (left, right))
    for axis, (start, end) in enumerate(ends):
        ramp = np.indices(sides)[axis]
        view = evaluation_view(np.uint8(ramp), size, 1, eval_crop)[..., 0].astype(float)
        places = view.mean(axis=1 - axis)
        scale = (end - start) / size[axis]
        expected = start + (np.arange(size[axis]) + 0.5) * scale - 0.5
        inside = slice(2, -2)
        np.testing.assert_allclose(places[inside], expected[inside], atol=0.6)
