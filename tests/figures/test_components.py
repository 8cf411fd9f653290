"""Feature maps as colors."""

import numpy as np

from vit_jax.figures import components


def test_colors_are_the_first_three_components_in_order_of_variance():
    rng = np.random.default_rng(0)
    values = rng.uniform(-1, 1, (2, 8, 6, 3)) * (1, 5, 3)  # green varies most, then blue
    axes, _ = np.linalg.qr(rng.normal(size=(16, 3)))
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), range(3)])  # the sign of the largest
    colors, share = components.colors(values @ axes.T + 7.0)
    np.testing.assert_allclose(share, 1.0)
    for color, source in zip(colors.reshape(-1, 3).T, (1, 2, 0), strict=True):
        expected = values[..., source].ravel()
        assert np.corrcoef(color, expected)[0, 1] > 0.95  # they correlate a little by chance
        assert (color.min(), color.max()) == (0.0, 1.0)


def test_features_that_do_not_vary_or_are_narrow():
    constant, share = components.colors(np.ones((1, 2, 2, 8)))
    assert (constant == 0).all()
    assert share == 0.0
    narrow, _ = components.colors(np.random.default_rng(0).random((1, 3, 3, 2)))
    assert np.isfinite(narrow).all()
    assert (narrow[..., 2] == 0).all()


def test_figure_has_a_column_per_layer_or_a_row_if_there_are_many_images():
    rng = np.random.default_rng(0)
    for count in (2, 5):
        images = list(np.uint8(rng.integers(0, 256, (count, 12, 16, 1))))
        features = rng.random((2, count, 3, 4, 8))
        names = [f"image {i}" for i in range(count)]
        figure = components.feature_maps(images, features, (3, 12), names)
        assert len(figure.axes) == 3 * count
        titles = [axis.get_title(loc="left") for axis in figure.axes]
        shape = (count, 3) if count == 2 else (3, count)
        grid = np.reshape(titles, shape) if count == 2 else np.reshape(titles, shape).T
        assert list(grid[:, 0]) == names
        assert grid[0, 1].startswith("block 3: ")
        assert grid[0, 2].startswith("block 12: ")
