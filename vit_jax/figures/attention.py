"""Pictures of what a model does."""

import jax
import numpy as np


def draw_attention(images, maps, captions, path) -> None:
    """Writes a PNG: each image, and beside it what the model looks at, from violet to yellow.

    Args:
        images: uint8 (N, H, W, C).
        maps: (N, rows, columns), as of `attention_rollout`.
        captions: N texts.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(4.4 * columns, 2.7 * rows), layout="constrained")
    cells = figure.subplots(rows, 2 * columns, squeeze=False).ravel()
    for cell in cells:
        cell.axis("off")
    for i, (image, weights, caption) in enumerate(zip(images, maps, captions, strict=True)):
        image = np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image
        heat = np.asarray(jax.image.resize(weights, image.shape[:2], "bilinear"))
        cells[2 * i].imshow(image)
        cells[2 * i].set_title(caption, fontsize=9, loc="left")
        cells[2 * i + 1].imshow(image)
        cells[2 * i + 1].imshow(heat, cmap="plasma", alpha=0.6)
    figure.savefig(path, dpi=100)
