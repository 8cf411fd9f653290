"""The names and layouts of other codebases' parameters, to ours and back.

"Ours" are flat: "Transformer/encoderblock_0/LayerNorm_0/scale" -> array, blocks one by one.
D: width, H: heads, d: D / H.
"""

import dataclasses
import math
import re

import numpy as np

from vit_jax.paths import ATTENTION, KEY, POSEMB, QUERY, VALUE, num_blocks

Flat = dict[str, np.ndarray]

# Flax before Linen numbered all the submodules of a block in one row; the published files have
# these names.
OLD_NUMBERING = {
    "LayerNorm_2": "LayerNorm_1",
    "MlpBlock_3": "MlpBlock_0",
    "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
}

# The oldest of big_vision's pool by attention without a module around it.
MAP_HEAD = ("probe", "LayerNorm_0", "MlpBlock_0", "MultiHeadDotProductAttention_0")

GROUP_NORM = re.compile(r"(^|/)gn\w*/")


def from_flax(flat: Flat) -> Flat:
    """Google's and big_vision's files, of all ages.

    Differences of age: a prefix, with other things beside it; the numbering in a block; group norms
    of shape (1, 1, 1, C); positions at the top, without a row for the class token or with one;
    blocks stacked by scan; the pooling head inlined.
    """
    for prefix in ("opt/target/", "params/"):
        if any(name.startswith(prefix) for name in flat):
            flat = {n.removeprefix(prefix): v for n, v in flat.items() if n.startswith(prefix)}
    if any("/LayerNorm_2/" in name for name in flat):
        flat = {renamed(name, OLD_NUMBERING): value for name, value in flat.items()}
    ours = {}
    for name, value in flat.items():
        if GROUP_NORM.search(name):
            value = value.reshape(-1)
        if name == "pos_embedding":
            name = POSEMB
            if "cls" in flat and is_square(value.shape[1]):  # to the token nothing was added
                value = np.pad(value, ((0, 0), (1, 0), (0, 0)))
        if name.split("/")[0] in MAP_HEAD:
            name = f"MAPHead_0/{name}"
        if "/encoderblock/" in name:
            for i, layer in enumerate(value):
                ours[name.replace("/encoderblock/", f"/encoderblock_{i}/")] = layer
        else:
            ours[name] = value
    return ours


def to_google(flat: Flat) -> Flat:
    """As the files under gs://vit_models have it: the old numbering and shapes of group norms."""
    theirs = {}
    for name, value in flat.items():
        if "/encoderblock_" in name:
            name = renamed(name, {new: old for old, new in OLD_NUMBERING.items()})
        theirs[name] = value.reshape(1, 1, 1, -1) if GROUP_NORM.search(name) else value
    return theirs


def renamed(name: str, parts: dict[str, str]) -> str:
    return re.sub("|".join(parts), lambda match: parts[match[0]], name)


@dataclasses.dataclass(frozen=True)
class StateDict:
    """The names of a PyTorch codebase, theirs -> ours.

    tensors: parameters by themselves. modules: what has a weight and a bias; those of a block
    stand in `block_modules`, under `block`. A module that stands for several of ours has them in
    rows, one below the other.
    """

    tensors: dict[str, str]
    modules: dict[str, str | tuple[str, ...]]
    block: str
    block_modules: dict[str, str | tuple[str, ...]]

    def all_modules(self, depth: int) -> dict[str, tuple[str, ...]]:
        """Their module -> ours, of a model with so many blocks."""
        modules = {theirs: as_tuple(ours) for theirs, ours in self.modules.items()}
        for i in range(depth):
            for theirs, ours in self.block_modules.items():
                ours = tuple(f"Transformer/encoderblock_{i}/{name}" for name in as_tuple(ours))
                modules[f"{self.block.format(i)}.{theirs}"] = ours
        return modules


TIMM = StateDict(
    tensors={"cls_token": "cls", "pos_embed": POSEMB, "attn_pool.latent": "MAPHead_0/probe"},
    modules={
        "patch_embed.proj": "embedding",
        "norm": "Transformer/encoder_norm",
        "fc_norm": "Transformer/encoder_norm",
        "attn_pool.q": f"MAPHead_0/{QUERY}",
        "attn_pool.kv": (f"MAPHead_0/{KEY}", f"MAPHead_0/{VALUE}"),
        "attn_pool.proj": f"MAPHead_0/{ATTENTION}/out",
        "attn_pool.norm": "MAPHead_0/LayerNorm_0",
        "attn_pool.mlp.fc1": "MAPHead_0/MlpBlock_0/Dense_0",
        "attn_pool.mlp.fc2": "MAPHead_0/MlpBlock_0/Dense_1",
        "head": "head",
    },
    block="blocks.{}",
    block_modules={
        "norm1": "LayerNorm_0",
        "norm2": "LayerNorm_1",
        "attn.qkv": (QUERY, KEY, VALUE),
        "attn.proj": f"{ATTENTION}/out",
        "mlp.fc1": "MlpBlock_0/Dense_0",
        "mlp.fc2": "MlpBlock_0/Dense_1",
    },
)
TIMM_SEPARATE = dataclasses.replace(
    TIMM,
    block_modules={k: v for k, v in TIMM.block_modules.items() if k != "attn.qkv"}
    | {"attn.q_proj": QUERY, "attn.k_proj": KEY, "attn.v_proj": VALUE},
)

HF = StateDict(
    tensors={"embeddings.cls_token": "cls", "embeddings.position_embeddings": POSEMB},
    modules={
        "embeddings.patch_embeddings.projection": "embedding",
        "layernorm": "Transformer/encoder_norm",
        "pooler.dense": "pre_logits",
        "classifier": "head",
    },
    block="encoder.layer.{}",
    block_modules={
        "layernorm_before": "LayerNorm_0",
        "layernorm_after": "LayerNorm_1",
        "attention.attention.query": QUERY,
        "attention.attention.key": KEY,
        "attention.attention.value": VALUE,
        "attention.output.dense": f"{ATTENTION}/out",
        "intermediate.dense": "MlpBlock_0/Dense_0",
        "output.dense": "MlpBlock_0/Dense_1",
    },
)
# In memory since transformers 5, which still writes the older names.
HF_NEW = dataclasses.replace(
    HF,
    block="layers.{}",
    block_modules={
        "layernorm_before": "LayerNorm_0",
        "layernorm_after": "LayerNorm_1",
        "attention.q_proj": QUERY,
        "attention.k_proj": KEY,
        "attention.v_proj": VALUE,
        "attention.o_proj": f"{ATTENTION}/out",
        "mlp.fc1": "MlpBlock_0/Dense_0",
        "mlp.fc2": "MlpBlock_0/Dense_1",
    },
)


def from_timm(flat: Flat, num_heads: int, no_embed_class: bool | None = None) -> Flat:
    """timm's `VisionTransformer`.

    no_embed_class: positions lack a row for the class token, to which nothing is added; None: where
    they are a square number.
    """
    separate = "blocks.0.attn.q_proj.weight" in flat
    ours = from_state_dict(flat, TIMM_SEPARATE if separate else TIMM, num_heads)
    if "cls" in ours and POSEMB in ours:
        num_positions = ours[POSEMB].shape[1]
        if no_embed_class is None:
            no_embed_class = is_square(num_positions)
        if no_embed_class:
            ours[POSEMB] = np.pad(ours[POSEMB], ((0, 0), (1, 0), (0, 0)))
    return ours


def from_hf(flat: Flat, num_heads: int) -> Flat:
    """transformers' `ViTForImageClassification` and `ViTModel`; a mask token is left out."""
    flat = {name.removeprefix("vit."): value for name, value in flat.items()}
    flat.pop("embeddings.mask_token", None)
    new = any(name.startswith("layers.") for name in flat)
    return from_state_dict(flat, HF_NEW if new else HF, num_heads)


def to_timm(flat: Flat, norm_after_pool: bool) -> Flat:
    """timm's `VisionTransformer`; the last norm is `fc_norm` where it stands after the pooling."""
    theirs = to_state_dict(flat, TIMM)
    unused = "norm." if norm_after_pool else "fc_norm."
    return {name: value for name, value in theirs.items() if not name.startswith(unused)}


def to_hf(flat: Flat, prefix: str) -> Flat:
    """transformers' `ViTModel` (no prefix), or `ViTForImageClassification` (prefix "vit.")."""
    return {
        name if name.startswith("classifier.") else prefix + name: value
        for name, value in to_state_dict(flat, HF).items()
    }


def from_state_dict(flat: Flat, names: StateDict, num_heads: int) -> Flat:
    """PyTorch's state dict -> ours; what has no counterpart keeps its name."""
    block = re.compile(re.escape(names.block).replace(r"\{\}", r"(\d+)") + r"\.")
    depth = 1 + max((int(m[1]) for m in map(block.match, flat) if m), default=-1)
    modules = names.all_modules(depth)
    ours = {}
    for name, value in flat.items():
        module, _, kind = name.rpartition(".")
        if name in names.tensors:
            ours[names.tensors[name]] = value
            continue
        targets = modules.get(module, (module,))
        if value.ndim == 0 or len(value) % len(targets):
            targets = (module,)
        parts = np.split(value, len(targets)) if len(targets) > 1 else [value]
        for target, part in zip(targets, parts, strict=True):
            ours.update(from_torch(target, kind, part, num_heads))
    return ours


def to_state_dict(flat: Flat, names: StateDict) -> Flat:
    """The inverse; contiguous arrays."""
    theirs = {name: flat[ours] for name, ours in names.tensors.items() if ours in flat}
    for module, targets in names.all_modules(num_blocks(flat)).items():
        for kind in ("weight", "bias"):
            parts = [to_torch(flat, target, kind) for target in targets]
            if parts[0] is not None:
                theirs[f"{module}.{kind}"] = np.concatenate(parts)
    return theirs


def from_torch(module: str, kind: str, value, num_heads: int) -> Flat:
    """One of PyTorch's weights or biases under our name, in our layout."""
    if kind == "weight" and value.ndim == 1:
        return {f"{module}/scale": value}
    if kind == "weight":
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    # A width that the heads don't divide is another model's, and its shape will tell.
    if module.endswith((QUERY, KEY, VALUE)) and value.shape[-1] % num_heads == 0:
        value = value.reshape(*value.shape[:-1], num_heads, -1)  # (D, D) -> (D, H, d)
    elif module.endswith(f"{ATTENTION}/out") and kind == "weight" and len(value) % num_heads == 0:
        value = value.reshape(num_heads, -1, value.shape[-1])  # (D, D) -> (H, d, D)
    return {f"{module}/{'kernel' if kind == 'weight' else kind}": value}


def to_torch(flat: Flat, module: str, kind: str) -> np.ndarray | None:
    """The weight or bias of one of our modules in PyTorch's layout; None where it has none."""
    if kind == "bias":
        value = flat.get(f"{module}/bias")
        return None if value is None else value.reshape(-1)
    if f"{module}/scale" in flat:
        return flat[f"{module}/scale"]
    value = flat.get(f"{module}/kernel")
    if value is None:
        return None
    if value.ndim == 4:  # a convolution
        return value.transpose(3, 2, 0, 1)
    if module.endswith(f"{ATTENTION}/out"):  # (H, d, D) -> (D, D)
        return value.reshape(-1, value.shape[-1]).T
    return value.reshape(value.shape[0], -1).T


def is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def as_tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)
