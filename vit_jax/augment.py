"""What happens to a batch on the device: uint8 images and integer labels become a loss's input.

Everything random is drawn from the key given, for the whole batch at once or for each example
from a key of its own, so that it doesn't depend on how the batch is spread over devices.
"""

import jax
import jax.numpy as jnp

from vit_jax.errors import UserError


def train_inputs(images, labels, key, num_classes: int, config):
    """A training batch as the model and the loss take it.

    Args:
        images: uint8 (N, H, W, C).
        labels: int (N,).
        key: all the randomness.
        num_classes: C of the targets.
        config: `config.augment`, of which mean, std, label_smoothing, erasing, mixup and cutmix
            are for here.

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
        )
    return images, targets


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


def mix(
    images, targets, key, *, mixup_alpha=0.0, cutmix_alpha=0.0, cutmix_prob=0.5, per_example=False
):
    """MixUp (arXiv:1710.09412), CutMix (arXiv:1905.04899), or either by chance.

    Each example is mixed with its neighbour in the batch. Its share lambda is drawn from
    Beta(alpha, alpha), once for the batch (or the part of it that a step accumulates) or for each
    example; the targets are mixed by the share that the pixels really have.

    Args:
        images, targets: (N, H, W, C) and (N, num_classes).
        mixup_alpha, cutmix_alpha: 0 switches one off; where both are on, CutMix is taken with
            probability `cutmix_prob`.
        per_example: whether each example draws its own choice, share and box.
    """
    n = len(images) if per_example else 1
    choice_key, mixup_key, cutmix_key = jax.random.split(key, 3)
    partners, partner_targets = jnp.roll(images, 1, axis=0), jnp.roll(targets, 1, axis=0)

    share = jnp.ones((n, 1))  # of the example itself
    own = jnp.ones((n, 1, 1, 1))  # the same for each pixel
    if mixup_alpha:
        share = jax.random.beta(mixup_key, mixup_alpha, mixup_alpha, (n, 1))
        own = share[:, :, None, None]
    if cutmix_alpha:
        cut = cutmix_box(cutmix_key, n, images.shape[1:3], cutmix_alpha)  # (n, H, W, 1)
        use_cut = jnp.asarray(True)
        if mixup_alpha:
            use_cut = jax.random.bernoulli(choice_key, cutmix_prob, (n, 1))
        share = jnp.where(use_cut, 1.0 - cut.mean(axis=(1, 2)), share)
        own = jnp.where(jnp.reshape(use_cut, (-1, 1, 1, 1)), 1.0 - cut, own)
    images = own * images + (1.0 - own) * partners
    return images, share * targets + (1.0 - share) * partner_targets


def cutmix_box(key, n: int, image_size: tuple[int, int], alpha: float):
    """float32 (n, H, W, 1), 1 inside a box of the image's proportions and area 1 - lambda.

    The box's centre lies anywhere; what is outside the image is cut off.
    """
    share_key, centre_key = jax.random.split(key)
    side = jnp.sqrt(1.0 - jax.random.beta(share_key, alpha, alpha, (n, 1)))
    centre = jax.random.uniform(centre_key, (n, 2))
    size = jnp.array(image_size)
    first = jnp.round((centre - side / 2) * size)  # (n, 2): row, column
    return box(first, jnp.round((centre + side / 2) * size), image_size)


def random_erasing(images, key, prob: float, area: tuple[float, float], fill: str = "zero"):
    """Overwrites a rectangle of each image with probability `prob` (arXiv:1708.04896; Cutout).

    Args:
        images: float (N, H, W, C), normalised.
        area: (least, most) of the image's area; the aspect ratio lies between 0.3 and 1 / 0.3.
        fill: "zero" (the mean, once normalised) or "noise" (a normal draw for each value).
    """

    def rectangle(key):
        apply_key, area_key, ratio_key, place_key, noise_key = jax.random.split(key, 5)
        height, width = images.shape[1:3]
        target = jax.random.uniform(area_key, (), minval=area[0], maxval=area[1]) * height * width
        log_ratio = jax.random.uniform(ratio_key, (), minval=jnp.log(0.3), maxval=-jnp.log(0.3))
        # A rectangle too long for the image keeps its area instead of its ratio.
        rows = jnp.clip(jnp.sqrt(target * jnp.exp(log_ratio)), target / width, height)
        size = jnp.round(jnp.stack([rows, target / rows]))
        room = jnp.array([height, width]) - size
        first = jnp.floor(jax.random.uniform(place_key, (2,)) * (room + 1))
        erased = box(first[None], (first + size)[None], (height, width))[0]
        erased *= jax.random.bernoulli(apply_key, prob)
        return erased, jax.random.normal(noise_key, images.shape[1:])

    erased, noise = jax.vmap(rectangle)(jax.random.split(key, len(images)))
    filling = noise if fill == "noise" else 0.0  # noise that isn't used isn't computed under jit
    return images * (1.0 - erased) + filling * erased


def box(first, last, image_size: tuple[int, int]):
    """first, last (n, 2): row and column -> float32 (n, H, W, 1), 1 in rows first .. last - 1."""
    rows, columns = (jnp.arange(side)[None] for side in image_size)
    inside_rows = (rows >= first[:, :1]) & (rows < last[:, :1])  # (n, H)
    inside_columns = (columns >= first[:, 1:]) & (columns < last[:, 1:])  # (n, W)
    return (inside_rows[:, :, None] & inside_columns[:, None, :])[..., None].astype(jnp.float32)


def check(config) -> None:
    """Raises UserError for settings of `config.augment` that can't be."""
    for name in ("label_smoothing", "erasing_prob", "cutmix_prob"):
        if not 0 <= config[name] <= 1:
            raise UserError(f"config.augment.{name} is {config[name]}; it lies in [0, 1]")
    for name in ("mixup_alpha", "cutmix_alpha"):
        if config[name] < 0:
            raise UserError(f"config.augment.{name} is {config[name]}; it is 0 or more")
    area = tuple(config.erasing_area)
    if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
        raise UserError(f"config.augment.erasing_area is {area}; it takes (least, most) in (0, 1]")
    if config.erasing_fill not in ("zero", "noise"):
        raise UserError(
            f"config.augment.erasing_fill is {config.erasing_fill!r}; it can be 'zero', 'noise'"
        )
