"""Between the two layouts of a model's blocks: one by one, and stacked by `scan`."""

import re

import jax
import jax.numpy as jnp


def stack_blocks(params: dict) -> dict:
    """Parameters of a plain model -> of the same model with `scan=True`.

    `Transformer/encoderblock_<i>/...` become `Transformer/encoderblock/...` with a leading
    axis over the layers. The input is left as it was.
    """
    transformer = dict(params["Transformer"])
    names = sorted(
        (name for name in transformer if re.fullmatch(r"encoderblock_\d+", name)),
        key=lambda name: int(name.split("_")[1]),
    )
    blocks = [transformer.pop(name) for name in names]
    transformer["encoderblock"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return {**params, "Transformer": transformer}


def unstack_blocks(params: dict) -> dict:
    """Parameters of a model with `scan=True` -> of the same model without."""
    transformer = dict(params["Transformer"])
    stacked = transformer.pop("encoderblock")
    for i in range(len(jax.tree.leaves(stacked)[0])):
        transformer[f"encoderblock_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
    return {**params, "Transformer": transformer}
