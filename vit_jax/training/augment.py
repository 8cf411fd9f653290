"""Augmentation on the device: uint8 images and integer labels -> the model's input and targets.

Everything random is drawn from the given key, in shapes that don't depend on how the batch is
sharded. What happens before, on the host (crops, flips, RandAugment), is in
`vit_jax/data/preprocess/views.py`.

To add one, apply it in `train_inputs`, and extend RANGES and `describe`; its settings go into
`config.augment` in configs/common.py; `check` checks those that aren't numbers. For its randomness,
use `jax.random.split(key, 3)` in `train_inputs`: its first two keys are those of `split(key)`, so
the other augmentations draw the same values as before.
"""

import jax
import jax.numpy as jnp

from vit_jax import checks

ERASING_FILLS = ("zero", "noise")
RANGES = {
    "label_smoothing": checks.Range(0, 1, below=True),
    "mixup_alpha": checks.NON_NEGATIVE,
    "cutmix_alpha": checks.NON_NEGATIVE,
    "cutmix_prob": checks.SHARE,
    "erasing_prob": checks.SHARE,
}


def train_inputs(images, labels, key, num_classes: int, config, repeats: int = 1):
    """Returns a training batch as the model and the loss take it.

    Args:
        images: uint8 (N, H, W, C).
        labels: int (N,).
        key: the source of all randomness.
        num_classes: the number of classes.
        config: `config.augment`.
        repeats: how many views of an example follow each other in the batch.

    Returns:
        float32 images (N, H, W, C) and targets (N, num_classes), each target summing to 1.
    """
    erase_key, mix_key = jax.random.split(key)
    images = normalize(images, config.mean, config.std)
    targets = soft_labels(labels, num_classes, config.label_smoothing)
    if config.erasing_prob:
        area, fill = tuple(config.erasing_area), config.erasing_fill
        images = random_erasing(images, erase_key, config.erasing_prob, area, fill)
    if config.mixup_alpha or config.cutmix_alpha:
        images, targets = mix(
            images,
            targets,
            mix_key,
            mixup_alpha=config.mixup_alpha,
            cutmix_alpha=config.cutmix_alpha,
            cutmix_prob=config.cutmix_prob,
            per_example=config.mix_per_example,
            distance=repeats,
        )
    return images, targets


def check(config) -> None:
    """Raises UserError for invalid settings of `config.augment` that apply on the device."""
    checks.check_ranges("config.augment", config, RANGES)
    checks.check_interval("config.augment.erasing_area", config.erasing_area)
    checks.check_choice("config.augment.erasing_fill", config.erasing_fill, ERASING_FILLS)


def describe(config) -> list[str]:
    """Returns a few words for each augmentation of `config.augment` that is on."""
    low, high = config.erasing_area
    settings = (
        (config.erasing_prob, f"erasing {config.erasing_prob:g} of {low:g} to {high:g}"),
        (config.mixup_alpha, f"MixUp {config.mixup_alpha:g}"),
        (config.cutmix_alpha, f"CutMix {config.cutmix_alpha:g}"),
        (config.label_smoothing, f"label smoothing {config.label_smoothing:g}"),
    )
    return [words for is_on, words in settings if is_on]


def normalize(images, mean=0.5, std=0.5):
    """Returns (images / 255 - mean) / std as float32.

    Args:
        images: uint8 (N, H, W, C).
        mean, std: one number, or one per channel. The defaults give [-1, 1], as Google's models
            expect.
    """
    mean, std = (jnp.asarray(value, jnp.float32) for value in (mean, std))
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def soft_labels(labels, num_classes: int, smoothing: float = 0.0):
    """Returns one-hot labels, smoothed (arXiv:1512.00567, section 7): float32 (N, num_classes).

    Args:
        labels: int (N,).
        smoothing: the probability that is spread evenly over all classes.
    """
    targets = jax.nn.one_hot(labels, num_classes)
    return targets * (1.0 - smoothing) + smoothing / num_classes


def mix(
    images,
    targets,
    key,
    *,
    mixup_alpha=0.0,
    cutmix_alpha=0.0,
    cutmix_prob=0.5,
    per_example=False,
    distance: int = 1,
):
    """Applies MixUp (arXiv:1710.09412) or CutMix (arXiv:1905.04899), or one of them at random.

    Each example is mixed with the one `distance` before it in the batch. Lambda, its own share, is
    drawn from Beta(alpha, alpha). Targets are mixed by each example's actual share of the pixels.

    Args:
        images, targets: (N, H, W, C) and (N, num_classes).
        mixup_alpha, cutmix_alpha: 0 turns one off. If both are on, CutMix is chosen with
            probability `cutmix_prob`.
        per_example: whether every example draws its own choice, lambda and box, instead of one
            per batch (per microbatch, with accumulation).
        distance: how far the two are from each other.
    """
    n = len(images) if per_example else 1
    choice_key, mixup_key, cutmix_key = jax.random.split(key, 3)
    partners, partner_targets = (jnp.roll(array, distance, axis=0) for array in (images, targets))

    share = jnp.ones((n, 1))  # lambda
    pixel_share = jnp.ones((n, 1, 1, 1))  # the same for each pixel
    if mixup_alpha:
        share = jax.random.beta(mixup_key, mixup_alpha, mixup_alpha, (n, 1))
        pixel_share = share[:, :, None, None]
    if cutmix_alpha:
        cut = cutmix_box(cutmix_key, n, images.shape[1:3], cutmix_alpha)  # (n, H, W, 1)
        use_cut = jnp.asarray(True)
        if mixup_alpha:
            use_cut = jax.random.bernoulli(choice_key, cutmix_prob, (n, 1))
        share = jnp.where(use_cut, 1.0 - cut.mean(axis=(1, 2)), share)
        pixel_share = jnp.where(jnp.reshape(use_cut, (-1, 1, 1, 1)), 1.0 - cut, pixel_share)
    images = pixel_share * images + (1.0 - pixel_share) * partners
    return images, share * targets + (1.0 - share) * partner_targets


def cutmix_box(key, n: int, image_size: tuple[int, int], alpha: float):
    """Returns float32 (n, H, W, 1): 1 in a box with the image's aspect ratio, area 1 - lambda.

    The box's center is uniform over the image; the part of the box outside the image is cut off.
    """
    share_key, center_key = jax.random.split(key)
    side = jnp.sqrt(1.0 - jax.random.beta(share_key, alpha, alpha, (n, 1)))
    center = jax.random.uniform(center_key, (n, 2))
    size = jnp.array(image_size)
    first = jnp.round((center - side / 2) * size)  # (n, 2): row, column
    return box(first, jnp.round((center + side / 2) * size), image_size)


def random_erasing(images, key, prob: float, area: tuple[float, float], fill: str = "zero"):
    """Overwrites a rectangle of each image with probability `prob` (arXiv:1708.04896).

    Args:
        images: float (N, H, W, C), normalized.
        area: (smallest, largest) share of the image's area. The aspect ratio is between 0.3 and
            1 / 0.3.
        fill: "zero" (the mean, since images are normalized) or "noise" (a normal sample per value).
    """

    def rectangle(key):
        apply_key, area_key, ratio_key, place_key, noise_key = jax.random.split(key, 5)
        height, width = images.shape[1:3]
        target = jax.random.uniform(area_key, (), minval=area[0], maxval=area[1]) * height * width
        log_ratio = jax.random.uniform(ratio_key, (), minval=jnp.log(0.3), maxval=-jnp.log(0.3))
        # A rectangle too long for the image keeps its area, not its ratio.
        rows = jnp.clip(jnp.sqrt(target * jnp.exp(log_ratio)), target / width, height)
        size = jnp.round(jnp.stack([rows, target / rows]))
        room = jnp.array([height, width]) - size
        first = jnp.floor(jax.random.uniform(place_key, (2,)) * (room + 1))
        erased = box(first[None], (first + size)[None], (height, width))[0]
        erased *= jax.random.bernoulli(apply_key, prob)
        return erased, jax.random.normal(noise_key, images.shape[1:])

    erased, noise = jax.vmap(rectangle)(jax.random.split(key, len(images)))
    filling = noise if fill == "noise" else 0.0  # unused noise isn't computed under jit
    return images * (1.0 - erased) + filling * erased


def box(first, last, image_size: tuple[int, int]):
    """Returns float32 (n, H, W, 1): 1 in rows and columns first .. last - 1.

    Args:
        first, last: (n, 2), row and column.
    """
    rows, columns = (jnp.arange(side)[None] for side in image_size)
    in_rows = (rows >= first[:, :1]) & (rows < last[:, :1])  # (n, H)
    in_columns = (columns >= first[:, 1:]) & (columns < last[:, 1:])  # (n, W)
    return (in_rows[:, :, None] & in_columns[:, None, :])[..., None].astype(jnp.float32)
