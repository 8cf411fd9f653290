"""What a model costs: parameters and floating-point operations, counted from its fields."""

import jax


def num_params(params) -> int:
    """The number of parameters in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def forward_flops(model, image_shape: tuple[int, int, int]) -> int:
    """Operations of the matrix products for one image (height, width, channels), forward.

    A multiplication and an addition count two. A training step takes three times as many:
    the backward pass multiplies each matrix twice (arXiv:2001.08361, section 2.1).
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


def stem_flops(image_shape, num_layers, width_factor) -> tuple[int, tuple[int, int, int]]:
    """Of a hybrid's ResNet stem, and the shape of its features."""
    height, width, channels = image_shape

    def conv(features, kernel, stride=1):
        nonlocal height, width, channels
        height, width = height // stride, width // stride
        flops = 2 * height * width * kernel * kernel * channels * features
        channels = features
        return flops

    features = int(64 * width_factor)
    flops = conv(features, 7, 2)
    height, width = height // 2, width // 2
    for i, num_units in enumerate(num_layers):
        for unit in range(num_units):
            stride = 2 if i and not unit else 1
            if channels != 4 * features or stride != 1:  # the shortcut
                flops += 2 * (height // stride) * (width // stride) * channels * 4 * features
            flops += conv(features, 1) + conv(features, 3, stride) + conv(4 * features, 1)
        features *= 2
    return flops, (height, width, channels)


def block_flops(queries: int, keys: int, d: int, mlp_dim: int) -> int:
    """Attention of `queries` tokens over `keys`, and the MLP on the queries."""
    projections = 2 * (2 * queries + 2 * keys) * d * d  # query and out, key and value
    attention = 2 * 2 * queries * keys * d  # scores, and the weighted sum
    return projections + attention + 2 * 2 * queries * d * mlp_dim
