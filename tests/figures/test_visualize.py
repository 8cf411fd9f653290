"""Attention rollout and its picture."""

import numpy as np
import pytest
from PIL import Image

from vit_jax.figures import attention as visualize


@pytest.mark.parametrize("has_class_token", [True, False])
def test_rollout_is_the_product_of_the_blocks(has_class_token):
    """Against the definition, in float64, block by block."""
    rng = np.random.default_rng(0)
    attention = rng.random((3, 2, 4, 10, 10))  # (depth, N, H, L, L)
    attention /= attention.sum(axis=-1, keepdims=True)
    found = visualize.attention_rollout(attention.astype(np.float32), has_class_token)
    for n in range(2):
        total = np.eye(10)
        for block in attention[:, n]:
            total = (0.5 * block.mean(axis=0) + 0.5 * np.eye(10)) @ total
        row = total[0, 1:] if has_class_token else total.mean(axis=0)
        np.testing.assert_allclose(found[n], row / row.sum(), atol=1e-6)


def test_a_token_that_all_attend_to_stands_out():
    attention = np.full((2, 1, 1, 5, 5), 0.0, np.float32)
    attention[..., 3] = 1.0
    found = np.asarray(visualize.attention_rollout(attention, True))[0]
    assert found.argmax() == 2
    assert found[2] > 0.9


@pytest.mark.parametrize("channels", [1, 3])
def test_the_picture_has_a_place_for_each_image(channels, tmp_path):
    rng = np.random.default_rng(0)
    for count in (1, 6):
        images = np.uint8(rng.integers(0, 256, (count, 16, 16, channels)))
        captions = [f"image {i}" for i in range(count)]
        visualize.draw_attention(images, rng.random((count, 2, 2)), captions, tmp_path / "a.png")
        width, height = Image.open(tmp_path / "a.png").size
        assert width == 440 * min(count, 4)
        assert height == 270 * (1 if count == 1 else 2)
