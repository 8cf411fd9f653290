"""The names of a model's parameters, and the two layouts of its blocks: numbered, and stacked.

To add a parameter, give the model a field that turns it on, off by default, and name its layer
explicitly, since Flax numbers unnamed layers. List it here: in a block, by a row in
BLOCK_PARAMETERS; before the blocks, in `is_input_layer`; elsewhere, in `is_known`. Turn it on in a
row of MODELS in tests/test_paths.py, such as `dict(init_values=0.1)`. FSDP needs nothing. Only
leaves named `kernel` decay.

Other codebases' weights need no change: pretrained/export.py refuses a new field unless it has its
default, and loading.py refuses weights that lack a parameter of the model, until you teach adapt.py
to add it, as `adapt_head` does for heads.

A name is a parameter's path in the tree of `model.init`, such as
"Transformer/encoderblock_0/LayerNorm_0/scale". Blocks are numbered, or stacked by `scan`
under "encoderblock" with a leading axis over the layers. D: width, H: heads, d: D / H.
"""

import re
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

EMBEDDING, CLS, REG = "embedding", "cls", "reg_tokens"
POSEMB = "Transformer/posembed_input/pos_embedding"
PRE_NORM, ENCODER_NORM = "Transformer/pre_norm", "Transformer/encoder_norm"
PRE_LOGITS, HEAD, MAP_HEAD = "pre_logits", "head", "MAPHead_0"
PROBE = f"{MAP_HEAD}/probe"
# Of the training on masked patches: weights that are loaded from such a run leave them out, while
# DINOv2's keep their token.
MASK_TOKEN, PATCH_HEAD = "mask_token", "patch_head"
STEM_ROOT = "conv_root"  # the first convolution of a hybrid's stem

# Modules of a block, and of the MAP head.
NORM_0, NORM_1 = "LayerNorm_0", "LayerNorm_1"
ATTENTION = "MultiHeadDotProductAttention_0"
QUERY, KEY, VALUE, OUT = (f"{ATTENTION}/{part}" for part in ("query", "key", "value", "out"))
MLP = "MlpBlock_0"
MLP_IN, MLP_OUT = f"{MLP}/Dense_0", f"{MLP}/Dense_1"
MLP_GATE, MLP_NORM = f"{MLP}/gate", f"{MLP}/LayerNorm_0"
QUERY_NORM, KEY_NORM = f"{ATTENTION}/query_ln", f"{ATTENTION}/key_ln"
ROPE = f"{ATTENTION}/rope_freqs"
LAYER_SCALE_0, LAYER_SCALE_1 = "LayerScale_0", "LayerScale_1"

# Every parameter of a block, and how tensor parallelism splits it: by heads and by MLP units, so
# that a block needs one all-reduce after attention and one after the MLP (arXiv:1909.08053,
# section 3). A parameter that isn't listed is refused by tensor parallelism and on export.
BLOCK_PARAMETERS = {
    f"{NORM_0}/scale": P(None),  # (D,)
    f"{NORM_0}/bias": P(None),
    **{f"{module}/kernel": P(None, "tensor", None) for module in (QUERY, KEY, VALUE)},  # (D, H, d)
    **{f"{module}/bias": P("tensor", None) for module in (QUERY, KEY, VALUE)},  # (H, d)
    f"{OUT}/kernel": P("tensor", None, None),  # (H, d, D)
    f"{OUT}/bias": P(None),
    **{f"{module}/scale": P(None) for module in (QUERY_NORM, KEY_NORM)},  # (d,)
    **{f"{module}/bias": P(None) for module in (QUERY_NORM, KEY_NORM)},
    ROPE: P(None, "tensor", None),  # (2, H, d / 2)
    f"{LAYER_SCALE_0}/gamma": P(None),  # (D,)
    f"{NORM_1}/scale": P(None),
    f"{NORM_1}/bias": P(None),
    **{f"{module}/kernel": P(None, "tensor") for module in (MLP_IN, MLP_GATE)},  # (D, mlp_dim)
    **{f"{module}/bias": P("tensor") for module in (MLP_IN, MLP_GATE)},
    f"{MLP_NORM}/scale": P("tensor"),  # (mlp_dim,)
    f"{MLP_NORM}/bias": P("tensor"),
    f"{MLP_OUT}/kernel": P("tensor", None),  # (mlp_dim, D)
    f"{MLP_OUT}/bias": P(None),
    f"{LAYER_SCALE_1}/gamma": P(None),
}

# The MAP head is a block with one query and a single LayerNorm.
BLOCK = re.compile(r"(?:encoderblock(?:_(?P<index>\d+))?|MAPHead_0)/(?P<parameter>(?!probe$).+)$")
STEM = re.compile(r"(conv_root|gn_root|block\d+)/")  # of a hybrid


def path_name(path) -> str:
    """Returns the name of a leaf, given its key path in `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def block_parameter(name: str) -> str | None:
    """Returns a parameter's name within its block (see BLOCK_PARAMETERS); None outside blocks."""
    match = BLOCK.search(name)
    return match["parameter"] if match else None


def is_stacked(name: str) -> bool:
    """Whether a parameter has a leading axis over the layers."""
    return "encoderblock/" in name


def block_index(name: str) -> int | None:
    """Returns the number of the block that a parameter is in; None outside numbered blocks."""
    match = BLOCK.search(name)
    return int(match["index"]) if match and match["index"] else None


def in_block(index: int, parameter: str) -> str:
    """Returns the name of a block's parameter or module, such as in_block(0, QUERY)."""
    return f"Transformer/encoderblock_{index}/{parameter}"


def num_blocks(names: Iterable[str]) -> int:
    """Returns how many blocks there are among the names of unstacked parameters."""
    return len({index for name in names if (index := block_index(name)) is not None})


def is_input_layer(name: str) -> bool:
    """Whether a parameter comes before the first block: patches, stem, positions, other tokens."""
    is_layer = name.startswith((f"{EMBEDDING}/", f"{PRE_NORM}/")) or STEM.match(name)
    return bool(name in (POSEMB, CLS, REG) or is_layer)


def is_known(name: str) -> bool:
    """Whether a parameter of an unstacked model is among the names in this file."""
    if (parameter := block_parameter(name)) is not None:
        return parameter in BLOCK_PARAMETERS
    modules = (EMBEDDING, ENCODER_NORM, PRE_LOGITS, HEAD)
    return is_input_layer(name) or name in (PROBE, MASK_TOKEN) or name.rpartition("/")[0] in modules


def differing_shapes(theirs: dict, ours: dict) -> Iterator[tuple]:
    """Yields (name, their shape, our shape) of parameters that differ; a shape may be "missing"."""
    for name in sorted(theirs.keys() | ours.keys()):
        their_shape, our_shape = theirs.get(name, "missing"), ours.get(name, "missing")
        if their_shape != our_shape:
            yield name, their_shape, our_shape


def stack_blocks(params: dict) -> dict:
    """Converts parameters of a model with scan=False to those of the same model with scan=True.

    `Transformer/encoderblock_<i>/...` become `Transformer/encoderblock/...` with a leading axis
    over the layers. The input is not changed.
    """
    transformer = dict(params["Transformer"])
    indices = {name: block_index(f"{name}/scale") for name in transformer}
    names = sorted((name for name in indices if indices[name] is not None), key=indices.get)
    blocks = [transformer.pop(name) for name in names]
    transformer["encoderblock"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return {**params, "Transformer": transformer}


def unstack_blocks(params: dict) -> dict:
    """Converts parameters of a model with scan=True to those of the same model with scan=False."""
    transformer = dict(params["Transformer"])
    stacked = transformer.pop("encoderblock")
    for i in range(len(jax.tree.leaves(stacked)[0])):
        transformer[f"encoderblock_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
    return {**params, "Transformer": transformer}
