"""Models that timm and transformers save, with their logits; skipped if they aren't installed.

Recorded logits, which need neither, are in test_loading.py and test_export.py.
"""

import re

import jax
import numpy as np
import pytest
from published import MODERN, MODERN_CASES, compute_logits, save_again
from safetensors.numpy import load_file, save_file

from vit_jax import Classifier, models, pretrained
from vit_jax.errors import UserError
from vit_jax.pretrained import convert, weights
from vit_jax.pretrained.codebases import architecture
from vit_jax.pretrained.codebases.timm import reading

SMALL = dict(img_size=64, depth=2, num_classes=5)


def randomize(model):
    """Draws every parameter of a PyTorch model at random."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("rope.freqs"):  # which are random already, at their scale
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def compute_both(peer_model, classifier):
    """Returns the logits of a PyTorch model and of a classifier for the same images."""
    import torch

    size = (2, *classifier.image_size, classifier.channels)
    images = np.random.default_rng(0).normal(size=size).astype(np.float32)
    with torch.no_grad():
        outputs = peer_model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    outputs = getattr(outputs, "logits", outputs).numpy()
    return outputs, compute_logits(classifier.model, classifier.params, images)


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
    timm = pytest.importorskip("timm")
    model = randomize(timm.create_model(name, **arguments))
    timm.models.save_for_hf(model, tmp_path, model_args=arguments, safe_serialization=True)
    theirs, ours = compute_both(model, Classifier.load(tmp_path))
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("names", ["saved", "in memory"])
@pytest.mark.parametrize("size", [64, (32, 64)])
def test_logits_of_models_that_transformers_saves(names, size, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=size,
        patch_size=16,
        num_labels=5,
        hidden_act="gelu_new",
        layer_norm_eps=1e-3,
    )
    model = randomize(transformers.ViTForImageClassification(config))
    model.save_pretrained(tmp_path)
    if names == "in memory":
        state = {name: value.numpy() for name, value in model.state_dict().items()}
        save_file(state, tmp_path / "model.safetensors")
    theirs, ours = compute_both(model, Classifier.load(tmp_path))
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_pooled_output_of_transformers(tmp_path):
    """ViTModel has no head; its pooler is a representation layer."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=64
    )
    bare = randomize(transformers.ViTModel(config))
    bare.save_pretrained(tmp_path)
    stored = weights.read(tmp_path)
    model = models.create("B/16", **stored.model_fields)
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    ours = compute_logits(model, pretrained.load(stored, model), images)
    import torch

    with torch.no_grad():
        theirs = bare(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).pooler_output
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5, rtol=1e-5)


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


def outputs_of_both(peer_model, folder, run_peer):
    """Opens a saved model; returns a list of pairs of the same output, theirs and ours.

    Args:
        run_peer: (PyTorch model, images) -> its output, and all tokens.
    """
    import torch

    model, params = pretrained.open(folder)
    size = pretrained.image_size_of(weights.read(folder), model)
    images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = run_peer(peer_model, torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))

    @jax.jit
    def run(params):
        return model.apply({"params": params}, images, capture=("tokens",))

    outputs, captured = run(params)
    return zip([t.numpy() for t in theirs], (outputs, captured["tokens"]), strict=True)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_of_architectures_of_timm(name, tmp_path):
    timm = pytest.importorskip("timm")
    arguments = ARCHITECTURES[name]
    model = randomize(timm.create_model(name, **arguments))
    timm.models.save_for_hf(model, tmp_path, model_args=arguments, safe_serialization=True)

    def run(model, images):
        return model(images), model.forward_features(images)

    for theirs, ours in outputs_of_both(model, tmp_path, run):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


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


SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32)
SIZES |= dict(patch_size=8)
WITH_MLP = SIZES | dict(intermediate_size=96)
TEXT = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
TEXT |= dict(vocab_size=50, bos_token_id=0, eos_token_id=1)
PAIR = dict(vision_config=WITH_MLP, text_config=TEXT)
MAE = WITH_MLP | dict(mask_ratio=0.0, decoder_hidden_size=32, decoder_num_hidden_layers=1)
MAE |= dict(decoder_num_attention_heads=2, decoder_intermediate_size=32)


@pytest.mark.parametrize("name", MODERN_CASES)
def test_other_codebases_load_what_is_saved(name, tmp_path):
    """From our file, timm and transformers compute what they recorded from theirs."""
    package = {"timm": "timm", "hf": "transformers"}[name.split("_")[0]]
    library = pytest.importorskip(package)
    import torch

    save_again(name, tmp_path)
    expected = np.load(MODERN / MODERN_CASES[name]["expected"], allow_pickle=False)
    images = torch.from_numpy(expected["images"].transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        if package == "timm":
            model = library.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
            outputs = {"tokens": model.forward_features(images)}
            outputs["features" if "features" in expected else "logits"] = model(images)
        else:
            cls = getattr(library, MODERN_CASES[name]["architecture"])
            outputs = cls.from_pretrained(tmp_path).eval()(images)
    for key in set(expected.files) - {"images"}:
        np.testing.assert_allclose(outputs[key], expected[key], atol=1e-5, rtol=1e-5)


def run_mae(model, images):
    """Without noise, the patches keep their order."""
    import torch

    tokens = model.vit(images, noise=torch.arange(16.0).repeat(2, 1)).last_hidden_state
    return tokens, tokens


def run_classifier(model, images):
    hidden = model(images, output_hidden_states=True).hidden_states[-1]
    return model(images).logits, model.base_model.layernorm(hidden)


def run_model(model, images):
    outputs = getattr(model, "vision_model", model)(images)
    pooled = outputs.pooler_output
    return outputs.last_hidden_state if pooled is None else pooled, outputs.last_hidden_state


@pytest.mark.parametrize(
    ("name", "config", "settings", "run"),
    [
        ("Dinov2Model", "Dinov2Config", SIZES | dict(use_swiglu_ffn=True), run_model),
        ("Dinov2ForImageClassification", "Dinov2Config", SIZES, run_classifier),
        (
            "Dinov2WithRegistersForImageClassification",
            "Dinov2WithRegistersConfig",
            SIZES,
            run_classifier,
        ),
        ("DINOv3ViTModel", "DINOv3ViTConfig", WITH_MLP | dict(num_register_tokens=4), run_model),
        (
            "DINOv3ViTModel",
            "DINOv3ViTConfig",
            WITH_MLP | dict(use_gated_mlp=True, hidden_act="silu"),
            run_model,
        ),
        ("IJepaModel", "IJepaConfig", WITH_MLP, run_model),
        ("IJepaForImageClassification", "IJepaConfig", WITH_MLP, run_classifier),
        ("ViTMAEForPreTraining", "ViTMAEConfig", MAE, run_mae),
        ("CLIPModel", "CLIPConfig", PAIR, run_model),
        ("SiglipModel", "SiglipConfig", PAIR, run_model),
        ("DeiTModel", "DeiTConfig", WITH_MLP, run_model),
    ],
)
def test_outputs_of_models_of_transformers(name, config, settings, run, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, config)(**settings)
    model = randomize(getattr(transformers, name)(config))
    model.save_pretrained(tmp_path)
    for theirs, ours in outputs_of_both(model, tmp_path, run):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3_of_transformers_is_saved_again(gated, tmp_path):
    """With the same tensors; transformers loads it."""
    transformers = pytest.importorskip("transformers")
    activation = "silu" if gated else "gelu"
    settings = WITH_MLP | dict(use_gated_mlp=gated, hidden_act=activation, num_register_tokens=4)
    model = randomize(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**settings)))
    model.save_pretrained(tmp_path / "theirs")
    ours, params = pretrained.open(tmp_path / "theirs")
    folder = tmp_path / "ours"
    pretrained.save(params, folder, "hf", model=ours, image_size=32)
    saved, stored = (load_file(tmp_path / n / "model.safetensors") for n in ("ours", "theirs"))
    assert set(saved) == set(stored)
    for name, value in saved.items():
        np.testing.assert_array_equal(value, stored[name])
    again = transformers.DINOv3ViTModel.from_pretrained(folder).eval()
    for theirs, mine in outputs_of_both(again, folder, run_model):
        np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=1e-5)
