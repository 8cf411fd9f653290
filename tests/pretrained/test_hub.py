"""Weights of timm and transformers, the settings beside them, and models that aren't supported."""

import json
import shutil
import sys
import types

import numpy as np
import pytest
from conftest import GOLDEN, tiny_model
from published import CASES, assert_same, golden_model, golden_tensors
from safetensors.numpy import load_file, save_file

from vit_jax import pretrained
from vit_jax.errors import UserError
from vit_jax.pretrained import hub, weights


@pytest.fixture
def hf_folder(tmp_path):
    """A copy of the golden folder of transformers, and its config.json."""
    folder = shutil.copytree(GOLDEN / "hf_vit.hf", tmp_path / "hf")
    return folder, json.loads((folder / "config.json").read_text())


def test_settings_of_timm(tmp_path):
    case = CASES["timm_token"]
    folder = tmp_path / "timm"
    folder.mkdir()
    shutil.copy(GOLDEN / case["weights"], folder / "model.safetensors")
    config = {"architecture": "vit_base_patch16_224", "model_args": {"act_layer": "gelu_tanh"}}
    config["model_args"]["num_heads"] = 8
    config["pretrained_cfg"] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    (folder / "config.json").write_text(json.dumps(config))
    model = golden_model(case)
    with pytest.raises(UserError) as error:
        pretrained.load(folder, model)
    assert str(error.value) == (
        f"{folder} was trained with gelu 'tanh', num_heads 8, not 'exact', 4: set gelu='tanh', "
        "num_heads=8 (--config.model.gelu=tanh --config.model.num_heads=8)"
    )
    model = model.clone(gelu="tanh", num_heads=8)
    pretrained.load(folder, model, mean=(0.485, 0.456, 0.406))
    with pytest.raises(UserError, match=r'mean="\(0.485, 0.456, 0.406\)" --config.augment.std='):
        pretrained.load(folder, model, mean=(0.5,), std=(0.5,))


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
    ("settings", "view"),
    [
        ({"mean": [0.5]}, (0.875, "bicubic")),
        ({"crop_pct": 0.9, "interpolation": "bilinear"}, (0.9, "bilinear")),
        ({"crop_pct": 1.0, "crop_mode": "squash"}, ("squeeze", "bicubic")),
        ({}, (None, None)),
    ],
)
def test_preprocessing_of_timm(settings, view):
    """What is left out has timm's default; without a config.json, nothing is known."""
    path = GOLDEN / CASES["timm_token"]["weights"]
    read = hub.convert("w", hub.read_safetensors(path), settings, {}, 4)
    assert (read["eval_crop"], read["eval_method"]) == view


@pytest.mark.parametrize(
    ("settings", "view", "message"),
    [
        ({"interpolation": "lanczos"}, (0.875, "bicubic"), "interpolation is 'lanczos', which"),
        ({"crop_mode": "border"}, (0.875, "bicubic"), "crop_mode is 'border', which isn't supp"),
        ({"crop_mode": "squash"}, ("squeeze", "bicubic"), "squashed is 0.875, which isn't supp"),
    ],
)
def test_preprocessing_of_timm_that_is_not_supported(settings, view, message, caplog):
    assert (hub.timm_crop("w", settings), hub.timm_method("w", settings)) == view
    assert message in caplog.text


def test_damaged_and_incomplete_folders(hf_folder):
    folder, config = hf_folder
    model = golden_model(CASES["hf_vit"])
    expected = pretrained.load(folder, model)
    for text, message in (
        ("{", "config.json is damaged"),
        ("[1]", "config.json holds a list; it must hold an object"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            pretrained.load(folder, model)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="no config.json: give the path of the file"):
        pretrained.load(folder, model)
    (folder / "config.json").write_text(json.dumps(config))

    tensors = load_file(folder / "model.safetensors")  # in two shards
    names, files = sorted(tensors), ("model-00001-of-2.safetensors", "model-00002-of-2.safetensors")
    for file, part in zip(files, (names[:9], names[9:]), strict=True):
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: files[i >= 9] for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    assert_same(pretrained.load(folder, model), expected)
    (folder / files[0]).unlink()
    with pytest.raises(UserError, match=f"lacks {files[0]}"):
        pretrained.load(folder, model)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="found only pytorch_model.bin, a pickle"):
        pretrained.load(folder, model)


def test_hf_names_are_downloaded(monkeypatch):
    model = golden_model(CASES["hf_vit"])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "huggingface_hub", None)  # as if it weren't installed
        with pytest.raises(UserError, match="hf:google/vit needs huggingface_hub: pip install"):
            pretrained.load("hf:google/vit", model)
    downloads = []

    def snapshot_download(name, allow_patterns):
        downloads.append((name, "model*.safetensors*" in allow_patterns))
        if name == "nobody/nothing":
            raise OSError("404\nno such page")
        return str(GOLDEN / "hf_vit.hf")

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert_same(
        pretrained.load("hf:google/vit", model), pretrained.load(GOLDEN / "hf_vit.hf", model)
    )
    assert downloads == [("google/vit", True)]
    with pytest.raises(UserError, match="hf:nobody/nothing can't be downloaded: 404$"):
        pretrained.load("hf:nobody/nothing", model)


@pytest.mark.parametrize(
    ("golden", "names", "description"),
    [
        ("timm_token", ["dist_token", "head_dist.weight"], "a DeiT with a head for distillation"),
        ("timm_token", ["blocks.0.attn.relative_position_bias_table"], "a BEiT"),
        ("timm_token", ["blocks.0.attn.q_bias"], "give the folder, with config.json"),
        (
            "timm_token",
            ["patch_embed.norm.weight"],
            "no field .* explains: patch_embed.norm.weight",
        ),
        ("hf_vit", ["decoder.decoder_layers.0.output.dense.weight"], "a masked autoencoder"),
        (None, ["layer1.0.conv1.weight", "bn1.running_mean"], "a convolutional network"),
        (None, ["layers.0.blocks.0.attn.relative_position_bias_table"], "a Swin Transformer"),
        (None, ["text_model.embeddings"], "an image-and-text model"),
        (None, ["something.else"], "its parameters are something.else"),
    ],
)
def test_unsupported_models_are_recognized(golden, names, description, tmp_path):
    tensors = golden_tensors(golden) if golden else {}
    save_file(tensors | dict.fromkeys(names, np.zeros(1, np.float32)), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=description):
        weights.read(tmp_path / "w.safetensors", num_heads=4)


def test_pooling_and_positions_of_timm(tmp_path):
    tensors = golden_tensors("timm_avg_fcnorm")
    model = golden_model(CASES["timm_avg_fcnorm"])
    folder = tmp_path / "timm"
    folder.mkdir()

    def load(tensors, model=model, **config):
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return pretrained.load(folder, model, (32, 32))

    load(tensors, global_pool="avg")
    with pytest.raises(UserError, match="set pool_norm='after' "):
        load(tensors, model.clone(pool_norm="before"))
    with pytest.raises(UserError, match="pools by 'max', which isn't supported"):
        load(tensors, global_pool="avg", model_args={"global_pool": "max"})
    beside = golden_model(CASES["timm_token"], pool="gap", class_token=True, num_classes=5)
    params = load(golden_tensors("timm_token"), beside, global_pool="avg")
    assert params["cls"].shape == (1, 1, 32)
    without = {name: value for name, value in tensors.items() if name != "pos_embed"}
    with pytest.raises(UserError, match="--config.model.posemb=none"):
        load(without)
    params = load(without, model.clone(posemb="none"))
    assert "posembed_input" not in params["Transformer"]
    # The config.json of this model doesn't mention its GELU.
    with pytest.raises(UserError, match="--config.model.gelu=tanh"):
        load(tensors, architecture="vit_so400m_patch16_siglip_gap_256")


def test_git_lfs_pointers_are_recognized(tmp_path):
    """Alone, and as the file of a folder."""
    pointer = tmp_path / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1f\nsize 99\n")
    (tmp_path / "config.json").write_text("{}")
    for path in (pointer, tmp_path):
        with pytest.raises(UserError, match="is a Git LFS pointer instead of the weights: run"):
            pretrained.load(path, tiny_model())
