"""The picture of attention maps."""

import numpy as np
import pytest
from PIL import Image

from vit_jax.figures.attention import draw_attention


@pytest.mark.parametrize(("count", "channels"), [(1, 3), (6, 1)])
def test_picture_has_two_cells_per_image_and_four_images_per_row(count, channels, tmp_path):
    rng = np.random.default_rng(0)
    images = np.uint8(rng.integers(0, 256, (count, 16, 16, channels)))
    captions = [f"image {i}" for i in range(count)]
    draw_attention(images, rng.random((count, 2, 2)), captions, tmp_path / "a.png")
    rows = -(-count // 4)
    assert Image.open(tmp_path / "a.png").size == (440 * min(count, 4), 270 * rows)
