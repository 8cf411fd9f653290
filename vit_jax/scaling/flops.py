"""A model's parameters, floating-point operations and activations, counted from its fields.

Operations are those of matrix products and convolutions; a multiplication and an addition count as
two. Tokens are those of whole patches: of 384 pixels, patches of 14 cover 378, as in the papers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vit_jax.errors import UserError


def num_params(params) -> int:
    """Returns the number of parameters in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def count_params(model, image_shape: tuple[int, int, int]) -> int:
    """Returns the number of parameters of a model for images of (H, W, C)."""
    sides = zip(model.grid(image_shape), model.token_pixels, strict=True)
    shape = 1, *(n * pixels for n, pixels in sides), image_shape[-1]
    model = model.clone(scan=True, attention_impl="xla")  # one block is faster to trace
    init = functools.partial(model.init, jax.random.key(0))
    return num_params(jax.eval_shape(init, jax.ShapeDtypeStruct(shape, jnp.float32)))


def check_image(model, image_shape: tuple[int, int, int]) -> None:
    """Raises UserError if images of (H, W, C) are smaller than a patch."""
    if 0 in model.grid(image_shape):
        size, patch = image_shape[:2], model.token_pixels
        raise UserError(
            f"images of {size[0]}x{size[1]} are smaller than a patch of {patch[0]}x{patch[1]}: use "
            "a larger image_size"
        )


def training_tokens(model, image_shape: tuple[int, int, int]) -> int:
    """Returns how many tokens the blocks see in training: without dropped patches."""
    patches = model.num_tokens(image_shape) - model.num_prefix_tokens
    return model.num_prefix_tokens + max(1, int(patches * (1.0 - model.patch_drop_rate)))


def forward_flops(model, image_shape: tuple[int, int, int], num_tokens: int | None = None) -> int:
    """Returns the operations in the forward pass of one image.

    Args:
        model: the VisionTransformer.
        image_shape: (H, W, C).
        num_tokens: how many tokens the blocks see; None: all.
    """
    d, mlp_dim = model.width, model.mlp_dim or 4 * model.width
    tokens = num_tokens or model.num_tokens(image_shape)
    flops = sum(input_flops(model, image_shape))
    flops += model.depth * block_flops(tokens, tokens, d, mlp_dim, model.mlp_layer)
    if model.pool == "map":
        flops += block_flops(1, tokens, d, mlp_dim)
    outputs = tokens if model.pool == "none" else 1
    pooled = 2 * d if model.pool == "cls_gap" else d
    hidden = model.representation_size or pooled
    if model.representation_size:
        flops += 2 * outputs * pooled * hidden
    return flops + 2 * outputs * hidden * (model.num_classes or 0)


def training_flops(model, image_shape: tuple[int, int, int]) -> int:
    """Returns the operations in the forward and the backward pass of one image.

    For each product of the forward pass the backward pass has two, for the gradients of its two
    operands (arXiv:2001.08361, section 2.1); for that of the image only one: an image needs no
    gradient. What `remat` computes again doesn't count. Papers count three times the forward pass.

    Args:
        model, image_shape: see `forward_flops`.
    """
    forward = forward_flops(model, image_shape, training_tokens(model, image_shape))
    return 3 * forward - input_flops(model, image_shape)[0]


def input_flops(model, image_shape: tuple[int, int, int]) -> list[int]:
    """Returns the operations of each layer before the first block: the stem's, the embedding."""
    patches = model.grid(image_shape)[0] * model.grid(image_shape)[1]
    channels, stem = image_shape[-1], []
    if model.resnet is not None:
        stem = stem_convs(image_shape, **model.resnet)
        channels = stem[-1].features
    patch_height, patch_width = model.patch_shape
    embedding = 2 * patches * patch_height * patch_width * channels * model.width
    return [*(conv.flops for conv in stem), embedding]


class Conv(NamedTuple):
    """A convolution of a hybrid's stem, with its output's height and width."""

    height: int
    width: int
    channels: int
    features: int
    kernel: int

    @property
    def outputs(self) -> int:
        return self.height * self.width * self.features

    @property
    def flops(self) -> int:
        return 2 * self.outputs * self.kernel**2 * self.channels


def stem_convs(
    image_shape: tuple[int, int, int], num_layers: tuple[int, ...], width_factor: float
) -> list[Conv]:
    """Returns the convolutions of a hybrid's ResNet stem; the last gives its features.

    Args:
        image_shape: (H, W, C).
        num_layers, width_factor: see `resnet.stem`.
    """
    features = int(64 * width_factor)
    size = halved(image_shape[:2])
    convs = [Conv(*size, image_shape[-1], features, 7)]
    size, channels = halved(size), features  # max pooling
    for i, num_units in enumerate(num_layers):
        for unit in range(num_units):
            before, downsamples = size, i > 0 and unit == 0
            size = halved(size) if downsamples else size
            if channels != 4 * features or downsamples:
                convs.append(Conv(*size, channels, 4 * features, 1))  # the shortcut's projection
            convs.append(Conv(*before, channels, features, 1))
            convs.append(Conv(*size, features, features, 3))
            convs.append(Conv(*size, features, 4 * features, 1))
            channels = 4 * features
        features *= 2
    return convs


def halved(size: tuple[int, int]) -> tuple[int, int]:
    """Returns the output size of a layer with stride 2 and padding "SAME"."""
    return -(-size[0] // 2), -(-size[1] // 2)


def block_flops(
    num_queries: int, num_keys: int, d: int, mlp_dim: int, mlp_layer: str = "mlp"
) -> int:
    """Returns the operations of attention from queries to keys, and of the queries' MLP.

    Args:
        num_queries, num_keys: the number of tokens on either side.
        d: the width.
        mlp_dim: the hidden width of the MLP.
        mlp_layer: "mlp", or "swiglu", which has a third product.
    """
    projections = 2 * (2 * num_queries + 2 * num_keys) * d * d  # query and out, key and value
    attention = 2 * 2 * num_queries * num_keys * d  # scores, and the weighted sum
    products = 3 if mlp_layer == "swiglu" else 2
    return projections + attention + 2 * products * num_queries * d * mlp_dim


def activation_bytes(model, image_shape: tuple[int, int, int], training: bool) -> int:
    """Returns about how much memory the activations of one image take.

    In training, what the blocks and the stem keep for the backward pass if nothing is computed
    again: of each block the two branches' inputs before and after their norms, queries, keys,
    values, the attention's output and the MLP's hidden layer before its activation; of each
    convolution the output, also after its norm. Otherwise, the largest that is in use at once: a
    block's input, its normalized copy and the MLP's hidden layer, or queries, keys and values; or a
    convolution's input and output. A compiler may keep more: docs/scaling.md compares.

    Args:
        model: the VisionTransformer; its `dtype` counts, and `attention_impl`: "xla" keeps the
            scores, in float32, and the weights.
        image_shape: (H, W, C).
        training: whether a backward pass follows.
    """
    item = jnp.dtype(model.dtype).itemsize
    tokens, d = model.num_tokens(image_shape), model.width
    tokens = training_tokens(model, image_shape) if training else tokens
    mlp_dim = model.mlp_dim or 4 * d
    scores = model.num_heads * tokens**2 * (4 + item) if model.attention_impl == "xla" else 0
    convs = [] if model.resnet is None else stem_convs(image_shape, **model.resnet)
    if training:
        hidden = 2 * mlp_dim if model.mlp_layer == "swiglu" else mlp_dim
        block = tokens * (8 * d + hidden) * item + scores
        return model.depth * block + 2 * item * sum(conv.outputs for conv in convs)
    block = max(tokens * (2 * d + mlp_dim) * item, tokens * 5 * d * item + scores)
    pairs = zip(convs, convs[1:], strict=False)
    return max([block, *(item * (a.outputs + b.outputs) for a, b in pairs)])
