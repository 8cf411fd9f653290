"""The Vision Transformer (Dosovitskiy et al., arXiv:2010.11929).

Modules and parameters carry the names of Google's Flax code, so that published files load
with little translation. N: images, (h, w): grid of patches, L: tokens, D: width, H: heads.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models import checks, resnet
from vit_jax.models.attention import attend
from vit_jax.models.posemb import sincos_1d, sincos_2d
from vit_jax.sharding import examples_split

xavier_uniform = nn.initializers.xavier_uniform()


class MlpBlock(nn.Module):
    """Two dense layers with a GELU between: the MLP of Eq. 3."""

    mlp_dim: int
    gelu: str = "tanh"
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, key=None):  # (N, L, D) -> (N, L, D)
        dense = functools.partial(
            nn.Dense,
            dtype=self.dtype,
            kernel_init=xavier_uniform,
            bias_init=nn.initializers.normal(stddev=1e-6),
        )
        y = dense(self.mlp_dim)(x)  # (N, L, mlp_dim)
        y = nn.gelu(y, approximate=self.gelu == "tanh")
        y = dropout(y, self.dropout_rate, key)
        return dense(x.shape[-1])(y)


class EncoderBlock(nn.Module):
    """Self-attention and MLP, each in a residual branch: Eq. 2 and 3.

    All its random choices come from the one key it is given, so that a block does the same
    whether it stands in a Python loop, under `nn.scan` or under `nn.remat`.
    """

    num_heads: int
    mlp_dim: int
    norm: str
    gelu: str
    layer_norm_eps: float
    dropout_rate: float
    attention_dropout_rate: float
    attention_impl: str
    dtype: jnp.dtype
    capture: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x, mask, drop_path_rate, key):
        """x (N, L, D); mask (N, L), drop_path_rate () and key, each may be None.

        Without a key nothing is dropped.
        Returns x (N, L, D) and what `capture` asks for: blocks (N, L, D), attention (N, H, L, L).
        """
        layer_norm = functools.partial(nn.LayerNorm, epsilon=self.layer_norm_eps, dtype=self.dtype)
        keys = [None] * 6 if key is None else list(jax.random.split(key, 6))
        weights = [] if "attention" in self.capture else None
        x = examples_split(x)

        def attention(y):  # (N, L, D)
            y = nn.MultiHeadDotProductAttention(
                num_heads=self.num_heads,
                dtype=self.dtype,
                kernel_init=xavier_uniform,
                dropout_rate=self.attention_dropout_rate,
                broadcast_dropout=False,
                deterministic=key is None,
                attention_fn=functools.partial(attend, impl=self.attention_impl, weights=weights),
                name="MultiHeadDotProductAttention_0",
            )(y, mask=None if mask is None else mask[:, None, None, :], dropout_rng=keys[0])
            return drop_path(dropout(y, self.dropout_rate, keys[1]), drop_path_rate, keys[2])

        def mlp(y):  # (N, L, D)
            y = MlpBlock(self.mlp_dim, self.gelu, self.dropout_rate, self.dtype, name="MlpBlock_0")(
                y, keys[3]
            )
            return drop_path(dropout(y, self.dropout_rate, keys[4]), drop_path_rate, keys[5])

        if self.norm == "pre":
            x = x + attention(layer_norm(name="LayerNorm_0")(x))
            x = x + mlp(layer_norm(name="LayerNorm_1")(x))
        else:
            x = layer_norm(name="LayerNorm_0")(x + attention(x))
            x = layer_norm(name="LayerNorm_1")(x + mlp(x))
        x = examples_split(x)
        captured = {"blocks": x, "attention": weights[0] if weights else None}
        return x, {name: captured[name] for name in self.capture}


class AddPositionEmbs(nn.Module):
    """Adds a learned vector to each token, the class token included: Eq. 1."""

    @nn.compact
    def __call__(self, x):  # (N, L, D)
        init = nn.initializers.normal(stddev=0.02)
        return x + self.param("pos_embedding", init, (1, *x.shape[1:])).astype(x.dtype)


class Encoder(nn.Module):
    """Position embedding, blocks, and the last LayerNorm of a pre-norm encoder (Eq. 1-4).

    With `pool_first` the tokens are averaged before that norm, and one comes out.

    A post-norm encoder ends in its last block's norm and has no `encoder_norm`.
    """

    depth: int
    block: dict  # fields of EncoderBlock
    learned_posemb: bool
    pool_first: bool
    dropout_rate: float
    stochastic_depth_rate: float
    scan: bool
    remat: str

    @nn.compact
    def __call__(self, x, mask, train: bool, capture: tuple[str, ...]):
        """x (N, L, D), mask (N, L) or None -> x (N, L, D), captured arrays (depth, N, ...)."""
        if self.learned_posemb:
            x = AddPositionEmbs(name="posembed_input")(x)
        keys = rates = None
        if train and self.uses_randomness():
            keys = jax.random.split(self.make_rng("dropout"), 1 + self.depth)
            x = dropout(x, self.dropout_rate, keys[0])
            keys = keys[1:]
        if self.stochastic_depth_rate:  # linear in depth (arXiv:1603.09382, section 3)
            rates = jnp.linspace(0.0, self.stochastic_depth_rate, self.depth)
        x, captured = self.blocks(x, mask, rates, keys, capture)
        if self.pool_first:
            x = mean_token(x, mask)[:, None]
        if self.block["norm"] == "pre":
            epsilon, dtype = self.block["layer_norm_eps"], self.block["dtype"]
            x = nn.LayerNorm(epsilon=epsilon, dtype=dtype, name="encoder_norm")(x)
        return x, captured

    def blocks(self, x, mask, rates, keys, capture):
        block_cls = EncoderBlock
        if self.remat != "none":
            policy = None if self.remat == "full" else getattr(jax.checkpoint_policies, self.remat)
            block_cls = nn.remat(EncoderBlock, policy=policy, prevent_cse=not self.scan)
        if self.scan:
            block_cls = nn.scan(
                block_cls,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0, 0),
                length=self.depth,
            )
            block = block_cls(**self.block, capture=capture, name="encoderblock")
            return block(x, mask, rates, keys)
        captured = []
        for i in range(self.depth):
            rate, key = jax.tree.map(lambda leaf, i=i: leaf[i], (rates, keys))
            block = block_cls(**self.block, capture=capture, name=f"encoderblock_{i}")
            x, outputs = block(x, mask, rate, key)
            captured.append(outputs)
        return x, {name: jnp.stack([outputs[name] for outputs in captured]) for name in capture}

    def uses_randomness(self) -> bool:
        attention_dropout_rate = self.block["attention_dropout_rate"]
        return bool(self.dropout_rate or attention_dropout_rate or self.stochastic_depth_rate)


class MAPHead(nn.Module):
    """Pools the tokens by attention from one learned query (arXiv:2106.04560, section 3.3)."""

    num_heads: int
    mlp_dim: int
    gelu: str
    layer_norm_eps: float
    attention_impl: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, mask):  # (N, L, D), (N, L) or None -> (N, D)
        probe = self.param("probe", xavier_uniform, (1, 1, x.shape[-1]))
        probe = jnp.broadcast_to(probe, (len(x), 1, x.shape[-1])).astype(x.dtype)
        x = nn.MultiHeadDotProductAttention(
            num_heads=self.num_heads,
            dtype=self.dtype,
            kernel_init=xavier_uniform,
            attention_fn=functools.partial(attend, impl=self.attention_impl),
            name="MultiHeadDotProductAttention_0",
        )(probe, x, mask=None if mask is None else mask[:, None, None, :])
        y = nn.LayerNorm(epsilon=self.layer_norm_eps, dtype=self.dtype, name="LayerNorm_0")(x)
        x = x + MlpBlock(self.mlp_dim, self.gelu, dtype=self.dtype, name="MlpBlock_0")(y)
        return x[:, 0]


class VisionTransformer(nn.Module):
    """Images in, logits out; every choice the field makes for this model is a field.

    Attributes:
        num_classes: units of the head; None: no head, the pooled representation comes out.
        patch_size: pixels, an int or (height, width); in a hybrid, features of the stem.
        resnet: None, or the stem of a hybrid, dict(num_layers=(3, 4, 9), width_factor=1): see
            `resnet.stem`.
        width, depth, num_heads, mlp_dim: the encoder's size; mlp_dim None is 4 x width.
        pool: what the head sees: "cls" the class token, "gap" the mean over patches, "map"
            attention pooling, "none" every token (logits become (N, L, num_classes)).
        pool_norm: where the last LayerNorm stands when pool is "gap": "before" the mean, or
            "after" it (timm's fc_norm).
        posemb: "learned" (a row for the class token), "sincos2d", "sincos1d" or "none".
        norm: "pre" (the paper) or "post" (LayerNorm after each residual sum).
        gelu: "tanh" (Google's) or "exact" (PyTorch's).
        layer_norm_eps: epsilon of every LayerNorm.
        representation_size: width of a tanh layer before the head; None: no such layer.
        head_bias_init: initial bias of the head; its weights start at zero.
        dropout_rate: after the position embedding, in the MLPs and after both branches.
        attention_dropout_rate: on the attention weights.
        stochastic_depth_rate: of the last block, falling linearly to 0 at the first.
        scan: one compiled block looped over; parameters stacked under `encoderblock`.
        remat: "none", "full" (recompute each block in the backward pass), "dots_saveable" or
            "dots_with_no_batch_dims_saveable" (keep the matrix products, recompute the rest).
        attention_impl: of `jax.nn.dot_product_attention`: "xla", "cudnn", or "auto" for JAX's
            choice. Attention dropout and captured attention take the plain computation.
        dtype: of matrix products and activations. Parameters, LayerNorm statistics, softmax
            and logits are float32 whatever it is. A float32 product is one on every device: not
            TF32 on a GPU, not bfloat16 passes on a TPU.
    """

    num_classes: int | None = 1000
    patch_size: int | Sequence[int] = 16
    resnet: dict | None = None
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int | None = None
    pool: str = "cls"
    pool_norm: str = "before"
    posemb: str = "learned"
    norm: str = "pre"
    gelu: str = "tanh"
    layer_norm_eps: float = 1e-6
    representation_size: int | None = None
    head_bias_init: float = 0.0
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    scan: bool = False
    remat: str = "none"
    attention_impl: str = "xla"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images, *, train: bool = False, mask=None, capture: Sequence[str] = ()):
        """Logits of a batch of images.

        Args:
            images: float (N, height, width, channels), sides divisible by the patch.
            train: turns dropout and stochastic depth on; they draw from rngs={"dropout": key}.
            mask: bool (N, L) over the patches in row order; False hides a patch from attention
                and pooling.
            capture: of "blocks" (each block's output, (depth, N, L, D)) and "attention" (each
                block's weights after softmax, (depth, N, H, L, L)); L counts the class token,
                which comes first.

        Returns:
            float32 (N, num_classes); (N, L, num_classes) for pool "none"; (N, D) without a head.
            With `capture`, a pair of that and a dict of the captured arrays.

        Raises:
            UserError: a choice the field doesn't have, or an image the patch doesn't divide.
        """
        checks.check_fields(self)
        checks.check_image(self, images.shape[1:3])
        checks.check_capture(capture)
        precision = "float32" if self.dtype == jnp.float32 else None
        with jax.default_matmul_precision(precision):
            logits, captured = self.logits(images, train, mask, tuple(capture))
        return (logits, captured) if capture else logits

    def logits(self, images, train, mask, capture):
        x, patch = images, self.patch_shape
        if self.resnet is not None:
            x = resnet.stem(x, **self.resnet, dtype=self.dtype)
        x = nn.Conv(
            self.width, patch, strides=patch, padding="VALID", dtype=self.dtype, name="embedding"
        )(x)  # (N, h, w, D)
        n, h, w, d = x.shape
        x = x.reshape(n, h * w, d)
        if self.posemb in ("sincos1d", "sincos2d"):
            table = sincos_1d(h * w, d) if self.posemb == "sincos1d" else sincos_2d(h, w, d)
            x = x + table.astype(x.dtype)
        if self.pool == "cls":
            cls = self.param("cls", nn.initializers.zeros, (1, 1, d)).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(cls, (n, 1, d)), x], axis=1)
            mask = None if mask is None else jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
        x, captured = self.encoder()(x, mask, train, capture)
        x = examples_split(self.pooled(x, mask))
        return examples_split(self.classify(x)), captured

    def encoder(self) -> Encoder:
        shared = ("num_heads", "norm", "gelu", "layer_norm_eps", "dropout_rate")
        shared += ("attention_dropout_rate", "attention_impl", "dtype")
        return Encoder(
            depth=self.depth,
            block={name: getattr(self, name) for name in shared}
            | {"mlp_dim": self.mlp_dim or 4 * self.width},
            learned_posemb=self.posemb == "learned",
            pool_first=self.pool_norm == "after",
            dropout_rate=self.dropout_rate,
            stochastic_depth_rate=self.stochastic_depth_rate,
            scan=self.scan,
            remat=self.remat,
            name="Transformer",
        )

    def pooled(self, x, mask):  # (N, L, D) -> (N, D), or (N, L, D) for pool "none"
        if self.pool == "cls" or self.pool_norm == "after":
            return x[:, 0]
        if self.pool == "gap":
            return mean_token(x, mask)
        if self.pool == "map":
            return MAPHead(
                num_heads=self.num_heads,
                mlp_dim=self.mlp_dim or 4 * self.width,
                gelu=self.gelu,
                layer_norm_eps=self.layer_norm_eps,
                attention_impl=self.attention_impl,
                dtype=self.dtype,
                name="MAPHead_0",
            )(x, mask)
        return x

    def classify(self, x):  # (..., D) -> float32 (..., num_classes)
        x = x.astype(jnp.float32)
        dense = functools.partial(nn.Dense, precision="float32")
        if self.representation_size:
            x = nn.tanh(dense(self.representation_size, name="pre_logits")(x))
        if not self.num_classes:
            return x
        return dense(
            self.num_classes,
            kernel_init=nn.initializers.zeros,
            bias_init=nn.initializers.constant(self.head_bias_init),
            name="head",
        )(x)

    @property
    def patch_shape(self) -> tuple[int, int]:
        patch = self.patch_size
        return tuple(patch) if isinstance(patch, (tuple, list)) else (patch, patch)

    @property
    def token_pixels(self) -> tuple[int, int]:
        """Height and width of the part of the image that a token stands for."""
        stride = 1 if self.resnet is None else resnet.stride(self.resnet["num_layers"])
        return tuple(stride * side for side in self.patch_shape)

    def grid(self, image_size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of tokens in an image of (height, width, ...)."""
        sides = zip(image_size[:2], self.token_pixels, strict=True)
        return tuple(side // pixels for side, pixels in sides)


def mean_token(x, mask):  # (N, L, D), (N, L) or None -> (N, D)
    return jnp.mean(x, axis=1, where=None if mask is None else mask[:, :, None])


def dropout(x, rate, key):
    """Zeroes elements with probability `rate` and scales the rest; key None: the identity."""
    return nn.Dropout(rate, deterministic=key is None)(x, rng=key)


def drop_path(x, rate, key):
    """Stochastic depth (arXiv:1603.09382): drops the whole branch of an example.

    x (N, L, D); `rate` may be traced. Key or rate None: the identity.
    """
    if key is None or rate is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, (len(x), 1, 1))
    return jnp.where(keep, x / (1.0 - rate).astype(x.dtype), 0)
