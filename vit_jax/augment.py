"""What happens to a batch on the device: uint8 images and integer labels become a loss's input."""

import jax
import jax.numpy as jnp


def normalize(images, mean=0.5, std=0.5):
    """uint8 (N, H, W, C) -> float32 (images / 255 - mean) / std.

    mean, std: a number, or one a channel. The defaults give [-1, 1], as Google's models expect.
    """
    mean, std = (jnp.asarray(value, jnp.float32) for value in (mean, std))
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def soft_labels(labels, num_classes: int, smoothing: float = 0.0):
    """int (N,) -> float32 (N, C): 1 - smoothing on the label, plus smoothing / C everywhere.

    Label smoothing as in Szegedy et al., arXiv:1512.00567, section 7.
    """
    targets = jax.nn.one_hot(labels, num_classes)
    return targets * (1.0 - smoothing) + smoothing / num_classes
