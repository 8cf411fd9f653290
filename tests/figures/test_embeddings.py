"""Pictures of the filters and of the position embeddings."""

import numpy as np
import pytest
from conftest import tiny_model
from published import random_params

from vit_jax.errors import UserError
from vit_jax.figures import embeddings

STEM = dict(num_layers=(), width_factor=0.5)  # 32 filters of 7x7 pixels


def test_components_are_the_eigenvectors_of_the_filters_covariance():
    kernel = np.random.default_rng(0).normal(size=(3, 4, 3, 50))
    components, shares = embeddings.filter_components(kernel)
    assert components.shape == (28, 3, 4, 3)
    covariance = np.cov(kernel.reshape(36, 50))
    variances, directions = np.linalg.eigh(covariance)
    np.testing.assert_allclose(shares, variances[::-1][:28] / variances.sum())
    overlaps = components.reshape(28, 36) @ directions[:, ::-1][:, :28]
    np.testing.assert_allclose(np.abs(overlaps), np.eye(28), atol=1e-6)
    flat = components.reshape(28, 36)
    assert (flat[range(28), np.abs(flat).argmax(axis=1)] > 0).all()  # the sign is fixed
    with pytest.raises(UserError, match="all the same"):
        embeddings.filter_components(np.ones((2, 2, 3, 8)))


def test_filters_of_a_hybrid_are_standardized():
    model = tiny_model(resnet=STEM, patch_size=2)
    params = random_params(model)
    kernel, _ = embeddings.pixel_filters(model, params)
    raw = np.asarray(params["conv_root"]["kernel"], np.float64)
    expected = (raw - raw.mean(axis=(0, 1, 2))) / raw.std(axis=(0, 1, 2))
    np.testing.assert_allclose(kernel, expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("fields", "channels", "count", "title"),
    [
        (dict(), 3, 28, "Patch embedding filters, 8x8 pixels: 28"),
        (dict(patch_size=(4, 2)), 1, 8, "Patch embedding filters, 4x2 pixels: 8"),
        (dict(resnet=STEM, patch_size=2), 3, 28, "filters of the root convolution, 7x7"),
    ],
)
def test_filters_of_any_patch_and_stem(fields, channels, count, title):
    model = tiny_model(**fields)
    figure = embeddings.filters(model, random_params(model, channels=channels))
    shown = [axis.get_images()[0].get_array() for axis in figure.axes if axis.get_images()]
    assert len(shown) == count
    assert title in figure.get_suptitle()
    assert "100%" in figure.get_suptitle() or count == 28
    assert figure.axes[0].get_title().startswith("1: ")
    for pixels in shown:
        assert np.isclose(np.abs(np.asarray(pixels) - 0.5).max(), 0.5)
    bars = [axis for axis in figure.axes if axis.get_ylabel()]
    assert len(bars) == (channels == 1)


def test_similarity_of_positions_is_the_cosine_of_each_pair():
    table = np.random.default_rng(0).normal(size=(2, 3, 5))
    similarity = embeddings.position_similarity(table, [0, 1], [2, 0])
    for i, j, y, x in np.ndindex(2, 2, 2, 3):
        a, b = table[i, (2, 0)[j]], table[y, x]
        expected = a @ b / np.sqrt((a @ a) * (b @ b))
        np.testing.assert_allclose(similarity[i, j, y, x], expected)


@pytest.mark.parametrize("pool", ["cls", "gap"])
@pytest.mark.parametrize("posemb", ["learned", "sincos2d", "sincos1d"])
def test_every_position_embedding_has_a_figure(posemb, pool):
    """Each small map is brightest at its own place, on a grid that is no square."""
    model = tiny_model(posemb=posemb, pool=pool, patch_size=(4, 8))
    size = (72, 16)  # 18 x 2 patches; 16 rows are drawn
    params = random_params(model, size)
    if posemb == "learned":  # the class token's place comes first
        stored = params["Transformer"]["posembed_input"]["pos_embedding"][0, -36:]
        table = embeddings.position_table(model, params, (18, 2))
        np.testing.assert_array_equal(table, stored.reshape(18, 2, 32))
    figure = embeddings.positions(model, params, size)
    axis, bar = figure.axes
    assert len(axis.get_yticks()) == 16
    rows = [int(label.get_text()) for label in axis.get_yticklabels()]
    assert (rows[0], rows[-1]) == (1, 18)
    assert bar.get_ylabel() == "cosine similarity"
    assert ("computed" in figure.get_suptitle()) == (posemb != "learned")
    assert axis.get_aspect() == 0.5
    joined = np.ma.filled(axis.get_images()[0].get_array(), np.nan)
    zoom, gap = 2, 3  # 18 rows of 2 pixels are above 24
    for i, row in enumerate(rows):
        for column in range(2):
            top, left = i * (18 * zoom + gap), column * (2 * zoom + gap)
            panel = joined[top : top + 18 * zoom : zoom, left : left + 2 * zoom : zoom]
            assert np.unravel_index(panel.argmax(), panel.shape) == (row - 1, column)
            np.testing.assert_allclose(panel.max(), 1.0, atol=1e-6)


def test_a_model_without_positions_is_refused():
    with pytest.raises(UserError, match="model.posemb is 'none'"):
        embeddings.positions(tiny_model(posemb="none"), {}, (32, 32))
