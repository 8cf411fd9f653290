"""Names of the leaves in a tree of parameters."""

import jax


def path_name(path) -> str:
    """A leaf's path as users write it: "Transformer/encoderblock_0/LayerNorm_0/scale"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
