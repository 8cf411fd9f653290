"""Pictures of what a model learned about patches: their filters, and their positions."""

import math

import numpy as np

from vit_jax.errors import UserError
from vit_jax.figures.drawing import DPI, create_figure, mosaic, principal_components
from vit_jax.models import posemb, resnet
from vit_jax.paths import EMBEDDING, STEM_ROOT

NUM_COMPONENTS = 28  # as in the paper
MAX_POSITIONS = 16  # rows or columns of positions that are drawn; the others are left out


def filters(model, params):
    """Draws the principal components of the filters that first see the pixels.

    They are the patch embedding's (figure 7, left, of arXiv:2010.11929), or of a hybrid, whose
    patches are of features, the root convolution's, standardized as the model applies them.

    Args:
        model: a VisionTransformer.
        params: its parameters.

    Returns:
        A matplotlib Figure: the first 28 components, or as many as there are, each with its share
        of the variance. Gray (0.5) is zero, and the largest weight of a component is 0 or 1.
    """
    kernel, name = pixel_filters(model, params)
    components, shares = filter_components(kernel)
    count, height, width, channels = components.shape
    title = (
        f"{name}, {height}x{width} pixels: {count} principal components, with "
        f"{shares.sum():.0%} of the variance"
    )
    rows = math.ceil(count / 7)
    columns = math.ceil(count / rows)
    figure = create_figure(title, 1.2 * columns + 1.5, 1.45 * rows + 0.8)
    axes = figure.subplots(rows, columns, squeeze=False)
    for i, axis in enumerate(axes.ravel()):
        axis.axis("off")
        if i < count:
            image = components[i] / np.abs(components[i]).max()
            image = image if channels == 3 else image.mean(axis=-1, keepdims=True)
            drawn = axis.imshow((image + 1) / 2, "gray", vmin=0, vmax=1)
            axis.set_title(f"{i + 1}: {shares[i]:.1%}", fontsize=8)
    if channels != 3:
        label = "weight, relative to the component's largest"
        bar = figure.colorbar(drawn, ax=axes, label=label, shrink=0.8)
        bar.set_ticks([0, 0.5, 1], labels=["-1", "0", "1"])
    return figure


def pixel_filters(model, params) -> tuple[np.ndarray, str]:
    """Returns the filters (h, w, C, number) that a model applies to pixels, and their name."""
    if model.resnet is None:
        return np.asarray(params[EMBEDDING]["kernel"], np.float64), "Patch embedding filters"
    kernel = np.asarray(params[STEM_ROOT]["kernel"], np.float64)
    return resnet.standardize(kernel), "Standardized filters of the root convolution"


def filter_components(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the principal components of filters (h, w, C, number), and their shares of variance.

    Returns:
        (k, h, w, C) and (k,), k at most 28.

    Raises:
        UserError: the filters don't differ.
    """
    vectors = kernel.reshape(-1, kernel.shape[-1]).T  # (number, h * w * C)
    components, shares = principal_components(vectors, NUM_COMPONENTS)
    if not len(components):
        raise UserError("The filters are all the same, so they have no principal components")
    return components.reshape(-1, *kernel.shape[:3]), shares


def positions(model, params, image_size):
    """Draws how similar each patch's position embedding is to all others, as a grid of grids.

    Each small map belongs to the patch at its place in the image (figure 7, center, of
    arXiv:2010.11929).

    Args:
        model: a VisionTransformer.
        params: its parameters.
        image_size: (height, width) of the images.

    Returns:
        A matplotlib Figure. Of more than 16 rows or columns of patches, 16 are drawn, evenly
        spaced.

    Raises:
        UserError: the model has no position embeddings.
    """
    grid = model.grid(image_size)
    rows, columns = (np.linspace(0, n - 1, min(n, MAX_POSITIONS)).round().astype(int) for n in grid)
    similarity = position_similarity(position_table(model, params, grid), rows, columns)
    joined, row_centers, column_centers = mosaic(similarity)
    kind = "" if model.posemb == "learned" else f" (model.posemb {model.posemb!r}, computed)"
    height, width = model.token_pixels
    aspect = height / width
    side = np.clip(0.65 * max(similarity.shape[:2]), 4, 10)  # inches
    side = max(side / max(joined.shape[1], joined.shape[0] * aspect), 1 / DPI)  # of a number
    figure = create_figure(
        f"Position embeddings{kind}: cosine similarity of each of {grid[0]}x{grid[1]} patches of "
        f"{height}x{width} pixels to all",
        max(side * joined.shape[1] / 0.82 + 0.6, 4),
        max(side * aspect * joined.shape[0] + 1.0, 3),
    )
    axis = figure.subplots()
    style = dict(vmin=-1, vmax=1, aspect=aspect, interpolation="nearest")
    drawn = axis.imshow(joined, "viridis", **style)
    axis.set_xticks(column_centers, columns + 1)
    axis.set_yticks(row_centers, rows + 1)
    axis.set(xlabel="patch column", ylabel="patch row")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.colorbar(drawn, ax=axis, label="cosine similarity", shrink=0.8)
    return figure


def position_table(model, params, grid: tuple[int, int]) -> np.ndarray:
    """Returns the patches' position embeddings, float64 (rows, columns, D).

    Raises:
        UserError: the model has none.
    """
    if model.posemb == "none":
        raise UserError("model.posemb is 'none': the model has no position embeddings to compare")
    if model.posemb == "learned":
        table = params["Transformer"]["posembed_input"]["pos_embedding"]
        table = table[:, model.num_prefix_positions :]  # the patches'
    else:
        table = posemb.table(model.posemb, *grid, model.width, num_prefix=0)
    return np.asarray(table, np.float64).reshape(*grid, model.width)


def position_similarity(table: np.ndarray, rows, columns) -> np.ndarray:
    """Returns the cosine similarities of some vectors of a table to all.

    Args:
        table: (h, w, D).
        rows, columns: of the vectors, (R,) and (C,).

    Returns:
        (R, C, h, w).
    """
    unit = table / np.maximum(np.linalg.norm(table, axis=-1, keepdims=True), 1e-30)
    return np.tensordot(unit[np.ix_(rows, columns)], unit, (-1, -1))
