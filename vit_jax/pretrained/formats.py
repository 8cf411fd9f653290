"""Converts parameters between other codebases' names and layouts and this one's.

Parameters are flat dicts, name -> array. This code's have the names in `vit_jax/paths.py`, with
unstacked blocks. D: width, H: heads, d: D / H.
"""

import collections
import dataclasses
import re

import numpy as np

from vit_jax.errors import UserError
from vit_jax.paths import (
    ATTENTION,
    CLS,
    EMBEDDING,
    ENCODER_NORM,
    HEAD,
    KEY,
    KEY_NORM,
    LAYER_SCALE_0,
    LAYER_SCALE_1,
    MAP_HEAD,
    MLP,
    MLP_GATE,
    MLP_IN,
    MLP_NORM,
    MLP_OUT,
    NORM_0,
    NORM_1,
    OUT,
    POSEMB,
    PRE_LOGITS,
    PRE_NORM,
    PROBE,
    QUERY,
    QUERY_NORM,
    REG,
    ROPE,
    VALUE,
    block_parameter,
    in_block,
    is_known,
    is_stacked,
    num_blocks,
)

Flat = dict[str, np.ndarray]

# Before Linen, Flax numbered all submodules of a block in one sequence; the files that Google
# published have these names.
OLD_NUMBERING = {
    "LayerNorm_2": NORM_1,
    "MlpBlock_3": MLP,
    "MultiHeadDotProductAttention_1": ATTENTION,
}

# big_vision's oldest MAP heads have no module of their own.
MAP_HEAD_PARTS = ("probe", NORM_0, MLP, ATTENTION)

TORCH_KINDS = {"kernel": "weight", "scale": "weight", "bias": "bias"}

GROUP_NORM = re.compile(r"(^|/)gn\w*/")


def from_flax(stored: Flat) -> Flat:
    """Converts parameters of Google's code or big_vision, old and new.

    Handles a prefix, with other arrays beside the parameters; the old numbering; group norms of
    shape (1, 1, 1, C); positions at the top level; stacked blocks; and MAP heads without a module.
    """
    for prefix in ("opt/target/", "params/"):
        if any(name.startswith(prefix) for name in stored):
            stored = {n.removeprefix(prefix): v for n, v in stored.items() if n.startswith(prefix)}
    if any("/LayerNorm_2/" in name for name in stored):
        stored = {rename_parts(name, OLD_NUMBERING): value for name, value in stored.items()}
    params = {}
    for name, value in stored.items():
        if GROUP_NORM.search(name):
            value = value.reshape(-1)
        if name == "pos_embedding":
            name = POSEMB
        if name.split("/")[0] in MAP_HEAD_PARTS:
            name = f"{MAP_HEAD}/{name}"
        if is_stacked(name):
            _, _, parameter = name.partition("encoderblock/")
            params |= {in_block(i, parameter): layer for i, layer in enumerate(value)}
        else:
            params[name] = value
    return params


def to_google(params: Flat) -> Flat:
    """Converts to the names and shapes of the files under gs://vit_models.

    Raises:
        UserError: a parameter that isn't in `vit_jax/paths.py`, and so not in Google's code.
    """
    check_all_named([name for name in params if not is_known(name)], "Google's code")
    old_names = {new: old for old, new in OLD_NUMBERING.items()}
    stored = {}
    for name, value in params.items():
        if "/encoderblock_" in name:
            name = rename_parts(name, old_names)
        stored[name] = value.reshape(1, 1, 1, -1) if GROUP_NORM.search(name) else value
    return stored


def rename_parts(name: str, new_names: dict[str, str]) -> str:
    """Replaces the parts of a name that are keys of `new_names`."""
    return re.sub("|".join(new_names), lambda match: new_names[match[0]], name)


@dataclasses.dataclass(frozen=True)
class StateDictNames:
    """How a PyTorch codebase names its parameters: its names -> this code's.

    Attributes:
        codebase: for messages.
        tensors: parameters that aren't the weight or bias of a module. Names in blocks have {} for
            the block's index. Leading axes of size 1 may be missing.
        modules: modules with a weight and a bias, outside the blocks.
        block: the prefix of a block, with {} for its index.
        block_modules: the modules of a block. A module that corresponds to several of this code's
            has their outputs one after the other.
        num_axes: of tensors that lack leading axes of size 1.
    """

    codebase: str
    tensors: dict[str, str]
    modules: dict[str, str | tuple[str, ...]]
    block: str
    block_modules: dict[str, str | tuple[str, ...]]
    num_axes: dict[str, int] = dataclasses.field(default_factory=dict)

    def all_tensors(self, depth: int) -> dict[str, str]:
        """Returns {its tensor: this code's parameter} of a model with `depth` blocks."""
        tensors = {}
        for name, target in self.tensors.items():
            if "{}" in name:
                tensors |= {name.format(i): in_block(i, target) for i in range(depth)}
            else:
                tensors[name] = target
        return tensors

    def all_modules(self, depth: int) -> dict[str, tuple[str, ...]]:
        """Returns {its module: this code's modules} of a model with `depth` blocks."""
        modules = {name: as_tuple(targets) for name, targets in self.modules.items()}
        for i in range(depth):
            for name, targets in self.block_modules.items():
                targets = tuple(in_block(i, target) for target in as_tuple(targets))
                modules[f"{self.block.format(i)}.{name}"] = targets
        return modules


TIMM = StateDictNames(
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
TIMM_SWIGLU = dataclasses.replace(
    TIMM, block_modules=TIMM.block_modules | {"mlp.fc1": (MLP_GATE, MLP_IN)}
)
# Names that only reading needs: of files with separate projections, and of EVA's.
TIMM_OTHER_MODULES = {
    "attn.q_proj": QUERY,
    "attn.k_proj": KEY,
    "attn.v_proj": VALUE,
    "mlp.fc1_g": MLP_GATE,
    "mlp.fc1_x": MLP_IN,
}
TIMM_OTHER_TENSORS = {
    "blocks.{}.gamma_1": f"{LAYER_SCALE_0}/gamma",
    "blocks.{}.gamma_2": f"{LAYER_SCALE_1}/gamma",
    "blocks.{}.attn.q_bias": f"{QUERY}/bias",
    "blocks.{}.attn.v_bias": f"{VALUE}/bias",
}

HF = StateDictNames(
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
HF_DEIT = dataclasses.replace(HF, tensors=HF.tensors | {"embeddings.distillation_token": REG})
HF_DINOV2 = dataclasses.replace(
    HF,
    tensors=HF.tensors
    | {
        "embeddings.register_tokens": REG,
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
)
SWIGLU_PARTS = {"mlp.weights_in": (MLP_GATE, MLP_IN), "mlp.weights_out": MLP_OUT}
HF_DINOV2_SWIGLU = dataclasses.replace(
    HF_DINOV2,
    block_modules={k: v for k, v in HF_DINOV2.block_modules.items() if "mlp" not in k}
    | SWIGLU_PARTS,
)
HF_CLIP = StateDictNames(
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
HF_DINOV3 = StateDictNames(
    codebase="transformers",
    tensors={
        "embeddings.cls_token": CLS,
        "embeddings.register_tokens": REG,
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
# transformers' model_type -> the names in its files.
HF_NAMES = {
    **dict.fromkeys(("vit", "vit_mae", "ijepa"), HF),
    "deit": HF_DEIT,
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), HF_DINOV2),
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model"), HF_CLIP),
    "dinov3_vit": HF_DINOV3,
}
# What a model with a head has before the names of the others.
HF_PREFIXES = {"vit_mae": "vit.", "clip_vision_model": "vision_model."}
HF_PREFIXES |= {"siglip_vision_model": "vision_model."}
# The names that transformers 5 has in memory; its files still have the older ones.
HF_NEW = dataclasses.replace(
    HF,
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


def from_timm(stored: Flat, num_heads: int, rope: str | None = None) -> Flat:
    """Converts parameters of timm's `VisionTransformer` or `Eva`.

    Args:
        rope: which channels rotary positions turn together; see `rope_order`. None: they don't.
    """
    names = TIMM_SWIGLU if has_packed_swiglu(stored) else TIMM
    names = dataclasses.replace(
        names,
        tensors=names.tensors | TIMM_OTHER_TENSORS,
        block_modules=names.block_modules | TIMM_OTHER_MODULES,
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


def has_swiglu(stored: Flat) -> bool:
    """Whether a model of timm has gated MLPs."""
    return "blocks.0.mlp.fc1_g.weight" in stored or has_packed_swiglu(stored)


def has_packed_swiglu(stored: Flat) -> bool:
    """Whether the gate and the values of a model of timm are one layer."""
    hidden, outputs = (stored.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    is_complete = hidden is not None and outputs is not None and outputs.ndim == 2
    return is_complete and len(hidden) == 2 * outputs.shape[1]


def add_key_biases(params: Flat) -> None:
    """Adds zeros, in place, where only queries and values have biases: of EVA and DINOv3."""
    for i in range(num_blocks(params)):
        query, key = (in_block(i, f"{part}/bias") for part in (QUERY, KEY))
        if query in params and f"{in_block(i, KEY)}/kernel" in params and key not in params:
            params[key] = np.zeros_like(params[query])


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


def has_key_biases(params: Flat) -> bool:
    """Whether a key has a bias that isn't zero."""
    return any(name.endswith(f"{KEY}/bias") and value.any() for name, value in params.items())


def from_hf(stored: Flat, num_heads: int, model_type: str) -> Flat:
    """Converts parameters of transformers.

    A mask token, which is only used in pre-training, is dropped; so are the decoder of a masked
    autoencoder and all that isn't of the image in an image-and-text model.

    Args:
        model_type: a key of HF_NAMES.
    """
    prefix = HF_PREFIXES.get(model_type, f"{model_type}.")
    if any(name.startswith(f"{prefix}embeddings.") for name in stored):
        kept = (prefix, "classifier.") if model_type in WITH_OTHER_PARTS else ""
        stored = {n.removeprefix(prefix): v for n, v in stored.items() if n.startswith(kept)}
    stored = {name.replace("in_proj_", "in_proj."): value for name, value in stored.items()}
    stored.pop("embeddings.mask_token", None)
    stored.pop("embeddings.position_ids", None)
    names = HF_NAMES[model_type]
    if any(name.startswith("layers.") for name in stored):
        names = HF_NEW
    elif "encoder.layer.0.mlp.weights_in.weight" in stored:
        names = HF_DINOV2_SWIGLU
    params = from_state_dict(stored, names, num_heads)
    if model_type == "dinov3_vit":
        add_key_biases(params)
    return params


WITH_OTHER_PARTS = ("vit_mae", "clip_vision_model", "siglip_vision_model")


def to_timm(params: Flat, model) -> Flat:
    """Converts to timm's `VisionTransformer`; after pooling its last norm is called `fc_norm`.

    Raises:
        UserError: a parameter that timm has no name for.
    """
    names = TIMM_SWIGLU if model.mlp_layer == "swiglu" else TIMM
    unused = "norm" if model.pool_norm == "after" else "fc_norm"
    modules = {name: target for name, target in names.modules.items() if name != unused}
    return to_state_dict(params, dataclasses.replace(names, modules=modules))


def to_hf(params: Flat, model_type: str) -> Flat:
    """Converts to a model of transformers.

    Args:
        model_type: a key of HF_NAMES.

    Raises:
        UserError: a parameter that transformers has no name for.
    """
    names = HF_NAMES[model_type]
    if names is HF_DINOV2 and any(MLP_GATE in name for name in params):
        names = HF_DINOV2_SWIGLU
    if names is HF_DINOV3 and not has_key_biases(params):
        params = {n: value for n, value in params.items() if not n.endswith(f"{KEY}/bias")}
    has_head = any(name.startswith(f"{HEAD}/") for name in params)
    prefix = f"{model_type}." if has_head else ""
    return {
        name if name.startswith("classifier.") else prefix + name.replace("in_proj.", "in_proj_"): v
        for name, v in to_state_dict(params, names).items()
    }


def from_state_dict(stored: Flat, names: StateDictNames, num_heads: int) -> Flat:
    """Converts a PyTorch state dict; parameters without a counterpart keep their names."""
    block = re.compile(re.escape(names.block).replace(r"\{\}", r"(\d+)") + r"\.")
    depth = 1 + max((int(m[1]) for m in map(block.match, stored) if m), default=-1)
    modules, tensors = names.all_modules(depth), names.all_tensors(depth)
    params = {}
    for name, value in stored.items():
        if name in tensors:
            is_table = tensors[name] in (CLS, REG, POSEMB)
            missing = 3 - value.ndim if is_table else 0
            params[tensors[name]] = value.reshape(*[1] * missing, *value.shape)
            continue
        module, _, kind = name.rpartition(".")
        targets = modules.get(module, (module,))
        if value.ndim == 0 or len(value) % len(targets):
            targets = (module,)
        parts = np.split(value, len(targets)) if len(targets) > 1 else [value]
        for target, part in zip(targets, parts, strict=True):
            params |= from_torch(target, kind, part, num_heads)
    return params


def to_state_dict(params: Flat, names: StateDictNames) -> Flat:
    """Converts to a PyTorch state dict.

    Raises:
        UserError: a parameter that the codebase has no name for.
    """
    depth = num_blocks(params)
    tensors = {target: name for name, target in names.all_tensors(depth).items()}
    modules = {}  # this code's module -> the codebase's, and its place among several
    for name, targets in names.all_modules(depth).items():
        modules |= {target: (name, place) for place, target in enumerate(targets)}
    parts = collections.defaultdict(dict)  # name in the state dict -> place -> array
    unnamed = []
    for name, value in params.items():
        module, _, kind = name.rpartition("/")
        slot, place = tensors.get(name), 0
        if slot in names.num_axes:
            value = value.reshape(value.shape[-names.num_axes[slot] :])
        if module in modules and kind in TORCH_KINDS:
            theirs, place = modules[module]
            slot, value = f"{theirs}.{TORCH_KINDS[kind]}", to_torch(module, kind, value)
        if slot is None or place in parts[slot]:
            unnamed.append(name)
        else:
            parts[slot][place] = value
    check_all_named(unnamed, names.codebase)
    return {
        name: np.concatenate([arrays[place] for place in sorted(arrays)])
        for name, arrays in parts.items()
    }


def check_all_named(unnamed: list[str], codebase: str) -> None:
    """Raises UserError if there are parameters that a codebase has no name for."""
    if unnamed:
        more = f" (and {len(unnamed) - 1} more)" if len(unnamed) > 1 else ""
        raise UserError(
            f"{unnamed[0]}{more}: {codebase} has no such parameter, so the model can't be saved "
            "in its format"
        )


def from_torch(module: str, kind: str, value, num_heads: int) -> Flat:
    """Converts one weight or bias of PyTorch; `module` is this code's name of its module."""
    if kind == "weight" and value.ndim == 1:
        return {f"{module}/scale": value}
    if kind == "weight":
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    # If the heads don't divide the width, the shape stays, and loading reports it.
    if module.endswith((QUERY, KEY, VALUE)) and value.shape[-1] % num_heads == 0:
        value = value.reshape(*value.shape[:-1], num_heads, -1)  # (D, D) -> (D, H, d)
    elif module.endswith(OUT) and kind == "weight" and len(value) % num_heads == 0:
        value = value.reshape(num_heads, -1, value.shape[-1])  # (D, D) -> (H, d, D)
    return {f"{module}/{'kernel' if kind == 'weight' else kind}": value}


def to_torch(module: str, kind: str, value) -> np.ndarray:
    """Converts one kernel, scale or bias to PyTorch's layout."""
    if kind == "scale":
        return value
    if kind == "bias":
        return value.reshape(-1)
    if value.ndim == 4:  # a convolution
        return value.transpose(3, 2, 0, 1)
    if module.endswith(OUT):  # (H, d, D) -> (D, D)
        return value.reshape(-1, value.shape[-1]).T
    return value.reshape(value.shape[0], -1).T


def as_tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)
