"""Names and layouts of the parameters of transformers' Vision Transformers."""

import dataclasses

import numpy as np

from vit_jax.paths import (
    CLS,
    EMBEDDING,
    ENCODER_NORM,
    HEAD,
    KEY,
    LAYER_SCALE_0,
    LAYER_SCALE_1,
    MAP_HEAD,
    MASK_TOKEN,
    MLP_GATE,
    MLP_IN,
    MLP_OUT,
    NORM_0,
    NORM_1,
    OUT,
    POSEMB,
    PRE_LOGITS,
    PRE_NORM,
    PROBE,
    QUERY,
    REG,
    VALUE,
)
from vit_jax.pretrained.codebases.state_dict import (
    Flat,
    StateDictNames,
    add_key_biases,
    from_state_dict,
    to_state_dict,
)

MASK = "embeddings.mask_token"

VIT = StateDictNames(
    codebase="transformers",
    tensors={"embeddings.cls_token": CLS, "embeddings.position_embeddings": POSEMB},
    modules={
        "embeddings.patch_embeddings.projection": EMBEDDING,
        "layernorm": ENCODER_NORM,
        "pooler.dense": PRE_LOGITS,
        "classifier": HEAD,
    },
    block="encoder.layer.{}",
    block_modules={
        "layernorm_before": NORM_0,
        "layernorm_after": NORM_1,
        "attention.attention.query": QUERY,
        "attention.attention.key": KEY,
        "attention.attention.value": VALUE,
        "attention.output.dense": OUT,
        "intermediate.dense": MLP_IN,
        "output.dense": MLP_OUT,
    },
)
DEIT = dataclasses.replace(VIT, tensors=VIT.tensors | {"embeddings.distillation_token": REG})
DINOV2 = dataclasses.replace(
    VIT,
    tensors=VIT.tensors
    | {
        "embeddings.register_tokens": REG,
        MASK: MASK_TOKEN,
        "encoder.layer.{}.layer_scale1.lambda1": f"{LAYER_SCALE_0}/gamma",
        "encoder.layer.{}.layer_scale2.lambda1": f"{LAYER_SCALE_1}/gamma",
    },
    block_modules={
        "norm1": NORM_0,
        "norm2": NORM_1,
        "attention.attention.query": QUERY,
        "attention.attention.key": KEY,
        "attention.attention.value": VALUE,
        "attention.output.dense": OUT,
        "mlp.fc1": MLP_IN,
        "mlp.fc2": MLP_OUT,
    },
    num_axes={MASK: 2},
)
SWIGLU_PARTS = {"mlp.weights_in": (MLP_GATE, MLP_IN), "mlp.weights_out": MLP_OUT}
DINOV2_SWIGLU = dataclasses.replace(
    DINOV2,
    block_modules={k: v for k, v in DINOV2.block_modules.items() if "mlp" not in k} | SWIGLU_PARTS,
)
CLIP = StateDictNames(
    codebase="transformers",
    tensors={
        "embeddings.class_embedding": CLS,
        "embeddings.position_embedding.weight": POSEMB,
        "head.probe": PROBE,
    },
    modules={
        "embeddings.patch_embedding": EMBEDDING,
        "pre_layrnorm": PRE_NORM,
        "post_layernorm": ENCODER_NORM,
        "head.attention.in_proj": tuple(f"{MAP_HEAD}/{part}" for part in (QUERY, KEY, VALUE)),
        "head.attention.out_proj": f"{MAP_HEAD}/{OUT}",
        "head.layernorm": f"{MAP_HEAD}/{NORM_0}",
        "head.mlp.fc1": f"{MAP_HEAD}/{MLP_IN}",
        "head.mlp.fc2": f"{MAP_HEAD}/{MLP_OUT}",
    },
    block="encoder.layers.{}",
    block_modules={
        "layer_norm1": NORM_0,
        "layer_norm2": NORM_1,
        "self_attn.q_proj": QUERY,
        "self_attn.k_proj": KEY,
        "self_attn.v_proj": VALUE,
        "self_attn.out_proj": OUT,
        "mlp.fc1": MLP_IN,
        "mlp.fc2": MLP_OUT,
    },
    num_axes={"embeddings.class_embedding": 1, "embeddings.position_embedding.weight": 2},
)
DINOV3 = StateDictNames(
    codebase="transformers",
    tensors={
        "embeddings.cls_token": CLS,
        "embeddings.register_tokens": REG,
        MASK: MASK_TOKEN,
        "layer.{}.layer_scale1.lambda1": f"{LAYER_SCALE_0}/gamma",
        "layer.{}.layer_scale2.lambda1": f"{LAYER_SCALE_1}/gamma",
    },
    modules={"embeddings.patch_embeddings": EMBEDDING, "norm": ENCODER_NORM, "classifier": HEAD},
    block="layer.{}",
    block_modules={
        "norm1": NORM_0,
        "norm2": NORM_1,
        "attention.q_proj": QUERY,
        "attention.k_proj": KEY,
        "attention.v_proj": VALUE,
        "attention.o_proj": OUT,
        "mlp.gate_proj": MLP_GATE,
        "mlp.up_proj": MLP_IN,
        "mlp.down_proj": MLP_OUT,
    },
)
# The names that transformers 5 has in memory; its files still have the older ones.
VIT_IN_MEMORY = dataclasses.replace(
    VIT,
    block="layers.{}",
    block_modules={
        "layernorm_before": NORM_0,
        "layernorm_after": NORM_1,
        "attention.q_proj": QUERY,
        "attention.k_proj": KEY,
        "attention.v_proj": VALUE,
        "attention.o_proj": OUT,
        "mlp.fc1": MLP_IN,
        "mlp.fc2": MLP_OUT,
    },
)

# transformers' model_type -> the names in its files.
NAMES = {
    **dict.fromkeys(("vit", "vit_mae", "ijepa"), VIT),
    "deit": DEIT,
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), DINOV2),
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model"), CLIP),
    "dinov3_vit": DINOV3,
}
# The prefix of the encoder's tensors in a model with a head, if it isn't the model_type.
PREFIXES = {
    "vit_mae": "vit.",
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model"), "vision_model."),
}
# Models whose files have parts that aren't of the image's encoder.
WITH_OTHER_PARTS = ("vit_mae", "clip_vision_model", "siglip_vision_model")
# Models that always have a token for masked patches.
ALWAYS_MASKED = ("dinov2_with_registers", "dinov3_vit")


def from_hf(stored: Flat, num_heads: int, model_type: str) -> Flat:
    """Converts parameters of transformers.

    Dropped are the decoder of a masked autoencoder, all that isn't of the image in an
    image-and-text model, and the token for masked patches of other models than DINOv2 and DINOv3.

    Args:
        model_type: a key of NAMES.
    """
    prefix = PREFIXES.get(model_type, f"{model_type}.")
    if any(name.startswith(f"{prefix}embeddings.") for name in stored):
        kept = (prefix, "classifier.") if model_type in WITH_OTHER_PARTS else ""
        stored = {n.removeprefix(prefix): v for n, v in stored.items() if n.startswith(kept)}
    stored = {name.replace("in_proj_", "in_proj."): value for name, value in stored.items()}
    stored.pop("embeddings.position_ids", None)
    names = NAMES[model_type]
    if MASK not in names.tensors:
        stored.pop(MASK, None)
    if any(name.startswith("layers.") for name in stored):
        names = VIT_IN_MEMORY
    elif "encoder.layer.0.mlp.weights_in.weight" in stored:
        names = DINOV2_SWIGLU
    params = from_state_dict(stored, names, num_heads)
    if model_type == "dinov3_vit":
        add_key_biases(params)
    return params


def to_hf(params: Flat, model_type: str) -> Flat:
    """Converts to a model of transformers; a missing token for masked patches becomes zeros.

    Args:
        model_type: a key of NAMES.

    Raises:
        UserError: a parameter that transformers has no name for.
    """
    if model_type in ALWAYS_MASKED and MASK_TOKEN not in params:
        params = params | {MASK_TOKEN: np.zeros_like(params[CLS])}
    names = NAMES[model_type]
    if names is DINOV2 and any(MLP_GATE in name for name in params):
        names = DINOV2_SWIGLU
    if names is DINOV3 and not has_key_biases(params):
        params = {n: value for n, value in params.items() if not n.endswith(f"{KEY}/bias")}
    has_head = any(name.startswith(f"{HEAD}/") for name in params)
    prefix = f"{model_type}." if has_head else ""
    return {
        name if name.startswith("classifier.") else prefix + name.replace("in_proj.", "in_proj_"): v
        for name, v in to_state_dict(params, names).items()
    }


def has_mask_token(model_type: str) -> bool:
    """Whether a model of transformers may have a token for masked patches."""
    return MASK in NAMES[model_type].tensors


def has_key_biases(params: Flat) -> bool:
    """Whether a key has a bias that isn't zero."""
    return any(name.endswith(f"{KEY}/bias") and value.any() for name, value in params.items())
