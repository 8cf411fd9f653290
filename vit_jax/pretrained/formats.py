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
    MAP_HEAD,
    MLP,
    MLP_IN,
    MLP_OUT,
    NORM_0,
    NORM_1,
    OUT,
    POSEMB,
    PRE_LOGITS,
    PROBE,
    QUERY,
    VALUE,
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
        tensors: parameters that aren't the weight or bias of a module.
        modules: modules with a weight and a bias, outside the blocks.
        block: the prefix of a block, with {} for its index.
        block_modules: the modules of a block. A module that corresponds to several of this code's
            has their outputs one after the other.
    """

    codebase: str
    tensors: dict[str, str]
    modules: dict[str, str | tuple[str, ...]]
    block: str
    block_modules: dict[str, str | tuple[str, ...]]

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
    tensors={"cls_token": CLS, "pos_embed": POSEMB, "attn_pool.latent": PROBE},
    modules={
        "patch_embed.proj": EMBEDDING,
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
        "attn.proj": OUT,
        "mlp.fc1": MLP_IN,
        "mlp.fc2": MLP_OUT,
    },
)
TIMM_SEPARATE = dataclasses.replace(
    TIMM,
    block_modules={k: v for k, v in TIMM.block_modules.items() if k != "attn.qkv"}
    | {"attn.q_proj": QUERY, "attn.k_proj": KEY, "attn.v_proj": VALUE},
)

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


def from_timm(stored: Flat, num_heads: int) -> Flat:
    """Converts parameters of timm's `VisionTransformer`."""
    separate = "blocks.0.attn.q_proj.weight" in stored
    return from_state_dict(stored, TIMM_SEPARATE if separate else TIMM, num_heads)


def from_hf(stored: Flat, num_heads: int) -> Flat:
    """Converts parameters of transformers' `ViTForImageClassification` or `ViTModel`.

    A mask token, which is only used in pre-training, is dropped.
    """
    stored = {name.removeprefix("vit."): value for name, value in stored.items()}
    stored.pop("embeddings.mask_token", None)
    is_new = any(name.startswith("layers.") for name in stored)
    return from_state_dict(stored, HF_NEW if is_new else HF, num_heads)


def to_timm(params: Flat, norm_after_pool: bool) -> Flat:
    """Converts to timm's `VisionTransformer`; after pooling its last norm is called `fc_norm`.

    Raises:
        UserError: a parameter that timm has no name for.
    """
    unused = "norm" if norm_after_pool else "fc_norm"
    modules = {name: target for name, target in TIMM.modules.items() if name != unused}
    return to_state_dict(params, dataclasses.replace(TIMM, modules=modules))


def to_hf(params: Flat, prefix: str) -> Flat:
    """Converts to transformers' `ViTModel`, or `ViTForImageClassification` with prefix "vit.".

    Raises:
        UserError: a parameter that transformers has no name for.
    """
    return {
        name if name.startswith("classifier.") else prefix + name: value
        for name, value in to_state_dict(params, HF).items()
    }


def from_state_dict(stored: Flat, names: StateDictNames, num_heads: int) -> Flat:
    """Converts a PyTorch state dict; parameters without a counterpart keep their names."""
    block = re.compile(re.escape(names.block).replace(r"\{\}", r"(\d+)") + r"\.")
    depth = 1 + max((int(m[1]) for m in map(block.match, stored) if m), default=-1)
    modules = names.all_modules(depth)
    params = {}
    for name, value in stored.items():
        if name in names.tensors:
            params[names.tensors[name]] = value
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
    tensors = {target: name for name, target in names.tensors.items()}
    modules = {}  # this code's module -> the codebase's, and its place among several
    for name, targets in names.all_modules(num_blocks(params)).items():
        modules |= {target: (name, place) for place, target in enumerate(targets)}
    parts = collections.defaultdict(dict)  # name in the state dict -> place -> array
    unnamed = []
    for name, value in params.items():
        module, _, kind = name.rpartition("/")
        slot, place = tensors.get(name), 0
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
