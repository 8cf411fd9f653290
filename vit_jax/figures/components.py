"""Pictures of feature maps: their first three principal components as colors."""

import numpy as np

from vit_jax.figures.drawing import (
    create_figure,
    mean_aspect,
    principal_components,
    show_image,
    show_over,
)

EDGE = 1.0  # percent of the values at each end that have the darkest and the brightest color


def colors(features) -> tuple[np.ndarray, float]:
    """Returns the first three principal components of feature maps as red, green and blue.

    They are the components of the vectors of all images together, so that a color means the same
    in each.

    Args:
        features: (N, rows, columns, D).

    Returns:
        Colors (N, rows, columns, 3) in [0, 1], and the three components' share of the variance.
    """
    features = np.asarray(features, np.float64)
    vectors = features.reshape(-1, features.shape[-1])
    directions, shares = principal_components(vectors, 3)
    values = np.zeros((len(vectors), 3))
    values[:, : len(directions)] = (vectors - vectors.mean(axis=0)) @ directions.T
    low, high = np.percentile(values, (EDGE, 100 - EDGE), axis=0)
    scaled = np.clip((values - low) / np.where(high > low, high - low, np.inf), 0, 1)
    return scaled.reshape(*features.shape[:-1], 3), float(shares.sum())


def feature_maps(images, features, layers, captions, boxes=None, title: str = "Features"):
    """Draws each image, and beside it (of many images, below it) its feature maps as colors.

    Args:
        images: N images of any size, uint8 (H, W, 1, 3 or 4).
        features: for each layer, (N, rows, columns, D), such as what `vit_jax.features` returns.
        layers: the layers' numbers.
        captions: N strings.
        boxes: see `rollout` of `vit_jax/figures/attention.py`.
        title: the text above the images.

    Returns:
        A matplotlib Figure. Similar colors of a block are similar features; colors of different
        blocks have nothing to do with each other. The share of the variance that the colors show
        stands above the first map of each block.
    """
    columns, rows, aspect = 1 + len(layers), len(images), mean_aspect(images)
    if rows > columns:
        figure = create_figure(title, 1.6 * rows, (0.3 + 1.6 * aspect) * columns + 0.6)
        axes = figure.subplots(columns, rows, squeeze=False).T
    else:
        figure = create_figure(title, 2.4 * columns, (0.3 + 2.3 * aspect) * rows + 0.6)
        axes = figure.subplots(rows, columns, squeeze=False)
    for row, (image, caption) in enumerate(zip(images, captions, strict=True)):
        show_image(axes[row, 0], image, caption)
    for column, (layer, layer_features) in enumerate(zip(layers, features, strict=True), start=1):
        painted, share = colors(layer_features)
        axes[0, column].set_title(f"block {layer}: {share:.0%}", fontsize=9, loc="left")
        for row, image in enumerate(images):
            box = boxes and boxes[row]
            show_over(axes[row, column], image, painted[row], box, interpolation="nearest")
    return figure
