"""Mixing and erasing on the device: targets that tell what the pixels show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from vit_jax.errors import UserError
from vit_jax.training import augment

N, SIZE, CLASSES = 64, (24, 32), 64


@pytest.fixture(scope="module")
def batch():
    """Image i is filled with the value i and has the label i."""
    values = jnp.arange(N, dtype=jnp.float32)
    images = jnp.broadcast_to(values[:, None, None, None], (N, *SIZE, 3))
    return images, jax.nn.one_hot(jnp.arange(N), CLASSES)


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize(
    "alphas",
    [dict(mixup_alpha=0.8), dict(cutmix_alpha=1.0), dict(mixup_alpha=0.8, cutmix_alpha=1.0)],
)
def test_targets_are_the_shares_of_the_pixels(batch, alphas, per_example):
    images, targets = batch
    for seed in range(5):
        mixed, soft = augment.mix(
            images, targets, jax.random.key(seed), per_example=per_example, **alphas
        )
        np.testing.assert_allclose(soft.sum(axis=1), 1.0, rtol=1e-5)
        np.testing.assert_allclose(
            mixed.mean(axis=(1, 2, 3)), soft @ jnp.arange(N), rtol=1e-4, atol=1e-3
        )
        shares = np.asarray(soft)[np.arange(N), np.arange(N)]
        assert (np.ptp(shares) > 0.1) == per_example


def test_mixup_shares_follow_the_beta_distribution(batch):
    images, targets = batch
    draw = jax.jit(lambda key: augment.mix(images, targets, key, mixup_alpha=0.4, per_example=True))
    shares = np.concatenate(
        [np.diag(np.asarray(draw(jax.random.key(seed))[1])) for seed in range(40)]
    )
    assert abs(shares.mean() - 0.5) < 0.03
    assert shares.var() == pytest.approx(0.25 / (2 * 0.4 + 1), rel=0.05)


def test_cutmix_pastes_a_box_of_the_neighbour(batch):
    images, targets = batch
    mixed, _ = augment.mix(images, targets, jax.random.key(3), cutmix_alpha=1.0, per_example=True)
    for i, image in enumerate(np.asarray(mixed[..., 0])):
        assert set(np.unique(image)) <= {i, (i - 1) % N}
        pasted = image == (i - 1) % N
        rows, columns = pasted.any(1), pasted.any(0)
        np.testing.assert_array_equal(pasted, rows[:, None] & columns)


def test_either_by_chance(batch):
    """A blend has values between two images, a paste only theirs."""
    images, targets = batch
    mixed, _ = augment.mix(
        images,
        targets,
        jax.random.key(0),
        mixup_alpha=1.0,
        cutmix_alpha=1.0,
        cutmix_prob=0.25,
        per_example=True,
    )
    pasted = sum(np.allclose(image[..., 0], np.round(image[..., 0])) for image in np.asarray(mixed))
    assert 6 <= pasted <= 28


@pytest.mark.parametrize("area", [(0.1, 0.4), (0.02, 0.33)])
def test_erased_areas(area):
    images = jnp.ones((500, *SIZE, 3))
    erased = np.asarray(augment.random_erasing(images, jax.random.key(0), 0.6, area))[..., 0] == 0
    shares = erased.mean(axis=(1, 2))
    assert 0.5 < (shares > 0).mean() < 0.7
    shares = shares[shares > 0]
    slack = 0.02  # sides are whole pixels
    assert area[0] - slack <= shares.min() < area[0] + 0.05
    assert area[1] - 0.06 < shares.max() <= area[1] + slack
    ratios = []
    for mask in erased[erased.any(axis=(1, 2))]:
        rows, columns = mask.any(1), mask.any(0)
        np.testing.assert_array_equal(mask, rows[:, None] & columns)
        ratios.append(rows.sum() / columns.sum())
    assert min(ratios) < 0.5
    assert max(ratios) > 1.5
    # Anywhere: every pixel is erased now and then.
    assert erased.mean(axis=0).min() > 0


def test_erasing_with_noise():
    images = jnp.full((200, *SIZE, 3), 5.0)
    out = np.asarray(augment.random_erasing(images, jax.random.key(0), 1.0, (0.2, 0.2), "noise"))
    noise = out[out != 5.0]
    assert noise.size == pytest.approx(0.2 * out.size, rel=0.05)
    assert abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(1.0, abs=0.02)


def test_everything_together_depends_on_the_key_alone():
    config = common.get_config().augment
    config.update(mixup_alpha=0.2, cutmix_alpha=1.0, erasing_prob=0.5, label_smoothing=0.1)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, *SIZE, 3), np.uint8)
    labels = np.arange(8)
    one, two, other = (
        augment.train_inputs(images, labels, jax.random.key(seed), 10, config) for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert not np.array_equal(one[0], other[0])
    np.testing.assert_allclose(one[1].sum(axis=1), 1.0, rtol=1e-5)
    assert one[1].min() >= 0.1 / 10 - 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mixup_alpha=-1.0), "mixup_alpha is -1.0; it is 0 or more"),
        (dict(erasing_prob=1.5), "erasing_prob is 1.5; it lies in"),
        (dict(erasing_area=(0.5, 0.1)), "erasing_area is"),
        (dict(erasing_fill="mean"), "erasing_fill is 'mean'; it can be 'zero', 'noise'"),
    ],
)
def test_mistakes_are_named(change, message):
    config = common.get_config().augment
    config.update(change)
    with pytest.raises(UserError, match=message):
        augment.check(config)
