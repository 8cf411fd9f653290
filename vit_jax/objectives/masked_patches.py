"""Masked patch prediction: learning without labels (arXiv:2010.11929, section 4.6 and B.1.2).

Of each image, half of the patch embeddings are corrupted: most become a learned [mask] embedding,
some that of another patch of the image, and the rest stay as they are. From the last representation
of each corrupted patch, the model predicts the patch's color.

In shapes, N: images, L: patches, D: width, C: channels, O: outputs for a patch.
"""

import dataclasses
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vit_jax.checks import Range, check_choice, check_complete, check_ranges
from vit_jax.errors import UserError
from vit_jax.models import VisionTransformer
from vit_jax.paths import EMBEDDING, MASK_TOKEN, PATCH_HEAD

TARGETS = ("mean_color", "downsized", "pixels")
SIDE = 4  # of a downsized patch
SHARE = Range(0, 1)
RANGES = {
    "bits": Range(1, 5, whole=True),  # 5 bits of 3 channels are 32,768 classes
    "share": Range(0, 1, above=True),
    "mask_share": SHARE,
    "random_share": SHARE,
}
# Fields that belong to the prediction of classes, with the value that leaves them out.
OF_CLASSES = {
    "loss": "softmax",
    "loss_args": None,
    "augment.label_smoothing": 0.0,
    "augment.mixup_alpha": 0.0,
    "augment.cutmix_alpha": 0.0,
    "augment.erasing_prob": 0.0,
    "model.representation_size": None,
    "model.head_bias_init": 0.0,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The fields of `config.masked_patches`.

    Attributes:
        target: "mean_color", of the whole patch; "downsized", the colors of the patch as 4x4
            pixels; or "pixels", all of the patch, by regression.
        bits: per channel of a color, which is one of 2 ** (bits * channels) classes.
        share: of an image's patches, how many are corrupted.
        mask_share, random_share: of those, how many become the [mask] embedding, and that of
            another patch. The rest are kept.
    """

    target: str = "mean_color"
    bits: int = 3
    share: float = 0.5
    mask_share: float = 0.8
    random_share: float = 0.1

    @property
    def predicts_colors(self) -> bool:
        """Whether the outputs are logits of color classes rather than pixels."""
        return self.target != "pixels"

    def num_colors(self, channels: int) -> int:
        return 2 ** (self.bits * channels)

    def num_outputs(self, patch: tuple[int, int], channels: int) -> int:
        """Returns O for patches of (height, width) pixels."""
        if not self.predicts_colors:
            return math.prod(patch) * channels
        colors = SIDE * SIDE if self.target == "downsized" else 1
        return colors * self.num_colors(channels)

    def num_corrupted(self, num_patches: int) -> int:
        """Returns how many patches of an image are corrupted: the same in each."""
        return max(1, round(self.share * num_patches))


class Corruption(NamedTuple):
    """What happens to the patch embeddings of images.

    Attributes:
        corrupted: which patches are corrupted, and predicted: bool (N, L).
        masked: those that become the [mask] embedding: bool (N, L).
        source: whose embedding each other patch gets; its own, unless it is replaced by another
            one's: int32 (N, L).
    """

    corrupted: jax.Array
    masked: jax.Array
    source: jax.Array

    def apply(self, x, mask_token):  # (N, h, w, D), (1, 1, D) -> (N, h, w, D)
        patches = x.reshape(len(x), -1, x.shape[-1])
        patches = jnp.take_along_axis(patches, self.source[:, :, None], axis=1)
        patches = jnp.where(self.masked[:, :, None], mask_token.astype(x.dtype), patches)
        return patches.reshape(x.shape)


def draw(keys, num_patches: int, settings: Settings) -> Corruption:
    """Draws the corruption of each image from a key of its own.

    Args:
        keys: (N,), so that what an image gets depends neither on the batch nor on the mesh.
        num_patches: L, at least 2.
        settings: the shares.
    """

    def one_image(key):
        choice_key, kind_key, source_key = jax.random.split(key, 3)
        ranks = jax.random.permutation(choice_key, num_patches)
        corrupted = ranks < settings.num_corrupted(num_patches)
        kind = jax.random.uniform(kind_key, (num_patches,))
        masked = corrupted & (kind < settings.mask_share)
        is_replaced = corrupted & ~masked & (kind < settings.mask_share + settings.random_share)
        own = jnp.arange(num_patches)
        other = own + jax.random.randint(source_key, (num_patches,), 1, num_patches)
        return Corruption(corrupted, masked, jnp.where(is_replaced, other % num_patches, own))

    return jax.vmap(one_image)(keys)


def evaluation_keys(index):
    """Returns the keys of examples by their number in the split: each evaluation has the same."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(index)


class MaskedPatchPredictor(VisionTransformer):
    """A Vision Transformer that predicts corrupted patches.

    The encoder's parameters have the names that they have in a classifier; beside them there are
    `mask_token` (1, 1, D), and `patch_head`, which starts at zero.

    Attributes:
        settings: what is predicted. The other fields are those of the model that is trained.
    """

    settings: Settings = Settings()

    @nn.compact
    def __call__(self, images, corruption: Corruption | None = None, *, train: bool = False):
        """Returns the predictions for every patch, float32 (N, L, O).

        Args:
            images, train: see `VisionTransformer`.
            corruption: of the patch embeddings; None: there is none.
        """
        mask_token = self.param(MASK_TOKEN, nn.initializers.normal(stddev=0.02), (1, 1, self.width))

        def corrupt(embed, args, kwargs, context):
            """Corrupts what the layer `embedding` returns, before positions are added."""
            x = embed(*args, **kwargs)
            is_embedding = context.module.path == (EMBEDDING,)
            return corruption.apply(x, mask_token) if corruption and is_embedding else x

        with nn.intercept_methods(corrupt):
            _, captured = super().__call__(images, train=train, capture=("tokens",))
        tokens = captured["tokens"]
        x = tokens[:, self.num_prefix_tokens :].astype(jnp.float32)  # of patches only
        outputs = self.settings.num_outputs(self.patch_shape, images.shape[-1])
        head = nn.Dense(
            outputs, precision="float32", kernel_init=nn.initializers.zeros, name=PATCH_HEAD
        )
        return head(x)


def create(model: VisionTransformer, config) -> MaskedPatchPredictor:
    """Returns the module that trains a model to predict masked patches."""
    fields = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(VisionTransformer)
        if field.name not in ("parent", "name")
    }
    return MaskedPatchPredictor(**fields, settings=Settings(**config.masked_patches))


def describe(config, model, image_shape: tuple[int, int, int]) -> str:
    """Returns a line about what a run predicts, and from how many patches."""
    settings = Settings(**config.masked_patches)
    num_patches = math.prod(model.grid(image_shape))
    height, width = model.patch_shape
    target = f"the {height}x{width} pixels"
    if settings.predicts_colors:
        target = "the mean color" if settings.target == "mean_color" else f"{SIDE}x{SIDE} colors"
        target += f" in {settings.num_colors(image_shape[-1])} classes"
    return (
        f"Objective    masked patches: {target} of {settings.num_corrupted(num_patches)} of "
        f"{num_patches} patches"
    )


def as_patches(images, patch: tuple[int, int]):
    """Cuts images (N, H, W, C) into patches in row order, (N, L, height, width, C)."""
    n, height, width, channels = images.shape
    rows, columns = height // patch[0], width // patch[1]
    x = images.reshape(n, rows, patch[0], columns, patch[1], channels)
    return x.swapaxes(2, 3).reshape(n, rows * columns, *patch, channels)


def as_images(patches, image_shape):
    """Joins patches (N, L, height, width, C) in row order to images (N, H, W, C)."""
    height, width = patches.shape[2:4]
    rows, columns = image_shape[0] // height, image_shape[1] // width
    x = patches.reshape(-1, rows, columns, *patches.shape[2:]).swapaxes(2, 3)
    return x.reshape(-1, *image_shape)


def targets(images, patch: tuple[int, int], settings: Settings):
    """Returns what is to be predicted for each patch.

    Args:
        images: uint8 (N, H, W, C).
        patch: (height, width) of a patch.
        settings: the target.

    Returns:
        The class of each color, int32 (N, L, 1), or (N, L, 16) of downsized patches; or the pixels,
        float32 in [0, 1], (N, L, height * width * C).
    """
    patches = as_patches(images.astype(jnp.float32) / 255.0, patch)
    n, num_patches, height, width, channels = patches.shape
    if not settings.predicts_colors:
        return patches.reshape(n, num_patches, -1)
    side = SIDE if settings.target == "downsized" else 1
    cells = patches.reshape(
        n, num_patches, side, height // side, side, width // side, channels
    ).mean(axis=(3, 5))
    return color_class(cells, settings.bits).reshape(n, num_patches, side * side)


def color_class(colors, bits: int):
    """Returns the class of colors (..., C) in [0, 1]: the first `bits` of each channel, int32."""
    levels = 2**bits
    digits = jnp.clip(jnp.floor(colors * levels), 0, levels - 1).astype(jnp.int32)
    weights = levels ** jnp.arange(colors.shape[-1])[::-1]  # the first channel counts most
    return (digits * weights).sum(axis=-1)


def class_color(classes, bits: int, channels: int):
    """Returns the color in the middle of each class, float32 (..., C) in [0, 1]."""
    levels = 2**bits
    digits = classes[..., None] // levels ** jnp.arange(channels)[::-1] % levels
    return (digits + 0.5) / levels


def predicted_images(outputs, image_shape, patch: tuple[int, int], settings: Settings):
    """Returns predictions as images, (N, H, W, C) in [0, 1], of the most likely color classes.

    Args:
        outputs: (N, L, O).
        image_shape: (H, W, C).
        patch, settings: see `targets`.
    """
    channels, n, cells = image_shape[-1], len(outputs), patch
    if settings.predicts_colors:
        cells = (SIDE, SIDE) if settings.target == "downsized" else (1, 1)
        logits = outputs.reshape(n, -1, *cells, settings.num_colors(channels))
        outputs = class_color(jnp.argmax(logits, axis=-1), settings.bits, channels)
    x = jnp.clip(outputs, 0, 1).reshape(n, -1, *cells, channels)
    x = x.repeat(patch[0] // cells[0], axis=2).repeat(patch[1] // cells[1], axis=3)
    return as_images(x, image_shape)


def losses(outputs, expected, corrupted, settings: Settings) -> dict:
    """Returns the loss and the accuracy of each image, as means over its corrupted patches.

    Args:
        outputs: float32 (N, L, O).
        expected: the result of `targets`.
        corrupted: bool (N, L).
        settings: the target.

    Returns:
        loss: float32 (N,): the cross-entropy of a color, or the mean squared error of the pixels.
        patch_accuracy: float32 (N,), the share of colors that are right; not for "pixels".
    """

    def over_corrupted(values):  # (N, L, number of predictions) -> (N,)
        return values.mean(axis=-1).mean(axis=1, where=corrupted)

    if not settings.predicts_colors:
        return {"loss": over_corrupted((outputs - expected) ** 2)}
    logits = outputs.reshape(*expected.shape, -1)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, expected)
    hits = (jnp.argmax(logits, axis=-1) == expected).astype(jnp.float32)
    return {"loss": over_corrupted(cross_entropy), "patch_accuracy": over_corrupted(hits)}


def check_settings(config) -> None:
    """Raises UserError for an impossible value in `config.masked_patches`."""
    group = "config.masked_patches"
    check_complete(group, config, [field.name for field in dataclasses.fields(Settings)])
    check_choice(f"{group}.target", config.target, TARGETS)
    check_ranges(group, config, RANGES)
    if config.mask_share + config.random_share > 1:
        raise UserError(
            f"{group}.mask_share {config.mask_share} and random_share {config.random_share} add up "
            "to more than 1, all corrupted patches"
        )


def check(config, model: VisionTransformer, image_shape: tuple[int, int, int]) -> None:
    """Raises UserError if a configuration can't predict masked patches.

    Args:
        config: a run's configuration, with valid `masked_patches`.
        model: its VisionTransformer.
        image_shape: (H, W, C).
    """
    objective, patch = "config.objective 'masked_patches'", model.patch_shape
    for field, neutral in OF_CLASSES.items():
        group, _, name = field.rpartition(".")
        value = (config[group] if group else config)[name]
        if value != neutral:
            raise UserError(
                f"config.{field} is {value!r}; it belongs to the prediction of classes: with "
                f"{objective} it must be {neutral!r}"
            )
    if model.resnet is not None:
        raise UserError(
            f"{objective} needs patches of pixels; in a hybrid (config.model.resnet) they "
            "overlap, and would tell what is masked"
        )
    if model.pool not in ("cls", "gap") or model.pool_norm != "before":
        raise UserError(
            f"{objective} predicts from every patch, after the last LayerNorm: config.model.pool "
            "is for the classifier that is fine-tuned later, and must be 'cls' or 'gap', with "
            f"config.model.pool_norm 'before', not {model.pool!r} and {model.pool_norm!r}"
        )
    if model.patch_drop_rate:
        raise UserError(
            f"config.model.patch_drop_rate is {model.patch_drop_rate}; with {objective} it must be "
            "0, since every patch is predicted"
        )
    if config.masked_patches.target == "downsized" and any(side % SIDE for side in patch):
        raise UserError(
            f"config.masked_patches.target is 'downsized', to {SIDE}x{SIDE} pixels; {SIDE} must "
            f"divide the patch size (config.model.patch_size), {patch[0]}x{patch[1]}"
        )
    if config.best_metric == "patch_accuracy" and config.masked_patches.target == "pixels":
        raise UserError(
            "config.best_metric is 'patch_accuracy', which config.masked_patches.target 'pixels' "
            "doesn't have: it must be 'loss'"
        )
    if math.prod(model.grid(image_shape)) < 2:
        raise UserError(
            f"{objective} needs images of several patches; images of {image_shape[0]}x"
            f"{image_shape[1]} (config.image_size) have one patch of {patch[0]}x{patch[1]}: use a "
            "smaller config.model.patch_size"
        )
