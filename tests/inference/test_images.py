"""The view of an image that evaluation has, without TensorFlow."""

import numpy as np
import pytest
import tensorflow as tf
from datasets import picture
from PIL import Image

from vit_jax.data import preprocess
from vit_jax.inference.images import evaluation_view


@pytest.mark.parametrize("shape", [(40, 30), (300, 500), (32, 32), (7, 90), (224, 225)])
@pytest.mark.parametrize("keep", [1.0, 0.875])
@pytest.mark.parametrize("channels", [1, 3])
def test_it_is_that_of_the_input_pipeline(shape, keep, channels):
    rng = np.random.default_rng(0)
    image = np.uint8(rng.integers(0, 256, (*shape, channels)))
    encoded = tf.io.encode_png(image)
    expected = preprocess.eval_image(encoded, size=(32, 24), channels=channels, keep=keep)
    view = evaluation_view(image, (32, 24), channels, keep)
    assert view.shape == (32, 24, channels)
    assert view.dtype == np.uint8
    # Where a value lies at a half, rounding may go either way.
    assert np.abs(view.astype(int) - expected.numpy()).max() <= 1


def test_what_counts_as_an_image():
    colours = picture(3)
    grey = np.asarray(Image.fromarray(colours).convert("L"))
    size = (24, 24)
    view = evaluation_view(colours, size, 3, 1.0)
    np.testing.assert_array_equal(evaluation_view(Image.fromarray(colours), size, 3, 1.0), view)
    transparent = np.dstack([colours, np.full(colours.shape[:2], 7, np.uint8)])
    np.testing.assert_array_equal(evaluation_view(transparent, size, 3, 1.0), view)
    from_grey = evaluation_view(grey, size, 3, 1.0)
    assert (from_grey == from_grey[..., :1]).all()
    from_colours = evaluation_view(colours, size, 1, 1.0)
    assert np.abs(from_colours.astype(int) - evaluation_view(grey, size, 1, 1.0)).max() <= 2
    for strange in (colours / 255, colours[None], np.zeros((4, 4, 2), np.uint8)):
        with pytest.raises(ValueError, match="expected uint8"):
            evaluation_view(strange, size, 3, 1.0)
