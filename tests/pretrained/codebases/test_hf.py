"""Models of transformers: names and layouts of their parameters, and their settings."""

import json
import shutil

import numpy as np
import pytest
from conftest import GOLDEN, tiny_model
from published import (
    CASES,
    assert_same,
    compute_logits,
    golden_model,
    golden_tensors,
)
from safetensors.numpy import save_file

from vit_jax import pretrained
from vit_jax.errors import UserError
from vit_jax.pretrained import weights
from vit_jax.pretrained.codebases.hf import writing

NEW_HF_NAMES = {
    "encoder.layer": "layers",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


@pytest.fixture
def hf_folder(tmp_path):
    """A copy of the golden folder of transformers, and its config.json."""
    folder = shutil.copytree(GOLDEN / "hf_vit.hf", tmp_path / "hf")
    return folder, json.loads((folder / "config.json").read_text())


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


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        (dict(), dict(gelu="tanh"), "--config.model.gelu=exact"),
        (dict(), dict(layer_norm_eps=1e-6), "--config.model.layer_norm_eps=1e-12"),
        (dict(hidden_act="gelu_new"), dict(), "set gelu='tanh' "),
        (dict(num_attention_heads=2), dict(), "set num_heads=2 "),
        (dict(hidden_act="relu"), dict(), "the activation 'relu'; only 'gelu', 'quick"),
        (dict(image_size="224"), dict(), "image_size is '224'; it must be a number of pixels"),
        (dict(layer_norm_eps="1e-12"), dict(), "layer_norm_eps is '1e-12'; it must be a number"),
        (dict(image_size=64), dict(), "17 positions, but .* 64x64 pixels, which are 8x8 patches"),
        (dict(num_hidden_layers=12), dict(), "says num_hidden_layers 12, but the tensors have 2"),
        (dict(id2label=["a"]), dict(), "id2label is .*; it must be an object"),
        (dict(model_type="deit", architectures=["DeiTModel"]), dict(), "says DeiTModel"),
    ],
)
def test_settings_of_transformers(changes, fields, message, hf_folder):
    """A model with other fields is refused, with the fix; so are impossible settings."""
    folder, config = hf_folder
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        pretrained.load(folder, golden_model(CASES["hf_vit"], **fields))


def test_class_names_and_crop_of_transformers(hf_folder):
    folder, config = hf_folder
    assert weights.read(folder).class_names is None  # LABEL_0, LABEL_1, ...
    names = {"id2label": {"0": "a", "2": "c"}}
    (folder / "config.json").write_text(json.dumps(config | names))
    processor = {"do_center_crop": True, "crop_size": 224, "size": {"shortest_edge": 256}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    stored = weights.read(folder)
    assert stored.class_names == ("a", "class 1", "c")
    assert (stored.eval_crop, stored.eval_method) == (0.875, "bilinear")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"size": {"a": "b"}}))
    with pytest.raises(UserError, match="both must be in pixels, above 0"):
        weights.read(folder)


@pytest.mark.parametrize(
    ("processor", "view"),
    [
        ({"size": 224, "resample": 3}, ("squeeze", "bicubic")),
        ({"size": {"height": 224, "width": 224}}, ("squeeze", "bilinear")),
        ({"size": {"shortest_edge": 224}, "resample": 1}, (1.0, "bilinear")),
    ],
)
def test_preprocessing_of_transformers(processor, view, hf_folder, caplog):
    """What is left out has the default of ViTImageProcessor; Lanczos (1) is reported."""
    folder, _ = hf_folder
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    stored = weights.read(folder)
    assert (stored.eval_crop, stored.eval_method) == view
    assert ("resample is 1, which isn't supported" in caplog.text) == ("shortest" in str(processor))


@pytest.mark.parametrize(
    ("mlp_layer", "width", "mlp_dim", "ratio"),
    [("mlp", 16, 32, 2), ("swiglu", 16, 16, 1), ("swiglu", 16, 24, 2), ("swiglu", 1536, 4096, 4)],
)
def test_ratio_of_dinov2_gives_the_size_in_transformers(mlp_layer, width, mlp_dim, ratio):
    """The last row is the giant's, as published."""
    model = tiny_model(mlp_layer=mlp_layer, width=width, mlp_dim=mlp_dim)
    assert writing.mlp_ratio(model) == ratio
