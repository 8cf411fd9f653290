"""A contact sheet of wrong predictions."""

import numpy as np

from vit_jax.figures.confusion import shorten

COLUMNS = 6


def draw(images, mistakes: list[dict]):
    """Draws images with the class that they were taken for, and their own.

    Args:
        images: uint8 (N, H, W, C).
        mistakes: for each image a dictionary with "class", "predicted" and "confidence".

    Returns:
        A matplotlib Figure.
    """
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(images))
    rows = -(-len(images) // columns)
    height, width = images.shape[1:3]
    size = (2.0 * columns, (2.0 * height / width + 0.6) * rows)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, image, mistake in zip(axes, images, mistakes, strict=False):
        if image.shape[-1] == 1:
            image = np.repeat(image, 3, axis=-1)
        axis.imshow(image)
        predicted, actual = (escape(shorten(mistake[key], 20)) for key in ("predicted", "class"))
        caption = f"{predicted}, {mistake['confidence']:.0%}\nis {actual}"
        axis.set_title(caption, fontsize=9, loc="left")
    return figure


def escape(text: str) -> str:
    """Escapes dollar signs, which matplotlib takes for formulas."""
    return text.replace("$", r"\$")
