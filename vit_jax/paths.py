"""The names of a model's parameters: the one place that knows them.

To add a parameter, give the model a field that turns it on, off by default, and name its layer
explicitly, since Flax numbers unnamed layers. List it here: in a block, by a row in
BLOCK_PARAMETERS; before the blocks, in `is_input_layer`; elsewhere, in `is_known`. Turn it on in a
row of MODELS in tests/test_paths.py, such as `dict(layer_scale=0.1)`. FSDP needs nothing. Only
leaves named `kernel` decay.

Other codebases' weights need no change: export.py refuses a new field unless it has its default,
and loading.py refuses weights that lack a parameter of the model, until you teach it to add it, as
`adapt_head` does for heads.

A name is a parameter's path in the tree of `model.init`, such as
"Transformer/encoderblock_0/LayerNorm_0/scale". Blocks are numbered, or stacked by `scan`
under "encoderblock" with a leading axis over the layers. D: width, H: heads, d: D / H.
"""

import re
from collections.abc import Iterable, Iterator

import jax
from jax.sharding import PartitionSpec as P

EMBEDDING, CLS = "embedding", "cls"
POSEMB = "Transformer/posembed_input/pos_embedding"
ENCODER_NORM = "Transformer/encoder_norm"
PRE_LOGITS, HEAD, MAP_HEAD = "pre_logits", "head", "MAPHead_0"
PROBE = f"{MAP_HEAD}/probe"
# Of the training on masked patches: weights that are loaded from such a run leave them out.
MASK_TOKEN, PATCH_HEAD = "mask_token", "patch_head"
STEM_ROOT = "conv_root"  # the first convolution of a hybrid's stem

# Modules of a block, and of the MAP head.
NORM_0, NORM_1 = "LayerNorm_0", "LayerNorm_1"
ATTENTION = "MultiHeadDotProductAttention_0"
QUERY, KEY, VALUE, OUT = (f"{ATTENTION}/{part}" for part in ("query", "key", "value", "out"))
MLP = "MlpBlock_0"
MLP_IN, MLP_OUT = f"{MLP}/Dense_0", f"{MLP}/Dense_1"

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
    f"{NORM_1}/scale": P(None),
    f"{NORM_1}/bias": P(None),
    f"{MLP_IN}/kernel": P(None, "tensor"),  # (D, mlp_dim)
    f"{MLP_IN}/bias": P("tensor"),
    f"{MLP_OUT}/kernel": P("tensor", None),  # (mlp_dim, D)
    f"{MLP_OUT}/bias": P(None),
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
    """Whether a parameter comes before the first block: patches, stem, positions, class token."""
    return bool(name in (POSEMB, CLS) or name.startswith(f"{EMBEDDING}/") or STEM.match(name))


def is_known(name: str) -> bool:
    """Whether a parameter of an unstacked model is among the names in this file."""
    if (parameter := block_parameter(name)) is not None:
        return parameter in BLOCK_PARAMETERS
    modules = (EMBEDDING, ENCODER_NORM, PRE_LOGITS, HEAD)
    return is_input_layer(name) or name == PROBE or name.rpartition("/")[0] in modules


def differing_shapes(theirs: dict, ours: dict) -> Iterator[tuple]:
    """Yields (name, their shape, our shape) of parameters that differ; a shape may be "missing"."""
    for name in sorted(theirs.keys() | ours.keys()):
        their_shape, our_shape = theirs.get(name, "missing"), ours.get(name, "missing")
        if their_shape != our_shape:
            yield name, their_shape, our_shape
