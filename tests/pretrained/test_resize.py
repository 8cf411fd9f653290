"""Resizing of position embeddings and patches."""

import jax
import numpy as np
import pytest
import scipy.ndimage
from conftest import tiny_model
from published import compute_logits, random_params

from vit_jax.pretrained import resize


@pytest.mark.parametrize("old", [(4, 4), (3, 5), (1, 6)])
@pytest.mark.parametrize("new", [(4, 4), (7, 7), (3, 9), (1, 2), (16, 5)])
@pytest.mark.parametrize("has_class_token", [True, False])
def test_positions_are_resized_as_by_scipy(old, new, has_class_token):
    first = int(has_class_token)
    length = old[0] * old[1] + first
    positions = np.random.default_rng(0).normal(size=(1, length, 6)).astype(np.float32)
    resized = resize.resize_positions(positions, old, new, has_class_token)
    table = positions[0, first:].reshape(*old, 6)
    zoom = (new[0] / old[0], new[1] / old[1], 1)
    expected = scipy.ndimage.zoom(table, zoom, order=1).reshape(-1, 6)
    np.testing.assert_allclose(resized[0, first:], expected, atol=1e-6)
    np.testing.assert_array_equal(resized[0, :first], positions[0, :first])


# PyTorch's `interpolate` of TABLE, rounded: as DINOv2's code calls it, and with antialiasing.
TABLE = np.arange(12.0).reshape(3, 4) ** 2 / 10
TORCH = {
    ((5, 6), False): [
        [-0.157757, -0.165277, -0.111137, 0.007768, 0.298767, 0.537423],
        [0.234335, 0.379519, 0.685782, 0.984447, 1.530143, 1.933488],
        [1.387388, 1.784111, 2.505679, 3.100449, 4.06569, 4.740314],
        [4.322205, 4.984022, 6.143274, 7.050107, 8.457501, 9.418022],
        [6.62906, 7.456804, 8.890014, 9.992174, 11.676322, 12.815789],
    ],
    ((2, 3), False): [[0.197066, 0.562479, 1.325011], [5.022015, 7.059283, 9.488866]],
    ((2, 3), True): [[0.421878, 0.974924, 1.857275], [5.048961, 7.04876, 9.377867]],
}


@pytest.mark.parametrize(("new", "has_registers"), TORCH)
def test_positions_are_resized_as_by_dinov2(new, has_registers):
    """With registers, DINOv2 resizes with antialiasing and without an offset."""
    positions = np.concatenate([[-1.0], TABLE.ravel()]).astype(np.float32).reshape(1, 13, 1)
    resized = resize.resize_positions(positions, (3, 4), new, 1, "torch", has_registers)
    np.testing.assert_allclose(
        resized[0, 1:, 0].reshape(new), TORCH[new, has_registers], atol=1e-5, rtol=2e-6
    )
    assert resized[0, 0, 0] == -1.0


@pytest.mark.parametrize("new", [(8, 8), (9, 13), (16, 16), (12, 8)])
def test_larger_patches_of_larger_images_give_the_same_tokens(new):
    """The tokens are equal if patches grow (arXiv:2212.08013, section 3.4)."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(8, 8, 3, 5)).astype(np.float32)
    patches = rng.normal(size=(4, 8, 8, 3)).astype(np.float32)
    larger = jax.image.resize(patches, (4, *new, 3), "bilinear")
    tokens = np.einsum("nhwc,hwcd->nd", patches, kernel)
    resized = resize.resize_patches(kernel, new)
    assert resized.shape == (*new, 3, 5)
    np.testing.assert_allclose(
        np.einsum("nhwc,hwcd->nd", larger, resized), tokens, atol=1e-3, rtol=1e-4
    )


def test_smaller_patches_solve_the_least_squares_problem():
    """Compares with the paper's equation 4, for resizing along both axes in one matrix."""
    kernel = np.random.default_rng(0).normal(size=(8, 8, 2, 3)).astype(np.float32)
    basis = np.eye(64, dtype=np.float32).reshape(64, 8, 8)
    resizing = np.asarray(jax.image.resize(basis, (64, 5, 4), "bilinear", antialias=False))
    expected = np.linalg.pinv(resizing.reshape(64, 20)) @ kernel.reshape(64, -1)
    np.testing.assert_allclose(
        resize.resize_patches(kernel, (5, 4)), expected.reshape(5, 4, 2, 3), atol=1e-4
    )


def test_model_with_larger_patches_gives_the_same_logits_on_larger_images():
    small, large = tiny_model(depth=1, patch_size=8), tiny_model(depth=1, patch_size=16)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    params = random_params(small)
    logits = compute_logits(small, params, images)
    # Resizes each patch separately: resizing the image would mix pixels across their borders.
    patches = images.reshape(2, 4, 8, 4, 8, 3).transpose(0, 1, 3, 2, 4, 5)
    patches = jax.image.resize(patches, (2, 4, 4, 16, 16, 3), "bilinear")
    larger = patches.transpose(0, 1, 3, 2, 4, 5).reshape(2, 64, 64, 3)
    kernel = resize.resize_patches(params["embedding"]["kernel"], (16, 16))
    params["embedding"] = params["embedding"] | {"kernel": kernel}
    np.testing.assert_allclose(compute_logits(large, params, larger), logits, atol=1e-4)
