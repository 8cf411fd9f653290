"""The Vision Transformer (Dosovitskiy et al., arXiv:2010.11929).

Modules and parameters have the names of Google's Flax code, so that published checkpoints load
with little translation; `vit_jax/paths.py` lists the parameters. In shapes, N: images, (h, w):
the grid of patches, L: tokens, D: width, H: heads.

To add a field, declare and document it in `VisionTransformer`; a field of the blocks is declared in
`EncoderBlock` too, and named in `shared` of `VisionTransformer.encoder`. Give it the same default
in `config.model` of configs/common.py, and a row in RANGES of checks.py, such as `"layer_scale":
Range(0, 1)`, or in CHOICES there. A parameter of a block also needs its name in BLOCK_PARAMETERS of
vit_jax/paths.py, such as `"gamma": P(None)` for `self.param("gamma", ...)`: an axis for each of its
own, not for the layers that `scan` stacks.
"""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.checks import check_choice, lookup, size_pair
from vit_jax.errors import UserError
from vit_jax.models import posemb, resnet
from vit_jax.models.attention import ATTENTION_OUTPUT, MultiHeadDotProductAttention
from vit_jax.models.checks import check_fields, check_image, check_images, check_parameters
from vit_jax.parallel.sharding import shard_examples

xavier_uniform = nn.initializers.xavier_uniform()

# What the backward pass keeps of a block, for each value of the field `remat` that recomputes the
# rest. An attention kernel isn't a matrix product to JAX: its output is kept by name.
WITH_WEIGHTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
REMAT_POLICIES = {
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_and_attention": jax.checkpoint_policies.save_from_both_policies(
        WITH_WEIGHTS, jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT)
    ),
    "dots_with_no_batch_dims_saveable": WITH_WEIGHTS,
    "full": jax.checkpoint_policies.nothing_saveable,
}
REMAT = ("auto", "none", *REMAT_POLICIES)

# The MLP's activations: the values of the field `gelu`, named so in every recorded configuration.
# To add one, give it a row here, and its formula a row of ACTIVATIONS in
# tests/models/test_models.py.
GELUS = {
    "tanh": functools.partial(nn.gelu, approximate=True),  # Google's and big_vision's
    "exact": functools.partial(nn.gelu, approximate=False),  # PyTorch's default
}

BLOCK_CAPTURES = ("blocks", "attention")
CAPTURES = (*BLOCK_CAPTURES, "tokens")


class MlpBlock(nn.Module):
    """Two dense layers with an activation in between: the MLP of Eq. 3."""

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
        y = dense(self.mlp_dim, name="Dense_0")(x)  # (N, L, mlp_dim)
        y = lookup("model.gelu", self.gelu, GELUS)(y)
        y = dropout(y, self.dropout_rate, key)
        return dense(x.shape[-1], name="Dense_1")(y)


class EncoderBlock(nn.Module):
    """Self-attention and MLP, each in a residual branch: Eq. 2 and 3.

    All randomness comes from the one key passed in, so a block gives the same result in a Python
    loop, under `nn.scan` and under `nn.remat`.
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
        """Applies the block.

        Args:
            x: (N, L, D).
            mask: bool (N, L), False for tokens to ignore; or None.
            drop_path_rate: float (), the probability of dropping a branch; or None.
            key: the source of all randomness; None drops nothing.

        Returns:
            x (N, L, D), and a dict of what `capture` names: blocks (N, L, D), attention
            (N, H, L, L).
        """
        layer_norm = functools.partial(nn.LayerNorm, epsilon=self.layer_norm_eps, dtype=self.dtype)
        keys = [None] * 6 if key is None else list(jax.random.split(key, 6))
        weights = [] if "attention" in self.capture else None
        x = shard_examples(x)

        def attention(y):  # (N, L, D)
            y = MultiHeadDotProductAttention(
                self.num_heads,
                xavier_uniform,
                self.dtype,
                self.attention_dropout_rate,
                self.attention_impl,
                name="MultiHeadDotProductAttention_0",
            )(y, mask=mask, key=keys[0], weights=weights)
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
        x = shard_examples(x)
        captured = {"blocks": x, "attention": weights[0] if weights else None}
        return x, {name: captured[name] for name in self.capture}


class AddPositionEmbs(nn.Module):
    """Adds a learned vector to each token, including the class token: Eq. 1."""

    @nn.compact
    def __call__(self, x):  # (N, L, D)
        init = nn.initializers.normal(stddev=0.02)
        return x + self.param("pos_embedding", init, (1, *x.shape[1:])).astype(x.dtype)


class Encoder(nn.Module):
    """Position embedding, blocks, and the last LayerNorm: Eq. 1-4.

    With `pool_first` the tokens are averaged before the last LayerNorm. A post-norm encoder ends
    with its last block's LayerNorm and has no `encoder_norm`.
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
        """Returns x (N, L, D), or (N, 1, D) with `pool_first`, and a dict of captured arrays."""
        if self.learned_posemb:
            x = AddPositionEmbs(name="posembed_input")(x)
        keys = rates = None
        if train and self.uses_randomness():
            keys = jax.random.split(self.make_rng("dropout"), 1 + self.depth)
            x = dropout(x, self.dropout_rate, keys[0])
            keys = keys[1:]
        if self.stochastic_depth_rate:  # linear in depth (arXiv:1603.09382, section 3)
            rates = jnp.linspace(0.0, self.stochastic_depth_rate, self.depth)
        in_blocks = tuple(name for name in capture if name in BLOCK_CAPTURES)
        x, captured = self.blocks(x, mask, rates, keys, in_blocks)
        tokens = x
        if self.pool_first:
            x = mean_token(x, mask)[:, None]
        if self.block["norm"] == "pre":
            epsilon, dtype = self.block["layer_norm_eps"], self.block["dtype"]
            x = nn.LayerNorm(epsilon=epsilon, dtype=dtype, name="encoder_norm")(x)
        if "tokens" in capture:
            captured["tokens"] = tokens if self.pool_first else x
        return x, captured

    def blocks(self, x, mask, rates, keys, capture):
        block_cls = EncoderBlock
        if policy := REMAT_POLICIES.get(self.remat):
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
            rate, key = jax.tree.map(lambda leaf, i=i: leaf[i], (rates, keys))  # or None
            block = block_cls(**self.block, capture=capture, name=f"encoderblock_{i}")
            x, outputs = block(x, mask, rate, key)
            captured.append(outputs)
        return x, {name: jnp.stack([outputs[name] for outputs in captured]) for name in capture}

    def uses_randomness(self) -> bool:
        """Whether training draws random numbers; without them, blocks get no key."""
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
        probe = jnp.broadcast_to(probe, (x.shape[0], 1, x.shape[-1])).astype(x.dtype)
        x = MultiHeadDotProductAttention(
            self.num_heads,
            xavier_uniform,
            self.dtype,
            impl=self.attention_impl,
            name="MultiHeadDotProductAttention_0",
        )(probe, x, mask=mask)
        y = nn.LayerNorm(epsilon=self.layer_norm_eps, dtype=self.dtype, name="LayerNorm_0")(x)
        x = x + MlpBlock(self.mlp_dim, self.gelu, dtype=self.dtype, name="MlpBlock_0")(y)
        return x[:, 0]


class VisionTransformer(nn.Module):
    """The Vision Transformer; `models.create` makes one by name.

    Attributes:
        num_classes: the number of classes; None: there is no head, and the pooled representation
            is returned.
        patch_size: in pixels, an int or (height, width); in a hybrid, in features of the stem.
        resnet: the stem of a hybrid, such as dict(num_layers=(3, 4, 9), width_factor=1), see
            `resnet.stem`; None: no stem.
        width, depth, num_heads, mlp_dim: the size of the encoder. mlp_dim None is 4 x width.
        pool: the input of the head. "cls": the class token; "gap": the mean over patches; "map":
            attention pooling; "none": every token, for logits (N, L, num_classes). For
            features of the patches, capture "tokens" instead.
        pool_norm: where the last LayerNorm is, if pool is "gap": "before" the mean, or "after" it
            (timm's fc_norm).
        posemb: position embeddings: "learned" (with a row for the class token), "sincos2d",
            "sincos1d" or "none".
        norm: "pre" (the paper) or "post" (a LayerNorm after each residual sum).
        gelu: the MLP's activation, a key of GELUS: "tanh" (Google's GELU) or "exact" (PyTorch's).
        layer_norm_eps: the epsilon of every LayerNorm.
        representation_size: the width of a tanh layer before the head; None: no such layer.
        head_bias_init: the initial bias of the head, whose weights start at zero.
        dropout_rate: applied after the position embedding, in the MLPs and after both branches.
        attention_dropout_rate: applied to the attention weights.
        stochastic_depth_rate: the rate of the last block, decreasing linearly to 0 at the first.
        scan: loops over one compiled block; parameters are stacked under `encoderblock`.
        remat: what the backward pass recomputes, to save memory. "none"; "full": all of each
            block; "dots_and_attention": all but the matrix products with the weights and the
            attention output; "dots_with_no_batch_dims_saveable": the attention output too;
            "dots_saveable": all but matrix products, which without an attention kernel include the
            scores. "auto": in training, the first of "none", "dots_and_attention" and "full" that
            fits the device's memory; elsewhere "none".
        attention_impl: how attention is computed: "pallas" (a TPU kernel), "cudnn" (on an NVIDIA
            GPU, in bfloat16) or "xla"; "auto" is the fastest that the device has. It doesn't
            change what a model computes, except for rounding. Attention dropout and captured
            attention use a plain implementation instead.
        dtype: the type of matrix products and activations. Parameters, LayerNorm statistics,
            softmax and logits are always float32. If it is float32, matrix products have full
            precision: no TF32 on GPUs, no bfloat16 passes on TPUs.
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
    remat: str = "auto"
    attention_impl: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images, *, train: bool = False, mask=None, capture: Sequence[str] = ()):
        """Returns the logits of a batch of images.

        Args:
            images: float (N, height, width, channels); the patch size divides height and width.
            train: turns on dropout and stochastic depth, which draw from rngs={"dropout": key}.
            mask: bool (N, L) over the patches in row order; False hides a patch from attention
                and pooling.
            capture: intermediate arrays to return too. "blocks": each block's output, before the
                last LayerNorm, (depth, N, L, D). "attention": each block's weights after
                softmax, (depth, N, H, L, L). "tokens": the input of pooling, (N, L, D): after
                the last LayerNorm, or before it if pool_norm is "after". The class token, if
                there is one, comes first in L.

        Returns:
            float32 (N, num_classes); (N, L, num_classes) if pool is "none"; (N, D) without a
            head. With `capture`, a pair of that and a dict of the captured arrays.

        Raises:
            UserError: images of another type or shape, images that the patch size doesn't divide
                or that the parameters aren't for, or an unknown capture.
        """
        check_fields(self)
        check_choice("model.remat", self.remat, REMAT)
        check_images(images)
        check_image(self, images.shape[1:3])
        check_parameters(self, self.variables.get("params", {}), images.shape[1:])
        if isinstance(capture, str):
            raise UserError(f"capture is {capture!r}; it must be a sequence: ({capture!r},)")
        for name in capture:
            check_choice("capture", name, CAPTURES)
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
        if self.posemb in posemb.FIXED:
            positions, _ = posemb.FIXED[self.posemb]
            x = x + positions(h, w, d).astype(x.dtype)
        if self.pool == "cls":
            cls = self.param("cls", nn.initializers.zeros, (1, 1, d)).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(cls, (n, 1, d)), x], axis=1)
            mask = None if mask is None else jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
        x, captured = self.encoder()(x, mask, train, capture)
        x = shard_examples(self.pooled(x, mask))
        return shard_examples(self.classify(x)), captured

    def encoder(self) -> Encoder:
        # The fields of EncoderBlock, passed on. A new one must be added here.
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

    def pooled(self, x, mask):  # (N, L, D) -> (N, D); (N, L, D) if pool is "none"
        if self.pool == "cls" or self.pool_norm == "after":
            return x[:, 0]  # the class token, or the only token: the mean
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
        """Height and width of a patch; in a hybrid, in features of the stem."""
        return size_pair("model.patch_size", self.patch_size)

    @property
    def token_pixels(self) -> tuple[int, int]:
        """Height and width in pixels of the part of an image that a token represents."""
        stride = 1 if self.resnet is None else resnet.stride(self.resnet["num_layers"])
        return tuple(stride * side for side in self.patch_shape)

    def grid(self, image_size: Sequence[int]) -> tuple[int, int]:
        """Returns the rows and columns of tokens of an image of (height, width, ...)."""
        sides = zip(image_size[:2], self.token_pixels, strict=True)
        return tuple(side // pixels for side, pixels in sides)

    def num_tokens(self, image_size: Sequence[int]) -> int:
        """Returns how many tokens an image of (height, width, ...) has, with the class token."""
        return math.prod(self.grid(image_size)) + (self.pool == "cls")


def mean_token(x, mask):  # (N, L, D), (N, L) or None -> (N, D)
    return jnp.mean(x, axis=1, where=None if mask is None else mask[:, :, None])


def dropout(x, rate, key):
    """Zeroes elements with probability `rate`, and scales up the rest; no-op without a key."""
    return nn.Dropout(rate, deterministic=key is None)(x, rng=key)


def drop_path(x, rate, key):
    """Stochastic depth (arXiv:1603.09382): drops the whole branch of an example.

    Args:
        x: (N, L, D).
        rate: float (), may be traced; None: the identity.
        key: None: the identity.
    """
    if key is None or rate is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, (len(x), 1, 1))
    return jnp.where(keep, x / (1.0 - rate).astype(x.dtype), 0)
