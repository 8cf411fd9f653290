"""Pictures of what a model does."""

import jax
import jax.numpy as jnp
import numpy as np


def attention_rollout(attention, has_class_token: bool):
    """How much of each patch reaches the output, through all blocks (arXiv:2005.00928, section 3).

    In each block a token keeps half of itself and takes the other half as its attention, averaged
    over the heads, says.

    Args:
        attention: (depth, N, H, L, L), each row summing to 1.
        has_class_token: whether the output is the first token; else it is the mean of all.

    Returns:
        (N, number of patches), each row summing to 1.
    """

    def block(total, weights):  # (N, L, L), (N, H, L, L)
        mixed = (weights.mean(axis=1) + jnp.eye(weights.shape[-1])) / 2
        return jnp.einsum("nij,njk->nik", mixed, total, precision="float32"), None

    _, n, _, length, _ = attention.shape
    start = jnp.broadcast_to(jnp.eye(length), (n, length, length))
    total, _ = jax.lax.scan(block, start, attention)
    rows = total[:, 0, 1:] if has_class_token else total.mean(axis=1)
    return rows / rows.sum(axis=-1, keepdims=True)


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
