"""What other codebases write: names, layouts, configs beside the weights, and other models."""

import json
import shutil
import sys
import types
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN, tiny_model
from published import CASES, assert_loads, flat_params, golden_flat, golden_model
from safetensors.numpy import load_file, save_file

from vit_jax import models, pretrained
from vit_jax.errors import UserError
from vit_jax.pretrained import weights

NEW_NAMES = {
    "encoder.layer": "layers",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def test_fields_that_a_file_implies(tmp_path):
    """A model with other ones is refused, with the override that would mend it."""
    case = CASES["hf_vit"]
    shutil.copytree(GOLDEN / case["weights"], tmp_path / "hf")
    for fields, override in (
        (dict(gelu="tanh"), "--config.model.gelu=exact"),
        (dict(layer_norm_eps=1e-6), "--config.model.layer_norm_eps=1e-12"),
    ):
        with pytest.raises(UserError, match=override):
            pretrained.load(tmp_path / "hf", golden_model(case, **fields))
    case = CASES["timm_avg_fcnorm"]
    with pytest.raises(UserError, match="--config.model.pool_norm=after"):
        pretrained.load(GOLDEN / case["weights"], golden_model(case, pool_norm="before"))


@pytest.mark.parametrize("names", ["old", "new"])
@pytest.mark.parametrize("prefix", ["vit.", ""])
def test_transformers_naming_schemes_and_the_bare_model(names, prefix, tmp_path):
    """ViTModel has no head, but a pooler: our representation layer."""
    model = golden_model(CASES["hf_vit"])
    expected = pretrained.load(GOLDEN / "hf_vit.hf", model)
    flat = {name.replace("vit.", prefix, 1): v for name, v in golden_flat("hf_vit").items()}
    if names == "new":
        for old, new in NEW_NAMES.items():
            flat = {name.replace(old, new): value for name, value in flat.items()}
        assert f"{prefix}layers.1.mlp.fc2.bias" in flat
        assert f"{prefix}layers.1.attention.o_proj.bias" in flat
    save_file(flat, tmp_path / "w.safetensors")
    loaded = pretrained.load(tmp_path / "w.safetensors", model)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)

    flat = {name: value for name, value in flat.items() if "classifier" not in name}
    rng = np.random.default_rng(0)
    pooler = {"weight": rng.normal(size=(32, 32)), "bias": rng.normal(size=32)}
    flat |= {f"{prefix}pooler.dense.{n}": v.astype(np.float32) for n, v in pooler.items()}
    flat[f"{prefix}embeddings.mask_token"] = np.zeros((1, 1, 32), np.float32)
    save_file(flat, tmp_path / "w.safetensors")
    bare = model.clone(num_classes=None, representation_size=32)
    images = np.load(GOLDEN / CASES["hf_vit"]["expected"])["images"]
    params = pretrained.load(tmp_path / "w.safetensors", bare)
    tokens = model.clone(num_classes=None).apply({"params": expected}, images)
    np.testing.assert_allclose(
        bare.apply({"params": params}, images),
        np.tanh(tokens @ pooler["weight"].T + pooler["bias"]),
        atol=1e-5,
    )


def test_timm_with_separate_projections_and_half_precision(tmp_path):
    flat = golden_flat("timm_token")
    for name in [name for name in flat if ".qkv." in name]:
        for part, rows in zip("qkv", np.split(flat[name], 3), strict=True):
            flat[name.replace("qkv", f"{part}_proj")] = rows
        del flat[name]
    save_file(flat, tmp_path / "w.safetensors")
    model = golden_model(CASES["timm_token"])
    expected = pretrained.load(GOLDEN / CASES["timm_token"]["weights"], model)
    loaded = pretrained.load(tmp_path / "w.safetensors", model)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)

    for dtype in (np.float16, ml_dtypes.bfloat16):
        save_file({n: v.astype(dtype) for n, v in flat.items()}, tmp_path / "w.safetensors")
        loaded = pretrained.load(tmp_path / "w.safetensors", model)
        rounded = jax.tree.map(lambda leaf, d=dtype: leaf.astype(d).astype(np.float32), expected)
        jax.tree.map(np.testing.assert_array_equal, loaded, rounded)


def test_timm_without_a_position_for_the_class_token(tmp_path):
    flat = golden_flat("timm_token")
    positions = flat["pos_embed"]
    flat["pos_embed"] = positions[:, 1:].copy()
    save_file(flat, tmp_path / "w.safetensors")
    model = golden_model(CASES["timm_token"])
    loaded = pretrained.load(tmp_path / "w.safetensors", model)
    table = loaded["Transformer"]["posembed_input"]["pos_embedding"]
    np.testing.assert_array_equal(table[:, 1:], positions[:, 1:])
    assert not table[:, 0].any()


def test_what_a_config_beside_the_weights_settles(tmp_path):
    """timm's and transformers' arguments: heads, GELU, epsilon, normalisation."""
    case = CASES["timm_token"]
    (tmp_path / "timm").mkdir()
    shutil.copy(GOLDEN / case["weights"], tmp_path / "timm" / "model.safetensors")
    config = {"architecture": "vit_base_patch16_224", "model_args": {"act_layer": "gelu_tanh"}}
    config["model_args"]["num_heads"] = 8
    config["pretrained_cfg"] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    model = golden_model(case)
    with pytest.raises(UserError, match="model.gelu=tanh --config.model.num_heads=8") as raised:
        pretrained.load(tmp_path / "timm", model)
    assert "with model.gelu 'tanh', model.num_heads 8, and here are 'exact', 4" in str(raised.value)
    model = model.clone(gelu="tanh", num_heads=8)
    pretrained.load(tmp_path / "timm", model, mean=(0.485, 0.456, 0.406))
    with pytest.raises(UserError, match=r'mean="\(0.485, 0.456, 0.406\)" --config.augment.std='):
        pretrained.load(tmp_path / "timm", model, mean=(0.5,), std=(0.5,))

    shutil.copytree(GOLDEN / "hf_vit.hf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for changes, match in (
        (dict(hidden_act="gelu_new"), "gelu=tanh"),
        (dict(num_attention_heads=2), "num_heads=2"),
        (dict(hidden_act="relu"), "the activation 'relu'"),
    ):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=match):
            pretrained.load(tmp_path / "hf", golden_model(CASES["hf_vit"]))
    (tmp_path / "hf" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is damaged"):
        pretrained.load(tmp_path / "hf", golden_model(CASES["hf_vit"]))


def test_hf_names_are_fetched(tmp_path, monkeypatch):
    model = golden_model(CASES["hf_vit"])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "huggingface_hub", None)  # as where it isn't installed
        with pytest.raises(UserError, match="hf:google/vit is fetched with huggingface_hub: pip"):
            pretrained.load("hf:google/vit", model)
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, "model*.safetensors*" in allow_patterns))
        if name == "nobody/nothing":
            raise OSError("404\nthe page isn't there")
        return str(GOLDEN / "hf_vit.hf")

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    jax.tree.map(
        np.testing.assert_array_equal,
        pretrained.load("hf:google/vit", model),
        pretrained.load(GOLDEN / "hf_vit.hf", model),
    )
    assert asked == [("google/vit", True)]
    with pytest.raises(UserError, match="hf:nobody/nothing can't be fetched: 404$"):
        pretrained.load("hf:nobody/nothing", model)


def test_what_another_file_looks_like(tmp_path, weights_file):
    def message(flat, model=None):
        path = weights_file(flat) if model else tmp_path / "w.safetensors"
        if model is None:
            save_file(flat, path)
        with pytest.raises(UserError) as raised:
            pretrained.load(path, model or golden_model(CASES["timm_token"]))
        return str(raised.value)

    timm, hf = golden_flat("timm_token"), golden_flat("hf_vit")
    one = np.zeros(1, np.float32)
    for flat, names, what in (
        (timm, ["dist_token", "head_dist.weight"], "a distilled DeiT"),
        (timm, ["blocks.0.ls1.gamma"], "a Vision Transformer with LayerScale"),
        (timm, ["reg_token"], "a Vision Transformer with register tokens"),
        (timm, ["norm_pre.weight"], "a Vision Transformer with a norm before its blocks"),
        (timm, ["blocks.0.gamma_1"], "a BEiT"),
        (hf, ["vit.encoder.layer.0.layer_scale1.lambda1"], "a Vision Transformer with LayerScale"),
        (hf, ["decoder.decoder_layers.0.output.dense.weight"], "a masked autoencoder"),
        ({}, ["layer1.0.conv1.weight", "bn1.running_mean"], "a convolutional network"),
        ({}, ["layers.0.blocks.0.attn.relative_position_bias_table"], "a Swin Transformer"),
        ({}, ["text_model.embeddings"], "an image-and-text model"),
        ({}, ["something.else"], "its parameters are something.else"),
    ):
        assert what in message(flat | dict.fromkeys(names, one))
    mixer = {"MixerBlock_0/token_mixing/Dense_0/kernel": one}
    assert "an MLP-Mixer" in message(mixer, tiny_model())
    text = message(flat_params(tiny_model(pool="map", num_classes=3)), models.create("B/16"))
    assert "has model.pool" not in text
    assert "it looks like a ViT of width 32, depth 2" in text
    assert "the model here is ViT-B/16; it has patch_size 8, width 32, depth 2" in text
    assert "pool 'map'" in text
    assert "MAPHead_0/probe (1, 1, 32) there, missing here" in text
    assert "encoderblock_{2,3,4,5,6,7,8,9,10,11}/LayerNorm_0/bias missing there" in text


def test_models_of_timm_that_there_are_not(tmp_path):
    flat = golden_flat("timm_avg_fcnorm")
    model = golden_model(CASES["timm_avg_fcnorm"])

    def load(flat, model=model, **config):
        (tmp_path / "m").mkdir(exist_ok=True)
        save_file(flat, tmp_path / "m" / "model.safetensors")
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
        return pretrained.load(tmp_path / "m", model, (32, 32))

    load(flat, global_pool="avg")
    with pytest.raises(UserError, match="pools by 'max': there's none here"):
        load(flat, global_pool="avg", model_args={"global_pool": "max"})
    token = golden_flat("timm_token")
    with pytest.raises(UserError, match="pools by 'avg' beside a class token"):
        load(token, global_pool="avg")
    without = {name: value for name, value in flat.items() if name != "pos_embed"}
    with pytest.raises(UserError, match="--config.model.posemb=none"):
        load(without)
    params = load(without, model.clone(posemb="none"))
    assert "posembed_input" not in params["Transformer"]
    siglip = {"architecture": "vit_so400m_patch16_siglip_gap_256"}  # its config tells no GELU
    with pytest.raises(UserError, match="--config.model.gelu=tanh"):
        load(flat, **siglip)


def test_what_googles_files_always_mean(weights_file):
    path = weights_file(flat_params(tiny_model()))
    with pytest.raises(UserError, match="gelu=tanh --config.model.layer_norm_eps=1e-06"):
        pretrained.load(path, tiny_model(gelu="exact", layer_norm_eps=1e-12))
    with pytest.raises(UserError, match="augment.mean="):
        pretrained.load(path, tiny_model(), mean=(0.485, 0.456, 0.406))


def test_npz_files_of_other_kinds(tmp_path, weights_file):
    ours = flat_params(tiny_model())
    half = {name: value.astype(ml_dtypes.bfloat16) for name, value in ours.items()}
    rounded = {name: value.astype(np.float32) for name, value in half.items()}
    assert_loads(weights_file(half), tiny_model(), rounded)
    beside = {f"opt/target/{name}": value for name, value in ours.items()}
    beside |= {f"opt/state/{name}": value for name, value in ours.items()}
    assert_loads(weights_file(beside | {"extra/step": np.zeros(())}), tiny_model(), ours)
    combined = dict(ours)
    combined["pos_embedding"] = combined.pop(pretrained.POSEMB)  # with the class token's row
    assert_loads(weights_file(combined), tiny_model(), ours)

    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    with pytest.raises(UserError, match="a PyTorch pickle isn't read; save it as .safetensors"):
        pretrained.load(tmp_path / "pytorch_model.bin", tiny_model())
    np.savez_compressed(tmp_path / "w.npz", **ours)
    content = bytearray((tmp_path / "w.npz").read_bytes())
    content[400:500] = bytes(100)
    (tmp_path / "w.npz").write_bytes(content)
    with pytest.raises(UserError, match="w.npz is damaged"):
        pretrained.load(tmp_path / "w.npz", tiny_model())


def test_folders_of_other_kinds(tmp_path):
    model = golden_model(CASES["hf_vit"])
    folder = shutil.copytree(GOLDEN / "hf_vit.hf", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    for text, match in (
        ("[1]", "holds a list, not an object"),
        (json.dumps(config | {"image_size": "224"}), "the image_size beside it is '224'"),
        (json.dumps(config | {"layer_norm_eps": "1e-12"}), "the layer_norm_eps beside it"),
        (json.dumps(config | {"id2label": ["a"]}), "the id2label beside it"),
        (json.dumps(config | {"model_type": "deit", "architectures": ["DeiTModel"]}), "DeiTModel"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=match):
            pretrained.load(folder, model)
    gaps = {"id2label": {"0": "a", "2": "c"}}
    (folder / "config.json").write_text(json.dumps(config | gaps))
    processor = {"do_center_crop": True, "crop_size": 224, "size": {"shortest_edge": 256}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    found = weights.read(folder)
    assert found.class_names == ("a", "class 1", "c")
    assert found.keep == 0.875
    expected = pretrained.load(folder, model)

    flat = load_file(folder / "model.safetensors")  # in two shards
    names, files = sorted(flat), ("model-00001-of-2.safetensors", "model-00002-of-2.safetensors")
    for file, part in zip(files, (names[:9], names[9:]), strict=True):
        save_file({name: flat[name] for name in part}, folder / file)
    index = {"weight_map": {name: files[i >= 9] for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(folder, model), expected)
    (folder / files[0]).unlink()
    with pytest.raises(UserError, match=f"lacks {files[0]}"):
        pretrained.load(folder, model)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="found a pytorch_model.bin, a pickle, which isn't read"):
        pretrained.load(folder, model)
