"""A model's parameters and floating-point operations, counted from its fields."""

import jax


def num_params(params) -> int:
    """Returns the number of parameters in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def forward_flops(model, image_shape: tuple[int, int, int]) -> int:
    """Returns the operations of the matrix products in the forward pass of one image.

    A multiplication and an addition count as two. A training step takes three times as many: the
    backward pass has two products for each one of the forward pass (arXiv:2001.08361, section 2.1).

    Args:
        model: the VisionTransformer.
        image_shape: (H, W, C).
    """
    height, width, channels = image_shape
    patch_height, patch_width = model.patch_shape
    stem = 0
    if model.resnet is not None:
        stem, (height, width, channels) = stem_flops(image_shape, **model.resnet)
    d, mlp_dim = model.width, model.mlp_dim or 4 * model.width
    patches = (height // patch_height) * (width // patch_width)
    tokens = patches + (model.pool == "cls")
    flops = stem + 2 * patches * patch_height * patch_width * channels * d
    flops += model.depth * block_flops(tokens, tokens, d, mlp_dim)
    if model.pool == "map":
        flops += block_flops(1, tokens, d, mlp_dim)
    outputs = tokens if model.pool == "none" else 1
    hidden = model.representation_size or d
    if model.representation_size:
        flops += 2 * outputs * d * hidden
    return flops + 2 * outputs * hidden * (model.num_classes or 0)


def stem_flops(
    image_shape: tuple[int, int, int], num_layers: tuple[int, ...], width_factor: float
) -> tuple[int, tuple[int, int, int]]:
    """Returns the operations of a hybrid's ResNet stem, and the (H, W, C) of its features.

    Args:
        image_shape: (H, W, C).
        num_layers, width_factor: see `resnet.stem`.
    """
    height, width, channels = image_shape

    def conv(features, kernel, stride=1):
        nonlocal height, width, channels
        height, width = height // stride, width // stride
        flops = 2 * height * width * kernel * kernel * channels * features
        channels = features
        return flops

    features = int(64 * width_factor)
    flops = conv(features, 7, 2)
    height, width = height // 2, width // 2  # max pooling
    for i, num_units in enumerate(num_layers):
        for unit in range(num_units):
            stride = 2 if i and not unit else 1
            if channels != 4 * features or stride != 1:  # the projection of the shortcut
                flops += 2 * (height // stride) * (width // stride) * channels * 4 * features
            flops += conv(features, 1) + conv(features, 3, stride) + conv(4 * features, 1)
        features *= 2
    return flops, (height, width, channels)


def block_flops(num_queries: int, num_keys: int, d: int, mlp_dim: int) -> int:
    """Returns the operations of attention from queries to keys, and of the queries' MLP.

    Args:
        num_queries, num_keys: the number of tokens on either side.
        d: the width.
        mlp_dim: the hidden width of the MLP.
    """
    projections = 2 * (2 * num_queries + 2 * num_keys) * d * d  # query and out, key and value
    attention = 2 * 2 * num_queries * num_keys * d  # scores, and the weighted sum
    return projections + attention + 2 * 2 * num_queries * d * mlp_dim
