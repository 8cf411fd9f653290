"""Evaluation views computed without TensorFlow."""

import numpy as np
import pytest
import tensorflow as tf
from datasets import picture
from PIL import Image

from vit_jax.data import preprocess
from vit_jax.inference.images import evaluation_view


@pytest.mark.parametrize("shape", [(40, 30), (300, 500), (32, 32), (7, 90), (224, 225)])
@pytest.mark.parametrize("eval_crop", [1.0, 0.875])
@pytest.mark.parametrize("channels", [1, 3])
def test_view_is_the_same_as_in_the_input_pipeline(shape, eval_crop, channels):
    rng = np.random.default_rng(0)
    image = np.uint8(rng.integers(0, 256, (*shape, channels)))
    encoded = tf.io.encode_png(image)
    expected = preprocess.eval_image(encoded, size=(32, 24), channels=channels, keep=eval_crop)
    view = evaluation_view(image, (32, 24), channels, eval_crop)
    assert view.shape == (32, 24, channels)
    assert view.dtype == np.uint8
    # Values close to one half may be rounded either way.
    assert np.abs(view.astype(int) - expected.numpy()).max() <= 1


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
