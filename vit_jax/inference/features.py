"""Features of images for other tasks: one vector per patch, or one per image."""

import jax.numpy as jnp

from vit_jax.errors import UserError


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
    tokens = captured["tokens"]  # (N, L, D)
    patches = tokens[:, 1:] if model.pool == "cls" else tokens
    rows, columns = model.grid(images.shape[1:3])
    return patches.reshape(-1, rows, columns, tokens.shape[-1]).astype(jnp.float32)


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
