"""Fields inferred from the shapes of parameters, and models that aren't supported."""

import numpy as np
import pytest
from published import golden_tensors
from safetensors.numpy import save_file

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.pretrained import weights
from vit_jax.pretrained.codebases import architecture


@pytest.mark.parametrize(
    "variant",
    ["S/32", "R+Ti/16", "R26+S/32", pytest.param("R50+B/16", marks=pytest.mark.slow)],
)
def test_fields_are_inferred_from_shapes(variant):
    model = models.create(variant)
    fields = architecture.infer_fields(architecture.param_shapes(model, (64, 64, 3)))
    assert architecture.describe(fields) == f"ViT-{variant}"
    assert fields == {name: value for name, value in model.__dict__.items() if name in fields}


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
