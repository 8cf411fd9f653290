"""Features of images for other tasks: one vector per patch, of any layer, or one per image."""

import jax.numpy as jnp

from vit_jax.checks import Range, check_range
from vit_jax.errors import UserError


def features(model, params, images, layers=None):
    """Returns spatial maps for dense tasks such as segmentation: the outputs of some blocks.

    They are as the next block gets them: before the last LayerNorm, without the class token.

    Args:
        model: a VisionTransformer.
        params: its parameters.
        images: normalized as in training, float32 (N, H, W, C).
        layers: numbers of blocks, 1 to `model.depth`; None: at the quarters of the depth, such as
            (3, 6, 9, 12).

    Returns:
        A tuple with float32 (N, rows, columns, D) for each layer, in the order of `layers`. Rows
        and columns are `model.grid((H, W))`: (H / P, W / P) for patches of P x P pixels.

    Raises:
        UserError: `layers` aren't such numbers.
    """
    layers = quarter_layers(model.depth) if layers is None else layers
    check_layers(layers, model.depth)
    _, captured = model.apply({"params": params}, images, capture=("blocks",))
    return tuple(as_map(model, captured["blocks"][layer - 1], images) for layer in layers)


def quarter_layers(depth: int) -> tuple[int, ...]:
    """Returns the blocks after each quarter of the depth, from 1; fewer if there are fewer."""
    return tuple(sorted({-(-depth * quarter // 4) for quarter in (1, 2, 3, 4)}))


def check_layers(layers, depth: int) -> None:
    """Raises UserError unless `layers` is a tuple or a list of numbers from 1 to `depth`."""
    if not isinstance(layers, (tuple, list)) or not layers:
        raise UserError(
            f"layers is {layers!r}; it must be numbers of blocks, such as {quarter_layers(depth)}"
        )
    for layer in layers:
        check_range("layers: a layer", layer, Range(1, depth, whole=True))


def as_map(model, tokens, images):  # (N, L, D) -> float32 (N, rows, columns, D)
    """Arranges tokens as the patches of their images, without class and register tokens."""
    patches = tokens[:, model.num_prefix_tokens :]
    grid = model.grid(images.shape[1:3])
    return patches.reshape(-1, *grid, tokens.shape[-1]).astype(jnp.float32)


def patch_features(model, params, images):
    """Returns one vector per patch, without the class token: the tokens that the model pools.

    They have passed the last LayerNorm, unless `pool_norm` is "after".

    Args:
        model: a VisionTransformer.
        params: its parameters.
        images: normalized as in training, float32 (N, H, W, C).

    Returns:
        float32 (N, rows, columns, D).
    """
    _, captured = model.apply({"params": params}, images, capture=("tokens",))
    return as_map(model, captured["tokens"], images)


def pooled_features(model, params, images):
    """Returns one vector per image: the input of the head.

    Args:
        model, params, images: see `patch_features`.

    Returns:
        float32 (N, D); (N, representation_size) if the model has a representation layer.

    Raises:
        UserError: a model that doesn't pool.
    """
    if model.pool == "none":
        raise UserError("model.pool is 'none': the model doesn't pool; use patch_features")
    return model.clone(num_classes=None).apply({"params": params}, images)
