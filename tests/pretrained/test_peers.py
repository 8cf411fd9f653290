"""Models that timm and transformers save, with their logits; skipped if they aren't installed.

Recorded logits, which need neither, are in test_loading.py and test_export.py.
"""

import numpy as np
import pytest
from published import compute_logits
from safetensors.numpy import save_file

from vit_jax import Classifier, models, pretrained
from vit_jax.pretrained import weights

SMALL = dict(img_size=64, depth=2, num_classes=5)


def randomize(model):
    """Draws every parameter of a PyTorch model at random."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
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
