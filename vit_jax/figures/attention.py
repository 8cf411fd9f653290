"""Pictures of where a model looks."""

import jax
import numpy as np

from vit_jax.checks import PNG_METADATA


def draw_attention(images, maps, captions, path) -> None:
    """Writes a PNG with each image, and beside it the image overlaid with its attention map.

    Maps are colored from violet (least) to yellow (most).

    Args:
        images: uint8 (N, H, W, C).
        maps: (N, rows, columns), such as the classifier's `attention`.
        captions: N strings.
        path: the PNG to write.
    """
    from matplotlib.figure import Figure

    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(4.4 * columns, 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, 2 * columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for i, (image, weights, caption) in enumerate(zip(images, maps, captions, strict=True)):
        image = np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image
        heat = np.asarray(jax.image.resize(weights, image.shape[:2], "bilinear"))
        axes[2 * i].imshow(image)
        axes[2 * i].set_title(caption, fontsize=9, loc="left")
        axes[2 * i + 1].imshow(image)
        axes[2 * i + 1].imshow(heat, cmap="plasma", alpha=0.6)
    figure.savefig(path, dpi=100, metadata=PNG_METADATA)
