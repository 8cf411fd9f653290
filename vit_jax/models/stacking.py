"""The two layouts of a model's blocks: numbered, and stacked by `scan`."""

import jax
import jax.numpy as jnp

from vit_jax.paths import block_index


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
