"""Names of the leaves in a tree of parameters, and where two trees differ."""

from collections.abc import Iterator

import jax


def path_name(path) -> str:
    """A leaf's path as users write it: "Transformer/encoderblock_0/LayerNorm_0/scale"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def differing_shapes(theirs: dict, ours: dict) -> Iterator[tuple]:
    """(name, shape there, shape here) of each parameter that differs; "missing" stands for none."""
    for name in sorted(theirs.keys() | ours.keys()):
        there, here = theirs.get(name, "missing"), ours.get(name, "missing")
        if there != here:
            yield name, there, here
