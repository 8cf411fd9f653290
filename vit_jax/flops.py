"""What a model costs: parameters and floating-point operations, counted from its fields."""

import math

import jax


def num_params(params) -> int:
    """The number of parameters in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def num_bytes_on_device(tree) -> int:
    """The bytes of a tree of sharded arrays that one device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def forward_flops(model, image_shape: tuple[int, int, int]) -> int:
    """Operations of the matrix products for one image (height, width, channels), forward.

    A multiplication and an addition count two. A training step takes three times as many:
    the backward pass multiplies each matrix twice (arXiv:2001.08361, section 2.1).
    """
    height, width, channels = image_shape
    patch_height, patch_width = model.patch_shape
    d, mlp_dim = model.width, model.mlp_dim or 4 * model.width
    patches = (height // patch_height) * (width // patch_width)
    tokens = patches + (model.pool == "cls")
    flops = 2 * patches * patch_height * patch_width * channels * d
    flops += model.depth * block_flops(tokens, tokens, d, mlp_dim)
    if model.pool == "map":
        flops += block_flops(1, tokens, d, mlp_dim)
    outputs = tokens if model.pool == "none" else 1
    hidden = model.representation_size or d
    if model.representation_size:
        flops += 2 * outputs * d * hidden
    return flops + 2 * outputs * hidden * (model.num_classes or 0)


def block_flops(queries: int, keys: int, d: int, mlp_dim: int) -> int:
    """Attention of `queries` tokens over `keys`, and the MLP on the queries."""
    projections = 2 * (2 * queries + 2 * keys) * d * d  # query and out, key and value
    attention = 2 * 2 * queries * keys * d  # scores, and the weighted sum
    return projections + attention + 2 * 2 * queries * d * mlp_dim
