"""The Vision Transformers that people use today: recorded outputs, in and out again, and by name.

tests/golden/modern holds what timm and transformers compute; test_peers.py compares with them where
they are installed.
"""

import json
import shutil
import sys
import types

import jax
import numpy as np
import pytest
from conftest import tiny_model
from golden import record
from published import (
    MODERN,
    REFUSED,
    SAVED,
    assert_computes,
    assert_same,
    compute_logits,
    load_expected,
    random_params,
    save_again,
)
from published import MODERN_CASES as CASES
from safetensors.numpy import load_file, save_file

from vit_jax import Classifier, pretrained
from vit_jax.errors import UserError
from vit_jax.paths import POSEMB
from vit_jax.pretrained import convert, loading, weights


@pytest.mark.parametrize("name", CASES)
def test_recorded_outputs(name):
    """Every output that the source gave: logits or features, and all tokens."""
    expected = load_expected(name)
    model, params = pretrained.open(MODERN / CASES[name]["weights"])
    assert_computes(model, params, expected.pop("images"), expected)


def test_recorded_cases_are_those_of_their_script():
    for name, (architecture, settings, size) in record.CASES.items():
        row = CASES[name]
        assert row["architecture"] == architecture
        assert settings.items() <= row["kwargs"].items()
        assert row["image_size"] == record.one_or_pair(size)
        recorded = np.load(MODERN / row["expected"], allow_pickle=False).files
        assert ("hires_images" in recorded) == (name in record.RESIZED)


@pytest.mark.parametrize("name", record.RESIZED)
def test_recorded_outputs_at_another_size(name):
    """For which the sources, with register tokens, resize their positions: see resize.py."""
    expected = load_expected(name, "hires_")
    images = expected.pop("images")
    source = MODERN / CASES[name]["weights"]
    assert_computes(*pretrained.open(source, images.shape[1:3], resize="torch"), images, expected)


@pytest.mark.parametrize("name", SAVED)
def test_out_again_is_the_same_file(name, tmp_path):
    """Names and bits are the source's, a token for masked patches included."""
    model, params = save_again(name, tmp_path)
    theirs = load_file(MODERN / CASES[name]["weights"] / "model.safetensors")
    ours = load_file(tmp_path / "model.safetensors")
    assert set(ours) == set(theirs)
    for key in theirs:
        np.testing.assert_array_equal(theirs[key], ours[key], err_msg=key)
    same_model, same_params = pretrained.open(tmp_path)
    assert same_model == model
    assert_same(same_params, params)
    config = json.loads((tmp_path / "config.json").read_text())
    golden = json.loads((MODERN / CASES[name]["weights"] / "config.json").read_text())
    keys = ["architectures", "model_type", "mlp_ratio", "num_register_tokens"]
    if model.mlp_layer == "mlp":  # a DINOv2 with a gated MLP doesn't read it
        keys.append("hidden_act")
    for key in keys:
        assert config.get(key) == golden.get(key)


@pytest.mark.parametrize("name", REFUSED)
def test_a_format_without_a_field_is_named(name, tmp_path):
    kind = CASES[name]["weights"].rpartition(".")[2]
    message = f"The model has {REFUSED[name]}; .*in the format '{kind}' it must be "
    with pytest.raises(UserError, match=message):
        save_again(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_token_for_masked_patches(tmp_path, tiny_config):
    """It is beside the model's parameters, and stays in what can have it."""
    source = MODERN / "hf_dinov2.hf"
    token = load_file(source / "model.safetensors")["dinov2.embeddings.mask_token"]
    model, params = pretrained.open(source)
    np.testing.assert_array_equal(params["mask_token"], token[None])  # (1, D) -> (1, 1, D)
    plain = pretrained.load(source, model)
    assert_same(plain, {name: value for name, value in params.items() if name != "mask_token"})
    assert "mask_token" not in Classifier.load(source).params

    assert convert.main([str(source), str(tmp_path / "hf"), "--format=hf"]) == 0
    pretrained.save(plain, tmp_path / "plain", "hf", model=model)
    for name, has_token in (("hf", True), ("plain", False)):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["use_mask_token"] == has_token
        saved = load_file(tmp_path / name / "model.safetensors")
        assert ("dinov2.embeddings.mask_token" in saved) == has_token
    bad = params | {"mask_token": np.zeros((1, 1, 5), np.float32)}
    with pytest.raises(UserError, match=r"mask_token is \(1, 1, 5\), not \(1, 1, 48\)"):
        pretrained.save(bad, tmp_path / "bad", "hf", model=model)

    tiny_config.update(init_from=str(source))
    assert "mask_token" not in loading.from_config(tiny_config, model, (32, 32, 3))
    tiny_config.objective = "masked_patches"
    assert_same(loading.from_config(tiny_config, model, (32, 32, 3)), params)


def test_the_token_for_masked_patches_has_no_place_in_timm(tmp_path, caplog):
    """DINOv2's own files have timm's names, and this token, which timm drops."""
    caplog.set_level("INFO", "vit_jax")
    folder = shutil.copytree(MODERN / "timm_dinov2.timm", tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    width = tensors["cls_token"].shape[-1]
    token = np.arange(width, dtype=np.float32)[None]
    save_file(tensors | {"mask_token": token}, folder / "model.safetensors")
    model, params = pretrained.open(folder)
    np.testing.assert_array_equal(params["mask_token"], token[None])
    size = CASES["timm_dinov2"]["image_size"]
    pretrained.save(params, tmp_path / "timm", "timm", model=model, image_size=size)
    assert set(load_file(tmp_path / "timm" / "model.safetensors")) == set(tensors)
    messages = [record.getMessage() for record in caplog.records]
    assert [message for message in messages if "mask_token isn't written" in message] == [
        f"{tmp_path / 'timm'}: mask_token isn't written: the format has no place for it"
    ]


@pytest.mark.parametrize(
    "fields",
    [
        dict(pool="cls", mlp_layer="swiglu", reg_tokens=2, num_classes=None),
        dict(pool="cls_gap", num_classes=5, gelu="exact", init_values=1e-5),
        dict(pool="none", num_classes=None, gelu="exact"),
        dict(posemb="none", rope="axial", rope_grid="centered", reg_tokens=4, num_classes=None),
    ],
)
def test_models_of_our_own_as_those_of_transformers(fields, tmp_path):
    """DINOv2 with registers and SwiGLU, its classifier, I-JEPA, DINOv3: out, and in again."""
    has_layer_scale = fields["pool"] != "none" if "pool" in fields else True
    fields = {"init_values": 1e-5 if has_layer_scale else None, **fields}
    model = tiny_model(**fields)
    params = random_params(model)
    for block in [params["Transformer"][f"encoderblock_{i}"] for i in range(2)]:
        if model.rope != "none":  # DINOv3's keys have no biases
            block["MultiHeadDotProductAttention_0"]["key"]["bias"][:] = 0
    pretrained.save(params, tmp_path, "hf", model=model, image_size=32)
    same, again = pretrained.open(tmp_path, 32)
    if model.reg_tokens:  # transformers' always have this token
        assert not again.pop("mask_token").any()
    assert_same(again, params)
    images = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    expected = compute_logits(model, params, images)
    np.testing.assert_array_equal(compute_logits(same, again, images), expected)


def test_a_dinov2_whose_mlp_transformers_cannot_have(tmp_path):
    for fields, sizes in (
        (dict(mlp_dim=50), "32 or 64"),
        (dict(mlp_dim=60, mlp_layer="swiglu"), ".*64"),
    ):
        model = tiny_model(init_values=0.1, num_classes=None, **fields)
        with pytest.raises(UserError, match=f"in the format .hf. DINOv2.s must be {sizes}$"):
            pretrained.save(random_params(model), tmp_path, "hf", model=model, image_size=32)


def test_fields_of_training_are_the_caller_s(tmp_path):
    source = MODERN / CASES["timm_qk_norm"]["weights"]
    plain, params = pretrained.open(source)
    model, stacked = pretrained.open(source, 48, scan=True)
    assert model == plain.clone(scan=True)
    assert stacked["Transformer"]["encoderblock"]["LayerNorm_0"]["scale"].shape == (3, 48)
    table = stacked["Transformer"]["posembed_input"]["pos_embedding"]
    assert table.shape == (1, 37, 48)
    assert Classifier.load(source).model == plain
    with pytest.raises(UserError, match="num_heads is 3, but .* has 4 heads: leave it out"):
        pretrained.open(source, num_heads=3)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_the_image_half_of_an_image_and_text_model(prefix, tmp_path):
    """As on the hub: a nested config that leaves out defaults, beside a text model."""
    source = MODERN / "hf_clip.hf"
    tensors = load_file(source / "model.safetensors")
    tensors = {f"vision_model.{name}": value for name, value in tensors.items()}
    tensors |= {"text_model.embeddings.token_embedding.weight": np.zeros((3, 8), np.float32)}
    tensors |= {"logit_scale": np.zeros(1, np.float32)}
    tensors |= {"vision_model.embeddings.position_ids": np.arange(17)[None]}
    save_file(tensors, tmp_path / "model.safetensors")
    vision = {"num_attention_heads": 4, "hidden_size": 48, "image_size": 32}
    config = {"model_type": "clip", "architectures": ["CLIPModel"], "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, params = pretrained.open(tmp_path)
    same, expected = pretrained.open(source)
    assert model == same
    assert_same(params, expected)


def test_weights_by_name(monkeypatch):
    source = MODERN / "timm_dinov2_reg4.timm"
    hub = types.SimpleNamespace(snapshot_download=lambda name, allow_patterns: str(source))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    model, params = pretrained.open("hf:timm/vit_small_patch14_reg4_dinov2.lvd142m")
    same, expected = pretrained.open(source)
    assert (model.reg_tokens, model.no_embed_class, model.num_classes) == (4, True, None)
    assert model == same
    assert_same(params, expected)


def test_a_model_without_the_file_s_parts_is_told_to_set_them_all():
    source = MODERN / "timm_dinov2_reg4.timm"
    model, _ = pretrained.open(source)
    plain = tiny_model(width=48, depth=3, num_heads=4, mlp_dim=192, patch_size=7, num_classes=None)
    with pytest.raises(UserError) as error:
        pretrained.load(source, plain)
    assert "set reg_tokens=4, init_values=1e-05, gelu='exact' (--config.model.reg" in str(
        error.value
    )
    assert "no_embed_class" not in str(error.value)  # which is adapted
    adapted = plain.clone(reg_tokens=4, init_values=0.1, gelu="exact")
    params = pretrained.load(source, adapted)
    images = np.random.default_rng(0).normal(size=(1, 28, 28, 3)).astype(np.float32)
    expected = compute_logits(model, pretrained.open(source)[1], images)
    np.testing.assert_allclose(compute_logits(adapted, params, images), expected, atol=1e-5)


def positions(params):
    return params["Transformer"]["posembed_input"]["pos_embedding"]


def test_positions_of_tokens_before_the_patches_are_moved_into_the_tokens(weights_file):
    """A model whose positions are only for patches computes what one with more rows does."""
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    stored_model = tiny_model(reg_tokens=2, embed_reg=True)
    stored_params = random_params(stored_model)
    flat = {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree.leaves_with_path(stored_params)
    }
    stored = weights.Weights(path="w", params=flat, prefix_rows=(3,))
    expected = compute_logits(stored_model, stored_params, images)
    for fields in (dict(no_embed_class=True), dict(embed_reg=False)):
        model = stored_model.clone(**{"embed_reg": False, **fields})
        params = pretrained.load(stored, model)
        assert positions(params).shape[1] == 16 + model.num_prefix_positions
        np.testing.assert_allclose(compute_logits(model, params, images), expected, atol=1e-5)
    assert flat[POSEMB].shape[1] == 19  # the file's own are unchanged


def test_positions_are_resized_as_asked(tmp_path):
    save_again("timm_dinov2", tmp_path)
    google, torch = (
        positions(pretrained.open(tmp_path, 42, resize=resize)[1]) for resize in ("google", "torch")
    )
    assert np.abs(google - torch).max() > 1e-3
    np.testing.assert_array_equal(google[:, 0], torch[:, 0])
    with pytest.raises(UserError, match=r"init_from_resize\) is 'bilinear'; it must be 'google'"):
        pretrained.open(tmp_path, 42, resize="bilinear")


def test_a_run_asks_for_the_way_positions_are_resized(tiny_config):
    tiny_config.init_from_resize = "cubic"
    with pytest.raises(UserError, match="config.init_from_resize is 'cubic'; it must be 'google'"):
        pretrained.check(tiny_config)
    source = MODERN / "timm_dinov2.timm"
    model, _ = pretrained.open(source)
    tiny_config.update(init_from=str(source), init_from_resize="torch")
    params = loading.from_config(tiny_config, model, (42, 42, 3))
    assert_same(params, pretrained.open(source, 42, resize="torch")[1])


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("timm_deit3", dict(architecture="vit_base_patch16_rpn_224"), "normalizes the branches'"),
        ("timm_deit3", dict(architecture="vit_pe_core_base_patch16_224"), "rotary positions of an"),
        (
            "timm_deit3",
            dict(model_args=dict(num_heads=4, scale_attn_norm=True)),
            "scale_attn_norm=T",
        ),
        (
            "timm_swiglu",
            dict(model_args=dict(act_layer="gelu")),
            "gated MLPs have 'gelu'; only 'si",
        ),
        ("timm_deit3", dict(global_pool="avgmax"), "pools by 'avgmax', which isn't supported"),
        ("hf_siglip", dict(model_type="siglip2_vision_model"), "its config.json says Siglip"),
        ("hf_clip", dict(hidden_act="swish"), "has the activation 'swish'"),
        ("hf_dinov2", dict(model_type="videomae"), "its config.json says Dinov2ForImageClass"),
    ],
)
def test_unknown_architectures_and_settings_are_refused(case, changes, message, tmp_path):
    folder = shutil.copytree(MODERN / CASES[case]["weights"], tmp_path / "w")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message) as raised:
        pretrained.open(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("case", "names", "message"),
    [
        (
            "timm_deit3",
            ["blocks.{}.attn.norm.weight"],
            r"explains: blocks\.\*\.attn\.norm\.weight$",
        ),
        ("timm_dinov2", ["patch_embed.norm.weight"], "explains: patch_embed.norm.weight$"),
        ("hf_dinov2", ["dinov2.encoder.layer.{}.gate"], r"encoder\.layer\.\*\.gate$"),
        ("hf_clip", ["visual_projection.weight"], "explains: visual_projection.weight$"),
        ("hf_deit", ["distillation_classifier.weight"], "a DeiT with a head for distillation"),
    ],
)
def test_parts_that_no_field_explains_are_named(case, names, message, tmp_path):
    folder = shutil.copytree(MODERN / CASES[case]["weights"], tmp_path / "w")
    tensors = load_file(folder / "model.safetensors")
    added = [name.format(i) for name in names for i in range(3)]
    added = dict.fromkeys(added, np.ones((4, 4), np.float32)[:, 0 if "norm" in names[0] else ...])
    save_file(tensors | {k: v.copy() for k, v in added.items()}, folder / "model.safetensors")
    with pytest.raises(UserError, match=message) as raised:
        pretrained.open(folder)
    assert "\n" not in str(raised.value)


def test_a_file_without_its_last_norm_is_not_taken_for_a_post_norm_model(tmp_path):
    tensors = load_file(MODERN / "timm_deit3.timm" / "model.safetensors")
    tensors = {name: value for name, value in tensors.items() if not name.startswith("norm.")}
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="it has no norm after its blocks"):
        pretrained.open(tmp_path / "w.safetensors", num_heads=4)


def test_biases_that_only_some_layers_lack_are_missing(tmp_path):
    tensors = load_file(MODERN / "timm_deit3.timm" / "model.safetensors")
    del tensors["blocks.1.attn.qkv.bias"]
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="lacks .*encoderblock_1/.*: the file is incomplete"):
        pretrained.open(tmp_path / "w.safetensors", num_heads=4)
