"""Augmentation on the device: targets must agree with the pixels."""

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


@pytest.mark.parametrize(
    ("alphas", "per_example"),
    [
        (dict(mixup_alpha=0.8), False),
        (dict(cutmix_alpha=1.0), True),
        (dict(mixup_alpha=0.8, cutmix_alpha=1.0), False),
        (dict(mixup_alpha=0.8, cutmix_alpha=1.0), True),
    ],
)
def test_targets_are_the_shares_of_the_pixels(batch, alphas, per_example):
    images, targets = batch
    draw = jax.jit(lambda key: augment.mix(images, targets, key, per_example=per_example, **alphas))
    for seed in range(5):
        mixed, soft = draw(jax.random.key(seed))
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


def test_cutmix_pastes_a_box_of_the_previous_image(batch):
    images, targets = batch
    mixed, _ = augment.mix(images, targets, jax.random.key(3), cutmix_alpha=1.0, per_example=True)
    for i, image in enumerate(np.asarray(mixed[..., 0])):
        assert set(np.unique(image)) <= {i, (i - 1) % N}
        pasted = image == (i - 1) % N
        rows, columns = pasted.any(1), pasted.any(0)
        np.testing.assert_array_equal(pasted, rows[:, None] & columns)


def test_mixup_or_cutmix_at_random(batch):
    """MixUp makes values between those of two images; CutMix keeps theirs."""
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
    erase = jax.jit(lambda key: augment.random_erasing(images, key, 0.6, area))
    erased = np.asarray(erase(jax.random.key(0)))[..., 0] == 0
    shares = erased.mean(axis=(1, 2))
    assert 0.5 < (shares > 0).mean() < 0.7
    shares = shares[shares > 0]
    slack = 0.02  # sides are rounded to pixels
    assert area[0] - slack <= shares.min() < area[0] + 0.05
    assert area[1] - 0.06 < shares.max() <= area[1] + slack
    ratios = []
    for mask in erased[erased.any(axis=(1, 2))]:
        rows, columns = mask.any(1), mask.any(0)
        np.testing.assert_array_equal(mask, rows[:, None] & columns)
        ratios.append(rows.sum() / columns.sum())
    assert min(ratios) < 0.5
    assert max(ratios) > 1.5
    # Every pixel is erased in some image.
    assert erased.mean(axis=0).min() > 0


def test_erasing_with_noise():
    images = jnp.full((200, *SIZE, 3), 5.0)
    erase = jax.jit(lambda key: augment.random_erasing(images, key, 1.0, (0.2, 0.2), "noise"))
    out = np.asarray(erase(jax.random.key(0)))
    noise = out[out != 5.0]
    assert noise.size == pytest.approx(0.2 * out.size, rel=0.05)
    assert abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(1.0, abs=0.02)


def test_all_randomness_comes_from_the_key():
    config = common.get_config().augment
    config.update(mixup_alpha=0.2, cutmix_alpha=1.0, erasing_prob=0.5, label_smoothing=0.1)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, *SIZE, 3), np.uint8)
    labels = np.arange(8)
    inputs = jax.jit(lambda key: augment.train_inputs(images, labels, key, 10, config))
    one, two, other = (inputs(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert not np.array_equal(one[0], other[0])
    np.testing.assert_allclose(one[1].sum(axis=1), 1.0, rtol=1e-5)
    assert one[1].min() >= 0.1 / 10 - 1e-6


@pytest.mark.slow
def test_repeated_views_are_mixed_with_other_examples():
    config = common.get_config().augment
    config.update(mixup_alpha=1.0, flip=False)
    labels = np.repeat(np.arange(4), 3)
    images = np.zeros((12, *SIZE, 3), np.uint8)
    _, targets = augment.train_inputs(images, labels, jax.random.key(1), 4, config, repeats=3)
    share = targets[0, 0]
    assert 0 < share < 1
    expected = np.eye(4)[labels] * share + np.eye(4)[(labels - 1) % 4] * (1 - share)
    np.testing.assert_allclose(targets, expected, rtol=1e-5)


def test_normalize():
    images = np.array([0, 255, 51], np.uint8).reshape(1, 1, 1, 3)
    np.testing.assert_allclose(augment.normalize(images).ravel(), [-1, 1, -0.6], atol=1e-6)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    out = augment.normalize(images, mean, std).ravel()
    np.testing.assert_allclose(out, (np.array([0, 1, 0.2]) - mean) / std, rtol=1e-5)


def test_label_smoothing():
    targets = np.asarray(augment.soft_labels(np.array([0, 6]), 7, 0.2))
    np.testing.assert_allclose(targets.sum(1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(targets[0], [0.8 + 0.2 / 7] + [0.2 / 7] * 6, rtol=1e-6)


def test_describe_names_what_is_on():
    config = common.get_config().augment
    assert augment.describe(config) == []
    config.update(mixup_alpha=0.2, erasing_prob=0.5, label_smoothing=0.1)
    expected = ["erasing 0.5 of 0.02 to 0.33", "MixUp 0.2", "label smoothing 0.1"]
    assert augment.describe(config) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mixup_alpha=-1.0), "mixup_alpha is -1.0; it must be a number >= 0"),
        (dict(erasing_prob=1.5), "erasing_prob is 1.5; it must be a number >= 0 and <= 1"),
        (dict(erasing_area=(0.5, 0.1)), "erasing_area is"),
        (dict(erasing_fill="mean"), "erasing_fill is 'mean'; it must be 'zero' or 'noise'"),
    ],
)
def test_mistakes_are_named(change, message):
    config = common.get_config().augment
    config.update(change)
    with pytest.raises(UserError, match=message):
        augment.check(config)
