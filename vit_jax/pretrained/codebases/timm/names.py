"""Names and layouts of the parameters of timm's `VisionTransformer` and `Eva`."""

import dataclasses

import numpy as np

from vit_jax.paths import (
    CLS,
    EMBEDDING,
    ENCODER_NORM,
    HEAD,
    KEY,
    KEY_NORM,
    LAYER_SCALE_0,
    LAYER_SCALE_1,
    MAP_HEAD,
    MASK_TOKEN,
    MLP_GATE,
    MLP_IN,
    MLP_NORM,
    MLP_OUT,
    NORM_0,
    NORM_1,
    OUT,
    POSEMB,
    PRE_NORM,
    PROBE,
    QUERY,
    QUERY_NORM,
    REG,
    ROPE,
    VALUE,
    block_parameter,
    in_block,
    num_blocks,
)
from vit_jax.pretrained.codebases.state_dict import (
    Flat,
    StateDictNames,
    add_key_biases,
    from_state_dict,
    to_state_dict,
)

NAMES = StateDictNames(
    codebase="timm",
    tensors={
        "cls_token": CLS,
        "reg_token": REG,
        "pos_embed": POSEMB,
        "attn_pool.latent": PROBE,
        "blocks.{}.ls1.gamma": f"{LAYER_SCALE_0}/gamma",
        "blocks.{}.ls2.gamma": f"{LAYER_SCALE_1}/gamma",
    },
    modules={
        "patch_embed.proj": EMBEDDING,
        "norm_pre": PRE_NORM,
        "norm": ENCODER_NORM,
        "fc_norm": ENCODER_NORM,
        "attn_pool.q": f"{MAP_HEAD}/{QUERY}",
        "attn_pool.kv": (f"{MAP_HEAD}/{KEY}", f"{MAP_HEAD}/{VALUE}"),
        "attn_pool.proj": f"{MAP_HEAD}/{OUT}",
        "attn_pool.norm": f"{MAP_HEAD}/{NORM_0}",
        "attn_pool.mlp.fc1": f"{MAP_HEAD}/{MLP_IN}",
        "attn_pool.mlp.fc2": f"{MAP_HEAD}/{MLP_OUT}",
        "head": HEAD,
    },
    block="blocks.{}",
    block_modules={
        "norm1": NORM_0,
        "norm2": NORM_1,
        "attn.qkv": (QUERY, KEY, VALUE),
        "attn.q_norm": QUERY_NORM,
        "attn.k_norm": KEY_NORM,
        "attn.proj": OUT,
        "mlp.fc1": MLP_IN,
        "mlp.norm": MLP_NORM,
        "mlp.fc2": MLP_OUT,
    },
)

# A SwiGLU whose gate and values are one layer.
SWIGLU = dataclasses.replace(
    NAMES, block_modules=NAMES.block_modules | {"mlp.fc1": (MLP_GATE, MLP_IN)}
)

# Names that only reading needs: of files with separate projections, of EVA's, and of the token for
# masked patches in DINOv2's own files, which timm drops.
OTHER_MODULES = {
    "attn.q_proj": QUERY,
    "attn.k_proj": KEY,
    "attn.v_proj": VALUE,
    "mlp.fc1_g": MLP_GATE,
    "mlp.fc1_x": MLP_IN,
}
OTHER_TENSORS = {
    "mask_token": MASK_TOKEN,
    "blocks.{}.gamma_1": f"{LAYER_SCALE_0}/gamma",
    "blocks.{}.gamma_2": f"{LAYER_SCALE_1}/gamma",
    "blocks.{}.attn.q_bias": f"{QUERY}/bias",
    "blocks.{}.attn.v_bias": f"{VALUE}/bias",
}


def from_timm(stored: Flat, num_heads: int, rope: str | None = None) -> Flat:
    """Converts parameters of timm's `VisionTransformer` or `Eva`.

    Args:
        rope: which channels rotary positions turn together; see `rope_order`. None: they don't.
    """
    names = SWIGLU if has_packed_swiglu(stored) else NAMES
    names = dataclasses.replace(
        names,
        tensors=names.tensors | OTHER_TENSORS,
        block_modules=names.block_modules | OTHER_MODULES,
    )
    stored = dict(stored)
    frequencies = stored.pop("rope.freqs", None)  # (2, depth, H, d / 2), of columns and rows
    params = from_state_dict(stored, names, num_heads)
    for i in range(num_blocks(params)):
        for name in (in_block(i, f"{part}/bias") for part in (QUERY, VALUE)):
            if name in params and params[name].ndim == 1:
                params[name] = params[name].reshape(num_heads, -1)
        if frequencies is not None:
            params[in_block(i, ROPE)] = frequencies[::-1, i]
    add_key_biases(params)
    return reorder_rope(params, rope) if rope else params


def to_timm(params: Flat, model) -> Flat:
    """Converts to timm's `VisionTransformer`; after pooling its last norm is called `fc_norm`.

    Raises:
        UserError: a parameter that timm has no name for.
    """
    names = SWIGLU if model.mlp_layer == "swiglu" else NAMES
    unused = "norm" if model.pool_norm == "after" else "fc_norm"
    modules = {name: target for name, target in names.modules.items() if name != unused}
    return to_state_dict(params, dataclasses.replace(names, modules=modules))


def has_swiglu(stored: Flat) -> bool:
    """Whether a model of timm has gated MLPs."""
    return "blocks.0.mlp.fc1_g.weight" in stored or has_packed_swiglu(stored)


def has_packed_swiglu(stored: Flat) -> bool:
    """Whether the gate and the values of a model of timm are one layer."""
    hidden, outputs = (stored.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    is_complete = hidden is not None and outputs is not None and outputs.ndim == 2
    return is_complete and len(hidden) == 2 * outputs.shape[1]


def rope_order(head_dim: int, layout: str) -> np.ndarray:
    """Returns the channels of a head of timm in this code's order.

    Args:
        layout: "half": as here, channels i and i + d / 2 turn together, the first half of the pairs
            with the row; "pairs": channels 2 i and 2 i + 1 do; "pairs_xy": the same, but the first
            half of the pairs turn with the column; "pairs_mixed": all turn with both.
    """
    if layout == "half":
        return np.arange(head_dim)
    pairs = np.arange(head_dim // 2)
    if layout == "pairs_xy":
        pairs = np.roll(pairs, -(head_dim // 4))
    return np.concatenate([2 * pairs, 2 * pairs + 1])


def reorder_rope(params: Flat, layout: str) -> Flat:
    """Reorders the channels of queries and keys, and their norms, by `rope_order`."""
    reordered = dict(params)
    parts = tuple(f"{part}/" for part in (QUERY, KEY, QUERY_NORM, KEY_NORM))
    for name, value in params.items():
        in_encoder = not name.startswith(MAP_HEAD) and block_parameter(name)
        if in_encoder and in_encoder.startswith(parts):
            reordered[name] = value[..., rope_order(value.shape[-1], layout)]
    return reordered
