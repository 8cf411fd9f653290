"""Models that timm and transformers save, with their outputs; skipped if they aren't installed.

Recorded outputs, which need neither, are in test_modern.py, test_loading.py and test_export.py.
"""

import re

import numpy as np
import peer_models
import pytest
from published import (
    MODERN_CASES,
    SAVED,
    assert_computes,
    compute_logits,
    load_expected,
    save_again,
)
from safetensors.numpy import load_file, save_file

from vit_jax import Classifier, models, pretrained
from vit_jax.errors import UserError
from vit_jax.pretrained import convert, weights
from vit_jax.pretrained.codebases import architecture
from vit_jax.pretrained.codebases.timm import reading

SMALL = dict(img_size=64, depth=2, num_classes=5)
SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32)
SIZES |= dict(patch_size=8)
WITH_MLP = SIZES | dict(intermediate_size=96)
TEXT = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
TEXT |= dict(vocab_size=50, bos_token_id=0, eos_token_id=1)
PAIR = dict(vision_config=WITH_MLP, text_config=TEXT)
MAE = WITH_MLP | dict(mask_ratio=0.0, decoder_hidden_size=32, decoder_num_hidden_layers=1)
MAE |= dict(decoder_num_attention_heads=2, decoder_intermediate_size=32)


def compute_both(peer_model, classifier):
    """Returns the logits of another library's model and of a classifier for the same images."""
    images = random_images(classifier.image_size, classifier.channels)
    theirs = peer_models.compute(peer_model, images)["logits"]
    return theirs, compute_logits(classifier.model, classifier.params, images)


def random_images(size, channels=3):
    return np.random.default_rng(0).normal(size=(2, *size, channels)).astype(np.float32)


def assert_same_outputs(peer_model, folder):
    """Asserts that what is saved in a folder computes what another library's model does."""
    model, params = pretrained.open(folder)
    images = random_images(pretrained.image_size_of(weights.read(folder), model))
    assert_computes(model, params, images, peer_models.compute(peer_model, images))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", SMALL),
        ("vit_tiny_patch16_224", SMALL | dict(in_chans=1, patch_size=8, act_layer="gelu_tanh")),
        ("vit_tiny_patch16_224", SMALL | dict(no_embed_class=True)),
        ("vit_tiny_patch16_224", SMALL | dict(class_token=False, global_pool="avg")),
        (
            "vit_tiny_patch16_224",
            SMALL | dict(class_token=False, global_pool="avg", fc_norm=False, pos_embed="none"),
        ),
        ("vit_base_patch16_siglip_224", SMALL),
        ("vit_base_patch32_siglip_256", SMALL),
        ("flexivit_small", dict(depth=2, num_classes=5)),
    ],
)
def test_logits_of_models_that_timm_saves(name, arguments, tmp_path):
    pytest.importorskip("timm")
    model = peer_models.create_timm(name, arguments)
    peer_models.save_timm(model, tmp_path, arguments)
    theirs, ours = compute_both(model, Classifier.load(tmp_path))
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("names", ["saved", "in memory"])
@pytest.mark.parametrize("size", [64, (32, 64)])
def test_logits_of_models_that_transformers_saves(names, size, tmp_path):
    pytest.importorskip("transformers")
    settings = WITH_MLP | dict(
        image_size=size, patch_size=16, num_labels=5, hidden_act="gelu_new", layer_norm_eps=1e-3
    )
    model = peer_models.create_hf("ViTForImageClassification", settings)
    model.save_pretrained(tmp_path)
    if names == "in memory":
        state = {name: value.numpy() for name, value in model.state_dict().items()}
        save_file(state, tmp_path / "model.safetensors")
    theirs, ours = compute_both(model, Classifier.load(tmp_path))
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_pooled_output_of_transformers(tmp_path):
    """ViTModel has no head; its pooler is a representation layer."""
    pytest.importorskip("transformers")
    peer_model = peer_models.create_hf("ViTModel", SIZES)
    peer_model.save_pretrained(tmp_path)
    stored = weights.read(tmp_path)
    model = models.create("B/16", **stored.model_fields)
    images = random_images((32, 32))
    ours = compute_logits(model, pretrained.load(stored, model), images)
    theirs = peer_models.compute(peer_model, images)["pooler_output"]
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


SMALLER = SMALL | dict(depth=1)
HEADLESS = dict(img_size=64, depth=1, num_classes=0)
# Architectures of timm, with arguments that make them small. All but the last are published.
ARCHITECTURES = {
    "deit3_small_patch16_224": SMALLER,
    "vit_giant_patch14_reg4_dinov2": HEADLESS | dict(img_size=56),
    "vit_base_patch32_clip_quickgelu_224": HEADLESS,
    "vit_base_patch16_siglip_gap_224": SMALLER,
    "vit_medium_patch16_gap_256": SMALLER,  # without biases of queries, keys and values
    "vit_so150m_patch16_reg4_map_256": SMALLER,  # positions for registers, attention pooling
    "eva_large_patch14_196": SMALLER | dict(img_size=56),
    "eva02_tiny_patch14_224": SMALL | dict(img_size=(56, 84)),
    "eva02_base_patch14_448": SMALLER | dict(img_size=(56, 84), embed_dim=192, num_heads=3),
    "vit_medium_patch16_rope_reg1_gap_256": SMALLER,
    "vit_small_patch16_rope_224": SMALL | dict(img_size=(64, 96)),
    "vit_small_patch16_rope_mixed_224": SMALL | dict(img_size=(64, 96)),
    "vit_small_patch16_rope_mixed_ape_224": SMALLER,
    "vit_small_patch16_dinov3": HEADLESS | dict(img_size=(64, 96)),
    "vit_small_plus_patch16_dinov3_qkvb": SMALLER | dict(global_pool="token"),
    "test_vit4": SMALLER,  # RMSNorm
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_of_architectures_of_timm(name, tmp_path):
    pytest.importorskip("timm")
    arguments = ARCHITECTURES[name]
    model = peer_models.create_timm(name, arguments)
    peer_models.save_timm(model, tmp_path, arguments)
    assert_same_outputs(model, tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beit3_base_patch16_224", "explains: blocks.*attn.norm.bias, blocks.*attn.norm.weight$"),
        ("aimv2_large_patch14_224", "explains: patch_embed.norm.weight$"),
        ("vit_pe_core_tiny_patch16_384", "vit_pe_core_tiny_patch16_384 has rotary positions of an"),
        ("vit_base_patch16_rpn_224", "normalizes the branches' outputs"),
        ("vit_dwee_patch16_reg1_gap_256", "explains: .*attn.sub_norm.weight"),
        ("deit_small_distilled_patch16_224", "a DeiT with a head for distillation"),
        ("vit_intern300m_patch14_448", "it has no norm after its blocks"),
        ("eva02_base_patch16_clip_224", "explains: .*attn.norm.bias"),
        ("beit_base_patch16_224", "a BEiT"),
    ],
)
def test_other_architectures_of_timm_are_refused(name, message, tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, depth=1, num_classes=2)
    timm.models.save_for_hf(model, tmp_path, model_args={"depth": 1}, safe_serialization=True)
    with pytest.raises(UserError, match=message):
        pretrained.open(tmp_path)


@pytest.mark.slow
def test_names_of_timm_stand_for_what_timm_builds():
    """Of every listed architecture: heads, epsilon, activation, rows of positions, rotations."""
    timm = pytest.importorskip("timm")
    import torch

    activations = {"GELU": "exact", "QuickGELU": "quick", "GELUTanh": "tanh"}
    listed = (row["weights"] for row in convert.published())
    names = {re.split(r"[/.]", name)[1] for name in listed if name.startswith("hf:timm/")}
    for name in sorted(names):
        with torch.device("meta"):
            model = timm.create_model(name)
        fields, block = reading.fields_of_name(name), model.blocks[0]
        num_heads = fields.get("num_heads") or architecture.published_num_heads(model.embed_dim)
        assert num_heads == block.attn.num_heads, name
        assert fields.get("layer_norm_eps", 1e-6) == block.norm1.eps, name
        activation = activations.get(type(block.mlp.act).__name__)
        assert activation in (None, fields.get("gelu", "exact")), name
        if model.pos_embed is not None and model.num_prefix_tokens:
            assert fields.get("no_embed_class", False) == model.no_embed_class, name
        rope = getattr(model, "rope", None)
        assert (rope is not None) == ("rope" in fields), name
        if rope is not None:
            assert fields["rope_temperature"] == rope.temperature, name


@pytest.mark.parametrize("name", SAVED)
def test_other_codebases_load_what_is_saved(name, tmp_path):
    """From our file, timm and transformers compute what they recorded from theirs."""
    package = {"timm": "timm", "hf": "transformers"}[name.split("_")[0]]
    library = pytest.importorskip(package)
    save_again(name, tmp_path)
    if package == "timm":
        model = library.create_model(f"local-dir:{tmp_path}", pretrained=True)
    else:
        model = getattr(library, MODERN_CASES[name]["architecture"]).from_pretrained(tmp_path)
    for prefix in ("", "hires_"):
        if expected := load_expected(name, prefix):
            outputs = peer_models.compute(model.eval(), expected.pop("images"))
            for key, value in expected.items():
                np.testing.assert_allclose(outputs[key], value, atol=1e-5, rtol=1e-5, err_msg=key)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Dinov2Model", SIZES | dict(use_swiglu_ffn=True)),
        ("Dinov2ForImageClassification", SIZES),
        ("Dinov2WithRegistersForImageClassification", SIZES),
        ("DINOv3ViTModel", WITH_MLP | dict(num_register_tokens=4)),
        ("DINOv3ViTModel", WITH_MLP | dict(use_gated_mlp=True, hidden_act="silu")),
        ("IJepaModel", WITH_MLP),
        ("IJepaForImageClassification", WITH_MLP),
        ("ViTMAEForPreTraining", MAE),
        ("CLIPModel", PAIR),
        ("SiglipModel", PAIR),
        ("DeiTModel", WITH_MLP),
    ],
)
def test_outputs_of_models_of_transformers(name, settings, tmp_path):
    pytest.importorskip("transformers")
    model = peer_models.create_hf(name, settings)
    model.save_pretrained(tmp_path)
    assert_same_outputs(model, tmp_path)


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3_of_transformers_is_saved_again(gated, tmp_path):
    """With the same tensors; transformers loads it."""
    transformers = pytest.importorskip("transformers")
    activation = "silu" if gated else "gelu"
    settings = WITH_MLP | dict(use_gated_mlp=gated, hidden_act=activation, num_register_tokens=4)
    model = peer_models.create_hf("DINOv3ViTModel", settings)
    model.save_pretrained(tmp_path / "theirs")
    ours, params = pretrained.open(tmp_path / "theirs")
    folder = tmp_path / "ours"
    pretrained.save(params, folder, "hf", model=ours, image_size=32)
    saved, stored = (load_file(tmp_path / n / "model.safetensors") for n in ("ours", "theirs"))
    assert set(saved) == set(stored)
    for name, value in saved.items():
        np.testing.assert_array_equal(value, stored[name])
    assert_same_outputs(transformers.DINOv3ViTModel.from_pretrained(folder).eval(), folder)
