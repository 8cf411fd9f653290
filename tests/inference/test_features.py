"""Patch and pooled features against the model's own logits, and against what is published."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, tiny_model
from published import CASES, golden_model, random_model

from vit_jax import pretrained
from vit_jax.errors import UserError
from vit_jax.inference.features import patch_features, pooled_features
from vit_jax.models.stacking import stack_blocks


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
