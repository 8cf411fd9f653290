"""Pictures of attention, and the distances and maps that they show."""

import functools

import jax
import numpy as np
import pytest
from PIL import Image
from published import random_model

from vit_jax.figures import attention

STEM = dict(num_layers=(), width_factor=0.5)  # four pixels per feature


@pytest.mark.parametrize(("count", "channels"), [(1, 3), (6, 1)])
def test_picture_has_two_cells_per_image_and_four_images_per_row(count, channels, tmp_path):
    rng = np.random.default_rng(0)
    images = np.uint8(rng.integers(0, 256, (count, 16, 16, channels)))
    captions = [f"image {i}" for i in range(count)]
    attention.draw_attention(images, rng.random((count, 2, 2)), captions, tmp_path / "a.png")
    rows = -(-count // 4)
    assert Image.open(tmp_path / "a.png").size == (440 * min(count, 4), 270 * rows)


def test_rollout_is_drawn_where_the_model_looked_in_images_of_any_size():
    rng = np.random.default_rng(0)
    images = [np.uint8(rng.integers(0, 256, shape)) for shape in ((40, 60, 3), (90, 20, 1))]
    maps = rng.random((2, 3, 2))
    boxes = [(2, 12, 38, 48), (35, 0, 55, 20)]
    figure = attention.rollout(images, maps, ["a", "b"], boxes, title="Rollout")
    first, first_over, second, second_over, bar = figure.axes
    assert [axis.get_title(loc="left") for axis in (first, second)] == ["a", "b"]
    assert bar.get_ylabel() == "contribution / mean"
    for i, (axis, image) in enumerate(((first_over, images[0]), (second_over, images[1]))):
        below, heat = axis.get_images()
        top, left, bottom, right = boxes[i]
        assert heat.get_extent() == [left, right, bottom, top]
        assert below.get_array().shape == image.shape[:2]
        assert (axis.get_xlim(), axis.get_ylim()) == ((0, image.shape[1]), (image.shape[0], 0))
        np.testing.assert_allclose(heat.get_array(), maps[i] / maps[i].mean())
        outside = np.ones(image.shape[:2], bool)
        outside[top:bottom, left:right] = False
        assert below.get_array()[outside].max() <= 0.4


@pytest.mark.parametrize(
    ("size", "fields"),
    [
        ((16, 24), dict(pool="cls")),
        ((16, 24), dict(pool="none", patch_size=(4, 8), posemb="sincos1d")),
        ((16, 32), dict(pool="map", resnet=STEM, patch_size=2)),
    ],
)
def test_distances_and_maps_of_heads_are_those_of_plain_loops(size, fields):
    model, params, images = random_model(size, **fields)
    apply = jax.jit(functools.partial(model.apply, capture=("attention",)))
    weights = np.asarray(apply({"params": params}, images)[1]["attention"], np.float64)
    depth, n, num_heads, _, _ = weights.shape
    skipped = 1 if model.pool == "cls" else 0
    height, width = (4, 8) if model.patch_size == (4, 8) else (8, 8)
    columns = size[1] // width
    far, maps = np.zeros((n, depth, num_heads)), np.zeros((n, depth, num_heads, *model.grid(size)))
    for i, block, head in np.ndindex(far.shape):
        rows_of_weights = weights[block, i, head]
        means = []
        for q in range(skipped, len(rows_of_weights)):
            total = weighted = 0.0
            for k in range(skipped, len(rows_of_weights)):
                (qy, qx), (ky, kx) = (divmod(token - skipped, columns) for token in (q, k))
                pixels = ((height * (qy - ky)) ** 2 + (width * (qx - kx)) ** 2) ** 0.5
                total += rows_of_weights[q, k]
                weighted += rows_of_weights[q, k] * pixels
                share = 1.0 if skipped == 0 else 0.0
                maps[i, block, head, ky, kx] += share * rows_of_weights[q, k] / len(rows_of_weights)
            means.append(weighted / total)
        far[i, block, head] = sum(means) / len(means)
        if skipped:
            for k in range(1, len(rows_of_weights)):
                maps[(i, block, head, *divmod(k - 1, columns))] = rows_of_weights[0, k]

    distances = jax.jit(functools.partial(attention.attention_distances, model))(params, images)
    np.testing.assert_allclose(distances, far, rtol=1e-4)
    head_maps = jax.jit(functools.partial(attention.head_maps, model))(params, images)
    np.testing.assert_allclose(head_maps, maps, atol=1e-6)


def test_uniform_attention_has_the_mean_distance_of_all_pairs():
    far = attention.patch_distances((1, 3), (5, 10))
    np.testing.assert_array_equal(far, [[0, 10, 20], [10, 0, 10], [20, 10, 0]])


def test_figures_of_heads_name_blocks_and_units():
    maps = np.random.default_rng(0).random((3, 2, 4, 5)) / 20
    maps[0, 0] = 0.0  # of a head that looks only at the class token
    figure = attention.heads(np.zeros((16, 20, 1), np.uint8), maps, (4, 2))
    _, axis, bar = figure.axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["1", "2", "3"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("head", "block")
    assert axis.get_aspect() == 2.0  # of a number: patches are twice as high as wide
    assert bar.get_ylabel() == "attention / uniform attention"
    figure = attention.distances(np.array([[1.0, 3.0], [4.0, 8.0]]), uniform=6.0)
    (axis,) = figure.axes
    mean, uniform = axis.get_lines()
    np.testing.assert_array_equal(mean.get_xydata(), [[1, 2], [2, 6]])
    assert uniform.get_ydata() == [6.0, 6.0]
    np.testing.assert_array_equal(
        axis.collections[0].get_offsets(), [[1, 1], [1, 3], [2, 4], [2, 8]]
    )
    assert axis.get_ylabel() == "mean attention distance (pixels)"
