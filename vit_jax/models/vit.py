"""The Vision Transformer (Dosovitskiy et al., arXiv:2010.11929).

Modules and parameters have the names of Google's Flax code, so that published checkpoints load
with little translation; `vit_jax/paths.py` lists the parameters. In shapes, N: images, (h, w):
the grid of patches, L: tokens, D: width, H: heads.

To add a field, declare and document it in `VisionTransformer`; a field of the blocks is declared in
`EncoderBlock` too, and named in `shared` of `VisionTransformer.encoder`. Give it the same default
in `config.model` of configs/common.py, and a row in RANGES of checks.py, such as `"temperature":
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

from vit_jax.checks import check_choice, size_pair
from vit_jax.errors import UserError
from vit_jax.models import layers, posemb, resnet
from vit_jax.models.attention import ATTENTION_OUTPUT, MultiHeadDotProductAttention
from vit_jax.models.checks import (
    check_fields,
    check_image,
    check_images,
    check_parameters,
    check_tokens_chosen,
)
from vit_jax.parallel.sharding import shard_examples

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

BLOCK_CAPTURES = ("blocks", "attention")
CAPTURES = (*BLOCK_CAPTURES, "tokens")


class EncoderBlock(nn.Module):
    """Self-attention and MLP, each in a residual branch: Eq. 2 and 3.

    All randomness comes from the one key passed in, so a block gives the same result in a Python
    loop, under `nn.scan` and under `nn.remat`.
    """

    num_heads: int
    mlp_dim: int
    norm: str
    norm_layer: str
    gelu: str
    mlp_layer: str
    scale_mlp: bool
    qkv_bias: bool
    qk_norm: bool
    init_values: float | None
    rope: str
    rope_temperature: float
    layer_norm_eps: float
    dropout_rate: float
    attention_dropout_rate: float
    attention_impl: str
    dtype: jnp.dtype
    capture: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x, mask, coords, drop_path_rate, key):
        """Applies the block.

        Args:
            x: (N, L, D).
            mask: bool (N, L), False for tokens to ignore; or None.
            coords: float (N or 1, L, 2), row and column of each token, for `rope`; or None.
            drop_path_rate: float (), the probability of dropping a branch; or None.
            key: the source of all randomness; None drops nothing.

        Returns:
            x (N, L, D), and a dict of what `capture` names: blocks (N, L, D), attention
            (N, H, L, L).
        """
        norm = layers.norm(self.norm_layer, self.layer_norm_eps, self.dtype)
        keys = [None] * 6 if key is None else list(jax.random.split(key, 6))
        weights = [] if "attention" in self.capture else None
        x = shard_examples(x)

        def attention(y):  # (N, L, D)
            y = MultiHeadDotProductAttention(
                self.num_heads,
                layers.xavier_uniform,
                self.dtype,
                self.attention_dropout_rate,
                self.attention_impl,
                self.qkv_bias,
                norm if self.qk_norm else None,
                self.rope,
                self.rope_temperature,
                name="MultiHeadDotProductAttention_0",
            )(y, mask=mask, key=keys[0], weights=weights, coords=coords)
            y = layers.dropout(y, self.dropout_rate, keys[1])
            y = layers.LayerScale(self.init_values, name="LayerScale_0")(y)
            return layers.drop_path(y, drop_path_rate, keys[2])

        def mlp(y):  # (N, L, D)
            y = layers.MlpBlock(
                self.mlp_dim,
                self.gelu,
                self.dropout_rate,
                self.dtype,
                self.mlp_layer,
                norm if self.scale_mlp else None,
                name="MlpBlock_0",
            )(y, keys[3])
            y = layers.dropout(y, self.dropout_rate, keys[4])
            y = layers.LayerScale(self.init_values, name="LayerScale_1")(y)
            return layers.drop_path(y, drop_path_rate, keys[5])

        if self.norm == "pre":
            x = x + attention(norm(name="LayerNorm_0")(x))
            x = x + mlp(norm(name="LayerNorm_1")(x))
        else:
            x = norm(name="LayerNorm_0")(x + attention(x))
            x = norm(name="LayerNorm_1")(x + mlp(x))
        x = shard_examples(x)
        captured = {"blocks": x, "attention": weights[0] if weights else None}
        return x, {name: captured[name] for name in self.capture}


class AddPositionEmbs(nn.Module):
    """Adds a learned vector to each token, including the class token: Eq. 1.

    The tokens from `start` to `stop` have none: registers, or all that aren't patches.
    """

    start: int
    stop: int

    @nn.compact
    def __call__(self, x):  # (N, L, D)
        _, length, d = x.shape
        missing, init = self.stop - self.start, nn.initializers.normal(stddev=0.02)
        table = self.param("pos_embedding", init, (1, length - missing, d)).astype(x.dtype)
        if missing:
            before, after = jnp.split(table, [self.start], axis=1)
            table = jnp.concatenate([before, jnp.zeros((1, missing, d), x.dtype), after], axis=1)
        return x + table


class Encoder(nn.Module):
    """Position embedding, blocks, and the last LayerNorm: Eq. 1-4.

    With `pool_first`, "cls" or "gap", the tokens are pooled before the last LayerNorm. A post-norm
    encoder ends with its last block's LayerNorm and has no `encoder_norm`.
    """

    depth: int
    block: dict  # fields of EncoderBlock
    learned_posemb: bool
    num_prefix_tokens: int
    num_prefix_positions: int
    pre_norm: bool
    pool_first: str | None
    dropout_rate: float
    stochastic_depth_rate: float
    stochastic_depth_profile: str
    scan: bool
    remat: str

    @nn.compact
    def __call__(self, x, mask, coords, keep, train: bool, capture: tuple[str, ...]):
        """Returns x (N, L, D), or (N, 1, D) with `pool_first`, and a dict of captured arrays.

        `keep`, int (N, K), are the indices of the tokens that the blocks see; None: all.
        """
        if self.learned_posemb:
            span = self.num_prefix_positions, self.num_prefix_tokens
            x = AddPositionEmbs(*span, name="posembed_input")(x)
        if keep is not None:
            x, mask, coords = (layers.take_tokens(array, keep) for array in (x, mask, coords))
        keys = rates = None
        if train and self.uses_randomness():
            keys = jax.random.split(self.make_rng("dropout"), 1 + self.depth)
            x = layers.dropout(x, self.dropout_rate, keys[0])
            keys = keys[1:]
        if self.stochastic_depth_rate:
            first = 0.0 if self.stochastic_depth_profile == "linear" else self.stochastic_depth_rate
            rates = jnp.linspace(first, self.stochastic_depth_rate, self.depth)
        norm = layers.norm(*(self.block[n] for n in ("norm_layer", "layer_norm_eps", "dtype")))
        if self.pre_norm:
            x = norm(name="pre_norm")(x).astype(x.dtype)
        in_blocks = tuple(name for name in capture if name in BLOCK_CAPTURES)
        x, captured = self.blocks(x, mask, coords, rates, keys, in_blocks)
        tokens = x
        if self.pool_first == "gap":
            x = layers.mean_patch(x, mask, self.num_prefix_tokens)[:, None]
        elif self.pool_first == "cls":
            x = x[:, :1]
        if self.block["norm"] == "pre":
            x = norm(name="encoder_norm")(x)
        if "tokens" in capture:
            captured["tokens"] = tokens if self.pool_first else x
        return x, captured

    def blocks(self, x, mask, coords, rates, keys, capture):
        block_cls = EncoderBlock
        if policy := REMAT_POLICIES.get(self.remat):
            block_cls = nn.remat(EncoderBlock, policy=policy, prevent_cse=not self.scan)
        if self.scan:
            block_cls = nn.scan(
                block_cls,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, 0, 0),
                length=self.depth,
            )
            block = block_cls(**self.block, capture=capture, name="encoderblock")
            return block(x, mask, coords, rates, keys)
        captured = []
        for i in range(self.depth):
            rate, key = jax.tree.map(lambda leaf, i=i: leaf[i], (rates, keys))  # or None
            block = block_cls(**self.block, capture=capture, name=f"encoderblock_{i}")
            x, outputs = block(x, mask, coords, rate, key)
            captured.append(outputs)
        return x, {name: jnp.stack([outputs[name] for outputs in captured]) for name in capture}

    def uses_randomness(self) -> bool:
        """Whether training draws random numbers; without them, blocks get no key."""
        attention_dropout_rate = self.block["attention_dropout_rate"]
        return bool(self.dropout_rate or attention_dropout_rate or self.stochastic_depth_rate)


class VisionTransformer(nn.Module):
    """The Vision Transformer; `models.create` makes one by name.

    Attributes:
        num_classes: the number of classes; None: there is no head, and the pooled representation
            is returned.
        patch_size: in pixels, an int or (height, width); in a hybrid, in features of the stem.
        resnet: the stem of a hybrid, such as dict(num_layers=(3, 4, 9), width_factor=1), see
            `resnet.stem`; None: no stem.
        width, depth, num_heads, mlp_dim: the size of the encoder. mlp_dim None is 4 x width.
        pool: the input of the head. "cls": the class token; "gap": the mean over patches;
            "cls_gap": both joined (DINOv2's linear head, arXiv:2304.07193); "map": attention
            pooling of the patches; "none": every token, for logits (N, L, num_classes). For
            features of the patches, capture "tokens" instead.
        pool_norm: where the last norm is, if pool is "gap" or "cls": "before" pooling, or "after"
            it (timm's fc_norm).
        class_token: whether there is a class token. None: if pool needs one.
        reg_tokens: the number of register tokens, after the class token (arXiv:2309.16588).
        posemb: position embeddings: "learned" (with a row for the class token), "sincos2d",
            "sincos1d" or "none".
        no_embed_class: whether learned positions have rows for patches only (arXiv:2204.07118).
        embed_reg: whether they have rows for register tokens too, as for DeiT's distillation token.
        rope: rotary positions, alone or beside `posemb` (arXiv:2403.13298): "none"; "axial": half
            of a head's channels turn with the row, half with the column; "mixed": with both, by
            learned frequencies.
        rope_temperature: about how much slower their slowest channels turn than the fastest.
        rope_grid: what they count. "index": patches; (rows, columns): patches of an image resized
            to so many (EVA-02, arXiv:2303.11331); "centered": from -1 to 1, times 2 pi (DINOv3,
            arXiv:2508.10104).
        pre_norm: whether there is a norm before the blocks; the patch embedding then has no bias
            (CLIP, arXiv:2103.00020).
        norm: "pre" (the paper) or "post" (a LayerNorm after each residual sum).
        norm_layer: every norm: "layernorm", or "rmsnorm" (arXiv:1910.07467).
        qkv_bias: whether queries, keys and values have biases (without: arXiv:2302.05442).
        qk_norm: whether each head's queries and keys are normalized (arXiv:2302.05442).
        init_values: the initial scale of each residual branch, such as 1e-5, if there is
            LayerScale (arXiv:2103.17239); None: there is none.
        gelu: the MLP's activation, a key of GELUS: "tanh" (Google's GELU), "exact" (PyTorch's) or
            "quick" (CLIP's).
        mlp_layer: "mlp", or "swiglu": a hidden layer gated by SiLU instead (arXiv:2002.05202).
        scale_mlp: whether there is a norm of the MLP's hidden layer (EVA-02).
        layer_norm_eps: the epsilon of every norm.
        representation_size: the width of a tanh layer before the head; None: no such layer.
        head_bias_init: the initial bias of the head, whose weights start at zero.
        dropout_rate: applied after the position embedding, in the MLPs and after both branches.
        attention_dropout_rate: applied to the attention weights.
        stochastic_depth_rate: the rate of the last block.
        stochastic_depth_profile: the rates of the others: "linear", from 0 at the first
            (arXiv:1603.09382), or "constant" (arXiv:2204.07118).
        patch_drop_rate: the share of an image's patches that training leaves out of the
            computation, drawn anew each time (arXiv:2212.00794).
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
            softmax and logits are always float32.
        residual_dtype: the type of the sum that each block adds to; None: that of `dtype`.
        matmul_precision: of float32 matrix products outside attention kernels, a name of
            `jax.default_matmul_precision`: "highest", "high" or "default" (TF32 on GPUs, one pass
            in bfloat16 on TPUs). None: "highest" if dtype is float32.
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
    class_token: bool | None = None
    reg_tokens: int = 0
    posemb: str = "learned"
    no_embed_class: bool = False
    embed_reg: bool = False
    rope: str = "none"
    rope_temperature: float = 100.0
    rope_grid: str | Sequence[int] = "index"
    pre_norm: bool = False
    norm: str = "pre"
    norm_layer: str = "layernorm"
    qkv_bias: bool = True
    qk_norm: bool = False
    init_values: float | None = None
    gelu: str = "tanh"
    mlp_layer: str = "mlp"
    scale_mlp: bool = False
    layer_norm_eps: float = 1e-6
    representation_size: int | None = None
    head_bias_init: float = 0.0
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    stochastic_depth_profile: str = "linear"
    patch_drop_rate: float = 0.0
    scan: bool = False
    remat: str = "auto"
    attention_impl: str = "auto"
    dtype: jnp.dtype = jnp.float32
    residual_dtype: jnp.dtype | None = None
    matmul_precision: str | None = None

    @nn.compact
    def __call__(
        self, images, *, train: bool = False, mask=None, keep=None, capture: Sequence[str] = ()
    ):
        """Returns the logits of a batch of images.

        Args:
            images: float (N, height, width, channels); the patch size divides height and width.
            train: turns on all that drops something, which draws from rngs={"dropout": key}.
            mask: bool (N, L) over the patches in row order; False hides a patch from attention
                and pooling.
            keep: int (N, K), the indices of each image's patches to compute with, in row order,
                from 0 to L - 1; the others are left out after their positions were added. None:
                all.
            capture: intermediate arrays to return too. "blocks": each block's output, before the
                last LayerNorm, (depth, N, L, D). "attention": each block's weights after
                softmax, (depth, N, H, L, L). "tokens": the input of pooling, (N, L, D): after
                the last norm, or before it if pool_norm is "after". Of L, the class token and
                the registers come first, if there are any.

        Returns:
            float32 (N, num_classes); (N, L, num_classes) if pool is "none"; (N, D) without a
            head. With `capture`, a pair of that and a dict of the captured arrays.

        Raises:
            UserError: images, a mask or indices of another type or shape, indices of no patch,
                images that the patch size doesn't divide or that the parameters aren't for, or an
                unknown capture.
        """
        check_fields(self)
        check_choice("model.remat", self.remat, REMAT)
        check_images(images)
        check_image(self, images.shape[1:3])
        check_parameters(self, self.variables.get("params", {}), images.shape[1:])
        check_tokens_chosen(mask, keep, images.shape[0], math.prod(self.grid(images.shape[1:])))
        if isinstance(capture, str):
            raise UserError(f"capture is {capture!r}; it must be a sequence: ({capture!r},)")
        for name in capture:
            check_choice("capture", name, CAPTURES)
        precision = "highest" if self.dtype == jnp.float32 else None
        with jax.default_matmul_precision(self.matmul_precision or precision):
            logits, captured = self.logits(images, train, mask, keep, tuple(capture))
        return (logits, captured) if capture else logits

    def logits(self, images, train, mask, keep, capture):
        x, patch = images, self.patch_shape
        if self.resnet is not None:
            x = resnet.stem(x, **self.resnet, dtype=self.dtype)
        x = nn.Conv(
            self.width,
            patch,
            strides=patch,
            padding="VALID",
            use_bias=not self.pre_norm,
            dtype=self.dtype,
            name="embedding",
        )(x)  # (N, h, w, D)
        n, h, w, d = x.shape
        x = x.reshape(n, h * w, d).astype(self.residual_dtype or x.dtype)
        if self.posemb in posemb.FIXED:
            positions, _ = posemb.FIXED[self.posemb]
            x = x + positions(h, w, d).astype(x.dtype)
        x = jnp.concatenate([*self.prefix_tokens(n, x.dtype), x], axis=1)
        prefix = (0, 0), (self.num_prefix_tokens, 0)
        if mask is not None:
            mask = jnp.pad(mask, prefix, constant_values=True)
        coords = None
        if self.rope != "none":  # prefix tokens are at the origin, so they don't turn
            coords = jnp.pad(posemb.coordinates(h, w, self.rope_grid), (*prefix, (0, 0)))
        if train and self.patch_drop_rate and keep is None:
            keep = layers.draw_patches(
                self.make_rng("dropout"), n, h * w, 1.0 - self.patch_drop_rate
            )
        if keep is not None:
            keep = jnp.pad(keep + self.num_prefix_tokens, prefix)
            keep = keep.at[:, : self.num_prefix_tokens].set(jnp.arange(self.num_prefix_tokens))
        x, captured = self.encoder()(x, mask, coords, keep, train, capture)
        mask = mask if keep is None else layers.take_tokens(mask, keep)
        x = shard_examples(self.pooled(x, mask))
        return shard_examples(self.classify(x)), captured

    def prefix_tokens(self, n: int, dtype) -> list:
        """Returns the class token, (N, 1, D), and the register tokens, (N, R, D), if any."""
        tokens = []
        for name, count, init in (
            ("cls", int(self.has_class_token), nn.initializers.zeros),
            ("reg_tokens", self.reg_tokens, nn.initializers.normal(stddev=1e-6)),
        ):
            if count:
                token = self.param(name, init, (1, count, self.width)).astype(dtype)
                tokens.append(jnp.broadcast_to(token, (n, count, self.width)))
        return tokens

    def encoder(self) -> Encoder:
        # The fields of EncoderBlock, passed on. A new one must be added here.
        shared = ("num_heads", "norm", "norm_layer", "gelu", "mlp_layer", "scale_mlp", "qkv_bias")
        shared += ("qk_norm", "init_values", "rope", "rope_temperature", "layer_norm_eps")
        shared += ("dropout_rate", "attention_dropout_rate", "attention_impl", "dtype")
        return Encoder(
            depth=self.depth,
            block={name: getattr(self, name) for name in shared}
            | {"mlp_dim": self.mlp_dim or 4 * self.width},
            learned_posemb=self.posemb == "learned",
            num_prefix_tokens=self.num_prefix_tokens,
            num_prefix_positions=self.num_prefix_positions,
            pre_norm=self.pre_norm,
            pool_first=self.pool if self.pool_norm == "after" else None,
            dropout_rate=self.dropout_rate,
            stochastic_depth_rate=self.stochastic_depth_rate,
            stochastic_depth_profile=self.stochastic_depth_profile,
            scan=self.scan,
            remat=self.remat,
            name="Transformer",
        )

    def pooled(self, x, mask):  # (N, L, D) -> (N, D), or (N, 2 D), or (N, L, D): see `pool`
        if self.pool == "cls" or self.pool_norm == "after":
            return x[:, 0]  # the class token, or the only token: the mean
        first = self.num_prefix_tokens
        if self.pool in ("gap", "cls_gap"):
            mean = layers.mean_patch(x, mask, first)
            return mean if self.pool == "gap" else jnp.concatenate([x[:, 0], mean], axis=-1)
        if self.pool == "map":
            return layers.MAPHead(
                num_heads=self.num_heads,
                mlp_dim=self.mlp_dim or 4 * self.width,
                gelu=self.gelu,
                norm_layer=self.norm_layer,
                layer_norm_eps=self.layer_norm_eps,
                attention_impl=self.attention_impl,
                dtype=self.dtype,
                name="MAPHead_0",
            )(x[:, first:], None if mask is None else mask[:, first:])
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
    def has_class_token(self) -> bool:
        needed = self.pool in ("cls", "cls_gap")
        return needed if self.class_token is None else self.class_token

    @property
    def num_prefix_tokens(self) -> int:
        """How many tokens come before the patches: the class token and the registers."""
        return self.has_class_token + self.reg_tokens

    @property
    def num_prefix_positions(self) -> int:
        """How many of them have a learned position."""
        embedded = self.has_class_token + self.reg_tokens * self.embed_reg
        return 0 if self.no_embed_class else embedded

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
        """Returns how many tokens an image of (height, width, ...) has, with the prefix tokens."""
        return math.prod(self.grid(image_size)) + self.num_prefix_tokens
