"""The Vision Transformer as one would first write it in Flax: the baseline of `train_step.py`.

Not tuned, and not to be: `nn.MultiHeadDotProductAttention`, `optax.adamw`, one `jax.jit`. It is the
model of arXiv:2010.11929, with as many parameters as `models.create` gives.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState


class Block(nn.Module):
    """Attention and MLP, each after a LayerNorm and added to its input."""

    num_heads: int
    mlp_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):  # (N, L, D) -> (N, L, D)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(self.num_heads, dtype=self.dtype)(y)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.gelu(nn.Dense(self.mlp_dim, dtype=self.dtype)(y))
        return x + nn.Dense(x.shape[-1], dtype=self.dtype)(y)


class ViT(nn.Module):
    """Patches, a class token, positions, blocks, and a linear head on the class token."""

    num_classes: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images):  # (N, H, W, C) -> float32 (N, num_classes)
        patch = (self.patch_size, self.patch_size)
        x = nn.Conv(self.width, patch, strides=patch, padding="VALID", dtype=self.dtype)(images)
        x = x.reshape(len(x), -1, self.width)  # (N, L, D)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
        cls = jnp.broadcast_to(cls, (len(x), 1, self.width)).astype(x.dtype)
        x = jnp.concatenate([cls, x], axis=1)  # (N, 1 + L, D)
        positions = self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = x + positions.astype(x.dtype)
        for _ in range(self.depth):
            x = Block(self.num_heads, self.mlp_dim, self.dtype)(x)
        x = nn.LayerNorm(dtype=self.dtype)(x)
        return nn.Dense(self.num_classes)(x[:, 0].astype(jnp.float32))


def loss(model: ViT, params, images, labels):
    """Returns the mean cross-entropy of uint8 images (N, H, W, C) and labels (N,)."""
    logits = model.apply({"params": params}, images / 127.5 - 1.0)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def optimizer(learning_rate: float, weight_decay: float, clip_norm: float):
    """AdamW after clipping the gradient's norm; only kernels decay."""

    def kernels(params):
        return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)

    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, weight_decay=weight_decay, mask=kernels),
    )


def train_step(model: ViT, state: TrainState, images, labels):
    """Returns the state after one update, and the loss before it."""
    value, grads = jax.value_and_grad(loss, argnums=1)(model, state.params, images, labels)
    return state.apply_gradients(grads=grads), value
