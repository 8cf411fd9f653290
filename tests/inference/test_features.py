"""Patch and pooled features against the model's own logits, and against what is published."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, tiny_model
from published import CASES, golden_model, random_model

import vit_jax
from vit_jax import pretrained
from vit_jax.errors import UserError
from vit_jax.inference.features import patch_features, pooled_features, quarter_layers
from vit_jax.paths import stack_blocks


def features(model, params, images):
    """Returns patch and pooled features, computed by one compiled function."""

    @jax.jit
    def compute(params, images):
        return patch_features(model, params, images), pooled_features(model, params, images)

    return compute(params, images)


def head(params, pooled):
    return np.asarray(pooled) @ params["head"]["kernel"] + params["head"]["bias"]


def layer_norm(x, params, epsilon):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * params["scale"] + params["bias"]


@pytest.mark.parametrize("name", ["google_gap", "timm_avg_fcnorm"])
def test_mean_of_patch_features_gives_the_published_logits(name):
    """The last LayerNorm comes before the mean in google_gap, after it in timm_avg_fcnorm."""
    case = CASES[name]
    model = golden_model(case)
    expected = np.load(GOLDEN / case["expected"])
    params = pretrained.load(GOLDEN / case["weights"], model)
    patches, pooled = features(model, params, expected["images"])
    mean = np.asarray(patches).mean(axis=(1, 2))
    if model.pool_norm == "after":
        mean = layer_norm(mean, params["Transformer"]["encoder_norm"], model.layer_norm_eps)
    np.testing.assert_allclose(pooled, mean, atol=1e-5)
    np.testing.assert_allclose(head(params, mean), expected["logits"], atol=2e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_patch_features_are_the_last_block_s_output_after_the_last_norm(scan):
    """Without the class token, in rows and columns of a grid that is no square."""
    model, params, images = random_model((16, 24), scan=scan)
    patches, pooled = features(model, params, images)
    assert patches.shape == (2, 2, 3, 32)

    apply = jax.jit(lambda params: model.apply({"params": params}, images, capture=("blocks",)))
    logits, captured = apply(params)
    norm = params["Transformer"]["encoder_norm"]
    tokens = layer_norm(np.asarray(captured["blocks"][-1]), norm, model.layer_norm_eps)
    np.testing.assert_allclose(patches.reshape(2, 6, 32), tokens[:, 1:], atol=1e-5)
    np.testing.assert_allclose(pooled, tokens[:, 0], atol=1e-5)
    np.testing.assert_allclose(head(params, pooled), logits, atol=1e-4)
    if not scan:
        stacked = features(model.clone(scan=True), stack_blocks(params), images)
        np.testing.assert_allclose(stacked[0], patches, atol=1e-5)


def test_features_are_float32_in_a_bfloat16_model():
    model, params, images = random_model(dtype=jnp.bfloat16, depth=1, representation_size=16)
    patches, pooled = features(model, params, images)
    assert patches.dtype == pooled.dtype == np.float32
    assert pooled.shape == (2, 16)


def test_model_without_pooling_has_no_pooled_features():
    with pytest.raises(UserError, match="model.pool is 'none'"):
        pooled_features(tiny_model(pool="none"), {}, np.zeros((1, 32, 32, 3)))


STEM = dict(num_layers=(), width_factor=0.5)  # four pixels per feature


@pytest.mark.parametrize(
    ("size", "fields", "grid"),
    [
        ((16, 24), dict(pool="cls", remat="full"), (2, 3)),
        ((16, 24), dict(pool="map", posemb="sincos2d", patch_size=(4, 8)), (4, 3)),
        ((32, 32), dict(pool="gap", resnet=STEM, patch_size=2, posemb="none"), (4, 4)),
    ],
)
def test_features_are_those_of_a_model_that_ends_at_the_layer(size, fields, grid):
    """After the last LayerNorm, a shorter model's patches; the same from stacked blocks."""
    model, params, images = random_model(size, depth=3, **fields)
    norm = params["Transformer"]["encoder_norm"]
    maps = jax.jit(lambda params: vit_jax.features(model, params, images, (3, 1)))(params)
    for layer, of_layer in zip((3, 1), maps, strict=True):
        assert of_layer.shape == (2, *grid, 32)
        shorter = jax.jit(functools.partial(patch_features, model.clone(depth=layer)))
        normed = layer_norm(np.asarray(of_layer), norm, model.layer_norm_eps)
        encoder = dict(params["Transformer"])
        for i in range(layer, 3):
            del encoder[f"encoderblock_{i}"]
        expected = shorter(params | {"Transformer": encoder}, images)
        np.testing.assert_allclose(normed, expected, atol=1e-5)
    stacked, scanned = stack_blocks(params), model.clone(scan=True)
    of_scan = jax.jit(lambda params: vit_jax.features(scanned, params, images, (3, 1)))(stacked)
    np.testing.assert_allclose(of_scan, maps, atol=1e-5)


def test_features_are_float32_and_by_default_of_the_depth_s_quarters():
    model, params, images = random_model(dtype=jnp.bfloat16, depth=5)
    default = jax.jit(lambda params: vit_jax.features(model, params, images))(params)
    chosen = jax.jit(lambda params: vit_jax.features(model, params, images, [2, 3, 4, 5]))(params)
    assert [of_layer.dtype for of_layer in default] == [np.float32] * 4
    np.testing.assert_array_equal(default, chosen)
    assert [quarter_layers(depth) for depth in (1, 2, 12)] == [(1,), (1, 2), (3, 6, 9, 12)]


def test_layers_that_a_model_does_not_have():
    for layers, message in (
        ((0,), "a layer is 0; it must be a whole number >= 1 and <= 2"),
        ((1, 3), "a layer is 3"),
        ((-1,), "a layer is -1"),
        ((True,), "a layer is True"),
        ((1.0,), "a layer is 1.0"),
        ((), r"layers is \(\); it must be numbers of blocks, such as \(1, 2\)"),
        (2, "layers is 2; it must be"),
        ("12", "layers is '12'; it must be"),
    ):
        with pytest.raises(UserError, match=message):
            vit_jax.features(tiny_model(), {}, np.zeros((1, 32, 32, 3)), layers)
