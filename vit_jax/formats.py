"""The names and layouts of other codebases' parameters, and ours for them.

"Ours" are flat: "Transformer/encoderblock_0/LayerNorm_0/scale" -> array, blocks one by one.
D: width, H: heads, d: D / H.
"""

import re

import numpy as np

POSEMB = "Transformer/posembed_input/pos_embedding"

# Flax before Linen numbered all the submodules of a block in one row.
OLD_NUMBERING = {
    "LayerNorm_2": "LayerNorm_1",
    "MlpBlock_3": "MlpBlock_0",
    "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
}

# The oldest of big_vision's pool by attention without a module around it.
MAP_HEAD = ("probe", "LayerNorm_0", "MlpBlock_0", "MultiHeadDotProductAttention_0")


def from_flax(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Google's and big_vision's files, of all ages.

    Differences of age: a prefix; the numbering in a block; group norms of shape (1, 1, 1, C);
    positions without a row for the class token, at the top; blocks stacked by scan; the pooling
    head inlined.
    """
    flat = {re.sub("^(opt/target|params)/", "", name): value for name, value in flat.items()}
    if any("/LayerNorm_2/" in name for name in flat):
        pattern = "|".join(OLD_NUMBERING)
        flat = {re.sub(pattern, lambda m: OLD_NUMBERING[m[0]], n): v for n, v in flat.items()}
    ours = {}
    for name, value in flat.items():
        if re.search(r"(^|/)gn\w*/", name):
            value = value.reshape(-1)
        if name == "pos_embedding":
            name = POSEMB
            if "cls" in flat:  # to which nothing was added
                value = np.pad(value, ((0, 0), (1, 0), (0, 0)))
        if name.split("/")[0] in MAP_HEAD:
            name = f"MAPHead_0/{name}"
        if "/encoderblock/" in name:
            for i, layer in enumerate(value):
                ours[name.replace("/encoderblock/", f"/encoderblock_{i}/")] = layer
        else:
            ours[name] = value
    return ours


# Modules outside the blocks: theirs -> ours. Norms have a scale, others a kernel.
TIMM = {
    "patch_embed.proj": "embedding",
    "norm": "Transformer/encoder_norm",
    "fc_norm": "Transformer/encoder_norm",
    "head": "head",
}
HF = {
    "embeddings.patch_embeddings.projection": "embedding",
    "layernorm": "Transformer/encoder_norm",
    "classifier": "head",
}

# Modules of a block.
TIMM_BLOCK = {
    "norm1": "LayerNorm_0",
    "norm2": "LayerNorm_1",
    "attn.proj": "MultiHeadDotProductAttention_0/out",
    "mlp.fc1": "MlpBlock_0/Dense_0",
    "mlp.fc2": "MlpBlock_0/Dense_1",
}
HF_BLOCK = {
    "layernorm_before": "LayerNorm_0",
    "layernorm_after": "LayerNorm_1",
    "attention.attention.query": "MultiHeadDotProductAttention_0/query",
    "attention.attention.key": "MultiHeadDotProductAttention_0/key",
    "attention.attention.value": "MultiHeadDotProductAttention_0/value",
    "attention.output.dense": "MultiHeadDotProductAttention_0/out",
    "intermediate.dense": "MlpBlock_0/Dense_0",
    "output.dense": "MlpBlock_0/Dense_1",
}


def from_timm(flat: dict[str, np.ndarray], num_heads: int) -> dict[str, np.ndarray]:
    """timm's `VisionTransformer`: query, key and value are one matrix."""
    ours = {}
    for name, value in flat.items():
        if match := re.fullmatch(r"(blocks\.\d+)\.attn\.qkv\.(\w+)", name):
            for part, third in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                ours[f"{match[1]}.attn.{part}.{match[2]}"] = third
        else:
            ours[name] = value
    blocks = TIMM_BLOCK | {
        f"attn.{part}": f"MultiHeadDotProductAttention_0/{part}"
        for part in ("query", "key", "value")
    }
    tokens = {"cls_token": "cls", "pos_embed": POSEMB}
    return from_torch(ours, TIMM, r"blocks\.(\d+)", blocks, tokens, num_heads)


def from_hf(flat: dict[str, np.ndarray], num_heads: int) -> dict[str, np.ndarray]:
    """transformers' `ViTForImageClassification`."""
    flat = {name.removeprefix("vit."): value for name, value in flat.items()}
    tokens = {"embeddings.cls_token": "cls", "embeddings.position_embeddings": POSEMB}
    return from_torch(flat, HF, r"encoder\.layer\.(\d+)", HF_BLOCK, tokens, num_heads)


def from_torch(flat, modules, block, block_modules, tokens, num_heads) -> dict[str, np.ndarray]:
    """PyTorch's state dict -> ours; what has no counterpart keeps its name."""
    ours = {}
    for name, value in flat.items():
        module, _, kind = name.rpartition(".")
        if name in tokens:
            ours[tokens[name]] = value
        elif match := re.match(rf"{block}\.", module):
            inside = block_modules.get(module[match.end() :])
            target = f"Transformer/encoderblock_{match[1]}/{inside}" if inside else module
            ours.update(leaf(target, kind, value, num_heads))
        else:
            ours.update(leaf(modules.get(module, module), kind, value, num_heads))
    return ours


def leaf(module: str, kind: str, value, num_heads: int) -> dict[str, np.ndarray]:
    """One of PyTorch's weights or biases under our name, in our layout."""
    if kind == "weight" and value.ndim == 1:
        return {f"{module}/scale": value}
    if kind == "weight":
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    if module.endswith(("/query", "/key", "/value")):  # (D, D) -> (D, H, d)
        value = value.reshape(*value.shape[:-1], num_heads, -1)
    elif module.endswith("MultiHeadDotProductAttention_0/out") and kind == "weight":
        value = value.reshape(num_heads, -1, value.shape[-1])  # (D, D) -> (H, d, D)
    return {f"{module}/{'kernel' if kind == 'weight' else kind}": value}
