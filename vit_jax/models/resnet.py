"""The ResNet stem of the hybrids (arXiv:2010.11929, section 3.1 and Table 6).

A ResNet-v1 of bottleneck units (arXiv:1512.03385) with weight-standardized convolutions
(arXiv:1903.10520) and group norm (arXiv:1803.08494), as in Big Transfer (arXiv:1912.11370).
Parameters have the names of Google's Flax code.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp


def stem(images, num_layers: tuple[int, ...], width_factor: float, dtype):
    """Applies the stem; must be called inside a module.

    Args:
        images: (N, H, W, C).
        num_layers: the number of units of each stage; empty: the root alone. Each stage after the
            first halves the height and width and doubles the channels.
        width_factor: the root has 64 x width_factor channels.
        dtype: the type of the convolutions and activations.

    Returns:
        Features (N, H / s, W / s, C'), with s = `stride(num_layers)`.
    """
    width = int(64 * width_factor)
    x = StdConv(width, (7, 7), 2, dtype, name="conv_root")(images)
    x = nn.relu(nn.GroupNorm(dtype=dtype, name="gn_root")(x))
    x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
    for i, num_units in enumerate(num_layers):
        x = Stage(num_units, width * 2**i, 2 if i else 1, dtype, name=f"block{i + 1}")(x)
    return x


def stride(num_layers: tuple[int, ...]) -> int:
    """Returns the number of pixels per feature along one side of the image."""
    return 4 * 2 ** max(len(num_layers) - 1, 0)


def standardize(kernel):
    """Returns a kernel (h, w, C, features) with mean 0 and deviation 1 for each feature."""
    kernel = kernel - kernel.mean(axis=(0, 1, 2))
    return kernel / (kernel.std(axis=(0, 1, 2)) + 1e-5)


class StdConv(nn.Module):
    """A convolution without bias; its kernel is standardized for each output channel."""

    features: int
    kernel_size: tuple[int, int]
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):  # (N, h, w, C) -> (N, h / stride, w / stride, features)
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        kernel = standardize(kernel)
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class Unit(nn.Module):
    """A bottleneck with a shortcut; its last convolution has 4 x `features` channels."""

    features: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):  # (N, h, w, C) -> (N, h / stride, w / stride, 4 x features)
        conv = functools.partial(StdConv, dtype=self.dtype)
        norm = functools.partial(nn.GroupNorm, dtype=self.dtype)
        shortcut = x
        if x.shape[-1] != 4 * self.features or self.stride != 1:
            shortcut = conv(4 * self.features, (1, 1), self.stride, name="conv_proj")(x)
            shortcut = norm(name="gn_proj")(shortcut)
        x = nn.relu(norm(name="gn1")(conv(self.features, (1, 1), 1, name="conv1")(x)))
        x = nn.relu(norm(name="gn2")(conv(self.features, (3, 3), self.stride, name="conv2")(x)))
        x = conv(4 * self.features, (1, 1), 1, name="conv3")(x)
        x = norm(scale_init=nn.initializers.zeros, name="gn3")(x)
        return nn.relu(shortcut + x)


class Stage(nn.Module):
    """A sequence of units; the first one has the stride."""

    num_units: int
    features: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        for i in range(self.num_units):
            unit_stride = 1 if i else self.stride
            x = Unit(self.features, unit_stride, self.dtype, name=f"unit{i + 1}")(x)
        return x
