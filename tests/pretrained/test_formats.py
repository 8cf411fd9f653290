"""Names and layouts in the files of other codebases, of all ages."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN, tiny_model
from published import (
    CASES,
    assert_loads,
    assert_same,
    compute_logits,
    flat_params,
    flatten,
    golden_model,
    golden_tensors,
    random_model,
    random_params,
)
from safetensors.numpy import save_file

from vit_jax import pretrained
from vit_jax.errors import UserError
from vit_jax.paths import POSEMB, stack_blocks

NEW_HF_NAMES = {
    "encoder.layer": "layers",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/"])
@pytest.mark.parametrize("numbering", ["old", "new"])
def test_flax_files_of_all_ages(prefix, numbering, weights_file):
    model = tiny_model(representation_size=16)
    params = flat_params(model)
    stored = dict(params)
    if numbering == "old":
        old = {"LayerNorm_1": "LayerNorm_2", "MlpBlock_0": "MlpBlock_3"}
        old["MultiHeadDotProductAttention_0"] = "MultiHeadDotProductAttention_1"
        for new, name in old.items():
            stored = {key.replace(new, name): value for key, value in stored.items()}
    stored = {prefix + name: value for name, value in stored.items()}
    if prefix:  # what a training state has beside the parameters
        stored |= {f"opt/state/{name}": np.zeros(1) for name in params}
        stored |= {"extra/step": np.zeros(())}
    assert_loads(weights_file(stored), model, params)


@pytest.mark.parametrize("has_module", [False, True])
def test_big_vision_with_map_head_stacked_blocks_and_positions_at_the_top(has_module, weights_file):
    model = tiny_model(pool="map", scan=True)
    params = flat_params(model)
    stored = dict(params)
    stored["pos_embedding"] = stored.pop(POSEMB)
    if not has_module:
        stored = {name.replace("MAPHead_0/", "", 1): v for name, v in stored.items()}
    assert_loads(weights_file(stored), model, params)


def test_stacked_and_unstacked_blocks_load_into_either_model(weights_file):
    unstacked_model, stacked_model = tiny_model(), tiny_model(scan=True)
    params = random_params(unstacked_model)
    unstacked, stacked = flatten(params), flatten(stack_blocks(params))
    for stored in (unstacked, stacked):
        path = weights_file(stored)
        assert_loads(path, unstacked_model, unstacked)
        assert_loads(path, stacked_model, stacked)


def test_positions_at_the_top_with_a_row_for_the_class_token(weights_file):
    params = flat_params(tiny_model())
    stored = dict(params)
    stored["pos_embedding"] = stored.pop(POSEMB)
    path = weights_file(stored)
    with pytest.raises(UserError, match="has 17 positions .*, which is no square: give grid="):
        pretrained.load(path, tiny_model(), (32, 32))
    assert_same(flatten(pretrained.load(path, tiny_model(), (32, 32), grid=(4, 4))), params)


def test_big_vision_positions_that_are_no_square(weights_file):
    model = tiny_model()
    params = flat_params(model, (32, 64))
    params[POSEMB][:, 0] = 0.0
    stored = {name: value for name, value in params.items() if name != POSEMB}
    path = weights_file(stored | {"pos_embedding": params[POSEMB][:, 1:]})
    assert_same(flatten(pretrained.load(path, model, (32, 64))), params)
    assert_same(flatten(pretrained.load(path, model, grid=(4, 8))), params)


@pytest.mark.parametrize(("names", "prefix"), [("old", ""), ("new", "vit."), ("new", "")])
def test_both_naming_schemes_of_transformers(names, prefix, tmp_path):
    model = golden_model(CASES["hf_vit"])
    expected = pretrained.load(GOLDEN / "hf_vit.hf", model)
    tensors = {n.replace("vit.", prefix, 1): v for n, v in golden_tensors("hf_vit").items()}
    if names == "new":
        for old, new in NEW_HF_NAMES.items():
            tensors = {name.replace(old, new): value for name, value in tensors.items()}
        assert f"{prefix}layers.1.mlp.fc2.bias" in tensors
        assert f"{prefix}layers.1.attention.o_proj.bias" in tensors
    save_file(tensors, tmp_path / "w.safetensors")
    assert_same(pretrained.load(tmp_path / "w.safetensors", model), expected)


def test_pooler_of_transformers_is_a_representation_layer(tmp_path):
    """ViTModel has no head but a pooler, and a mask token that is dropped."""
    model = golden_model(CASES["hf_vit"])
    head = pretrained.load(GOLDEN / "hf_vit.hf", model)
    tensors = {n: v for n, v in golden_tensors("hf_vit").items() if "classifier" not in n}
    rng = np.random.default_rng(0)
    pooler = {"weight": rng.normal(size=(32, 32)), "bias": rng.normal(size=32)}
    tensors |= {f"vit.pooler.dense.{n}": v.astype(np.float32) for n, v in pooler.items()}
    tensors["vit.embeddings.mask_token"] = np.zeros((1, 1, 32), np.float32)
    save_file(tensors, tmp_path / "w.safetensors")
    bare = model.clone(num_classes=None, representation_size=32)
    images = np.load(GOLDEN / CASES["hf_vit"]["expected"])["images"]
    params = pretrained.load(tmp_path / "w.safetensors", bare)
    pooled = compute_logits(model.clone(num_classes=None), head, images)
    np.testing.assert_allclose(
        compute_logits(bare, params, images),
        np.tanh(pooled @ pooler["weight"].T + pooler["bias"]),
        atol=1e-5,
    )


def test_timm_with_separate_projections_and_half_precision(tmp_path):
    tensors = golden_tensors("timm_token")
    for name in [name for name in tensors if ".qkv." in name]:
        for part, rows in zip("qkv", np.split(tensors[name], 3), strict=True):
            tensors[name.replace("qkv", f"{part}_proj")] = rows
        del tensors[name]
    path = tmp_path / "w.safetensors"
    save_file(tensors, path)
    model = golden_model(CASES["timm_token"])
    expected = pretrained.load(GOLDEN / CASES["timm_token"]["weights"], model)
    assert_same(pretrained.load(path, model), expected)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        save_file({name: value.astype(dtype) for name, value in tensors.items()}, path)
        rounded = jax.tree.map(lambda leaf, d=dtype: leaf.astype(d).astype(np.float32), expected)
        assert_same(pretrained.load(path, model), rounded)


def test_timm_without_a_position_for_the_class_token(tmp_path):
    """Its config.json, or the grid, tells that there is none."""
    model, tensors = golden_model(CASES["timm_token"]), golden_tensors("timm_token")
    positions = tensors["pos_embed"]
    tensors["pos_embed"] = positions[:, 1:].copy()
    save_file(tensors, tmp_path / "model.safetensors")

    def check(path, **arguments):
        params = pretrained.load(path, model, **arguments)
        table = params["Transformer"]["posembed_input"]["pos_embedding"]
        np.testing.assert_array_equal(table[:, 1:], positions[:, 1:])
        assert not table[:, 0].any()

    check(tmp_path / "model.safetensors", grid=(4, 4))
    with pytest.raises(UserError, match="has 15 positions of patches .* give grid="):
        pretrained.load(tmp_path / "model.safetensors", model, (32, 32))
    for config in (  # what timm's config.json has for other models, and for FlexiViT
        {"model_args": {"no_embed_class": True}},
        {"pretrained_cfg": {"input_size": [3, 32, 32]}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        check(tmp_path)


def test_number_of_timm_positions_that_happens_to_be_a_square(tmp_path):
    """A grid of 4 x 6 and a row for the class token: 25 positions."""
    model, params, _ = random_model((32, 48))
    path = tmp_path / "w.safetensors"
    pretrained.save(params, path, "timm", model=model, image_size=(32, 48))
    assert_same(pretrained.load(path, model.clone(gelu="exact"), (32, 48)), params)
    for size in ((40, 40), (64, 64)):
        with pytest.raises(UserError, match="has 24 positions of patches and doesn't"):
            pretrained.load(path, model.clone(gelu="exact"), size)
