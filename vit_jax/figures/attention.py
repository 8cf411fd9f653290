"""Pictures of attention: where a model looks, and how far."""

import math

import jax.numpy as jnp
import numpy as np

from vit_jax.figures.drawing import (
    DPI,
    create_figure,
    mean_aspect,
    mosaic,
    save,
    show_image,
    show_over,
)

COLORS = "plasma"  # from violet (least) to yellow (most)


def rollout(images, maps, captions, boxes=None, title: str = ""):
    """Draws each image, and beside it how much each part contributes to the output.

    Contributions are relative to the mean over the image: 1 if all parts contribute the same.

    Args:
        images: N images of any size, uint8 (H, W, 1, 3 or 4).
        maps: attention rollout (N, rows, columns), such as the classifier's `attention`.
        captions: N strings.
        boxes: the part of each image that the model saw, see `view_box` of
            `vit_jax/inference/images.py`; None: all of it.
        title: the text above the images.

    Returns:
        A matplotlib Figure.
    """
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    row_height = 0.55 + 2.15 * mean_aspect(images)  # inches
    figure = create_figure(title, 4.4 * columns, row_height * rows + (0.3 if title else 0))
    axes = figure.subplots(rows, 2 * columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    maps = np.asarray(maps) / np.mean(maps, axis=(1, 2), keepdims=True)
    low, high = maps.min(), np.percentile(maps, 99.5)  # an outlier would darken all others
    style = dict(cmap=COLORS, vmin=low, vmax=high, alpha=0.6, interpolation="bilinear")
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        show_image(axes[2 * i], image, caption)
        drawn = show_over(axes[2 * i + 1], image, maps[i], boxes and boxes[i], **style)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8, extend="max")
    bar.set_label("contribution / mean", fontsize=9)
    return figure


def draw_attention(images, maps, captions, path) -> None:
    """Writes a PNG with each image, and beside it the image overlaid with its attention map.

    Args:
        images: uint8 (N, H, W, C).
        maps, captions: see `rollout`.
        path: the PNG to write.
    """
    save(rollout(images, maps, captions), path)


def head_maps(model, params, images):
    """Returns where each head of each block looks: float32 (N, depth, heads, rows, columns).

    Args:
        model: a VisionTransformer.
        params: its parameters.
        images: normalized as in training, float32 (N, H, W, C).

    Returns:
        The attention of the class token to each patch; without a class token, the attention that
        each patch gets, as the mean over all patches.
    """
    weights = captured_attention(model, params, images)
    to_patches = weights[..., model.num_prefix_tokens :]
    weights = to_patches[..., 0, :] if model.has_class_token else to_patches.mean(axis=-2)
    return weights.reshape(*weights.shape[:3], *model.grid(images.shape[1:3]))


def captured_attention(model, params, images):
    """Returns each block's attention weights: float32 (N, depth, heads, L, L)."""
    _, captured = model.apply({"params": params}, images, capture=("attention",))
    return captured["attention"].swapaxes(0, 1)


def heads(image, maps, token_pixels=(1, 1), title: str = "Attention by block and head"):
    """Draws an image, and the attention map of each block (rows) and head (columns).

    Args:
        image: uint8 (H, W, C).
        maps: (depth, heads, rows, columns), such as `head_maps` of one image.
        token_pixels: (height, width) of a token, `model.token_pixels`.
        title: the text above.

    Returns:
        A matplotlib Figure. Weights are relative to uniform attention, on a logarithmic scale.
    """
    from matplotlib.colors import LogNorm

    maps = np.asarray(maps, np.float64)
    depth, num_heads, rows, columns = maps.shape
    joined, row_centers, column_centers = mosaic(maps * rows * columns)
    aspect = token_pixels[0] / token_pixels[1]
    side = min(1.0, 10 / max(depth, num_heads)) / max(columns, rows * aspect)  # of a weight, inches
    side = max(side, 1.1 / DPI)  # a pixel and the gaps
    width, height = num_heads * columns * side, max(depth * rows * side * aspect, 2.6)
    figure = create_figure(title, 2.6 + width + 2.0, height + 1.2)
    left, right = figure.subplots(1, 2, width_ratios=(2.6, width + 1.2))
    show_image(left, image)
    left.set_anchor("N")
    highest = 10.0 ** max(1, math.ceil(math.log10(max(maps.max() * rows * columns, 1))))
    norm = LogNorm(0.1, highest, clip=True)
    drawn = right.imshow(joined, COLORS, norm=norm, aspect=aspect, interpolation="nearest")
    right.set_xticks(column_centers, range(1, num_heads + 1))
    right.set_yticks(row_centers, range(1, depth + 1))
    right.set(xlabel="head", ylabel="block")
    right.tick_params(length=0, labelsize=8)
    right.spines[:].set_visible(False)
    label = "attention / uniform attention"
    figure.colorbar(drawn, ax=right, label=label, aspect=max(20, 3 * height))
    return figure


def attention_distances(model, params, images):
    """Returns how far each head of each block looks, in pixels: float32 (N, depth, heads).

    The distance between the centers of the patch that looks and of the one looked at, as the mean
    over both, weighted by attention (arXiv:2010.11929, section 4.5). The class token, which has no
    place, is left out on both sides.

    Args:
        model, params, images: see `head_maps`.
    """
    weights = captured_attention(model, params, images)
    first = model.num_prefix_tokens
    weights = weights[..., first:, first:]
    totals = weights.sum(axis=-1)  # over the patches; 0 if all attention is on the class token
    far = patch_distances(model.grid(images.shape[1:3]), model.token_pixels)
    return ((weights * far).sum(axis=-1) / jnp.maximum(totals, 1e-30)).mean(axis=-1)


def patch_distances(grid: tuple[int, int], token_pixels: tuple[int, int]) -> np.ndarray:
    """Returns the distances between patches' centers in pixels, float32 (patches, patches)."""
    centers = np.indices(grid).reshape(2, -1).T * np.array(token_pixels)  # (patches, 2)
    offsets = centers[:, None] - centers
    return np.sqrt((offsets**2).sum(axis=-1)).astype(np.float32)


def distances(values, uniform: float, title: str = "Mean attention distance"):
    """Draws how far each head looks, against depth (figure 7, right, of arXiv:2010.11929).

    Args:
        values: pixels, (depth, heads), such as the mean over images of `attention_distances`.
        uniform: the distance of uniform attention, the mean of `patch_distances`.
        title: the text above.

    Returns:
        A matplotlib Figure.
    """
    values = np.asarray(values)
    depth, num_heads = values.shape
    figure = create_figure(title, 6.4, 4.2)
    axis = figure.subplots()
    blocks = np.arange(1, depth + 1)
    axis.scatter(blocks.repeat(num_heads), values.ravel(), s=22, alpha=0.7, label="a head")
    axis.plot(blocks, values.mean(axis=1), color="black", linewidth=1, label="mean over the heads")
    axis.axhline(uniform, color="gray", linestyle="--", linewidth=1, label="uniform attention")
    top = 1.08 * max(uniform, values.max())
    axis.set(xlabel="block", ylabel="mean attention distance (pixels)", ylim=(0, top or 1))
    axis.set_xticks(blocks[:: math.ceil(depth / 16)])
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=9, frameon=False)
    return figure
