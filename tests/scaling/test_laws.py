"""Laws fitted to curves made from known constants."""

import itertools

import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.scaling import laws

LAW = laws.PowerLaw(a=0.63, b=0.32, c=0.12, d=0.52)  # of arXiv:2106.04560, in core-days
JOINT = laws.JointLaw(alpha=0.5, a=0.6, beta=0.02, b=0.7, xi=0.3, c=0.5, epsilon=0.1)
NOISE = 0.02


def with_noise(errors, seed: int):
    return errors * np.exp(NOISE * np.random.default_rng(seed).standard_normal(len(errors)))


def fit_frontier(x, errors, group=None, **keywords):
    """Fits as the command does: to the points that noise may have put off the frontier too."""
    tolerance = laws.noise_tolerance(x, errors, np.zeros(len(x)) if group is None else group)
    chosen = laws.frontier(x, errors, tolerance)
    return laws.fit_power_law(x[chosen], errors[chosen], **keywords)


def test_known_constants_are_found_and_intervals_cover_them():
    x = np.geomspace(0.1, 1e6, 100)
    covered = []
    for seed in range(50):
        fit = fit_frontier(x, with_noise(LAW(x), seed), resamples=120)
        assert fit.law.b == pytest.approx(LAW.b, rel=0.05)
        assert fit.noise == pytest.approx(NOISE, rel=0.3)
        ends = fit.intervals()
        covered.append([ends[n][0] <= value <= ends[n][1] for n, value in LAW._asdict().items()])
    assert np.mean(covered, axis=0).min() >= 0.9


def test_a_law_does_not_depend_on_the_unit_of_compute():
    x = np.geomspace(0.1, 1e4, 30)
    fit = laws.fit_power_law(x, LAW(x), resamples=0).law
    assert fit == pytest.approx(LAW, rel=1e-5)
    scaled = laws.fit_power_law(x * 1e18, LAW(x), resamples=0).law
    assert scaled == pytest.approx((LAW.a * 1e18**LAW.b, LAW.b, LAW.c, LAW.d * 1e18), rel=1e-5)


def test_constants_that_are_zero_are_found():
    x = np.geomspace(1, 1e4, 30)
    law = laws.PowerLaw(0.5, 0.25, 0.0, 0.0)
    assert laws.fit_power_law(x, law(x), resamples=0).law == pytest.approx(law, abs=1e-4)
    fit = laws.fit_power_law(x, law(x), shift=False, resamples=20)
    assert fit.law.d == 0
    assert fit.intervals()["d"] == (0, 0)


@pytest.mark.slow
def test_the_law_of_the_frontier_of_models_that_saturate():
    """Each model touches the frontier at its own compute, and is above it elsewhere."""
    best = np.repeat(np.geomspace(0.3, 1e5, 14), 10)
    x = best * np.tile(np.geomspace(0.1, 30, 10), 14)
    errors = LAW(x) * (1 + 0.15 * np.log10(x / best) ** 2)
    exponents, strict = [], []
    for seed in range(8):
        noisy = with_noise(errors, seed)
        exponents.append(fit_frontier(x, noisy, group=best, resamples=0).law.b)
        lowest = laws.frontier(x, noisy)
        strict.append(laws.fit_power_law(x[lowest], noisy[lowest], resamples=0).law.b)
    assert np.mean(exponents) == pytest.approx(LAW.b, rel=0.05)
    assert abs(np.mean(exponents) - LAW.b) < abs(np.mean(strict) - LAW.b)


def test_the_frontier_keeps_what_noise_explains():
    x = np.array([1, 2, 3, 3, 4.0])
    errors = np.array([0.5, 0.51, 0.4, 0.45, 0.6])
    assert laws.frontier(x, errors).tolist() == [True, False, True, False, False]
    assert laws.frontier(x, errors, 0.05).tolist() == [True, True, True, False, False]
    curve = np.geomspace(1, 1e4, 40)
    one, same = with_noise(LAW(curve), 0), np.zeros(40)
    assert laws.noise_tolerance(curve, one, same) == pytest.approx(3 * NOISE, rel=0.4)
    two = np.where(np.arange(40) % 2, one, 2 * one)
    assert laws.noise_tolerance(curve, two, same) == 0  # a mixture of models
    assert laws.noise_tolerance(curve, two, np.arange(40) % 2) > NOISE


def test_the_joint_law_and_its_optimum():
    sizes, computes = np.array(
        list(itertools.product(np.geomspace(1, 100, 8), np.geomspace(1, 1e4, 8)))
    ).T
    errors = JOINT(sizes, computes)
    assert laws.fit_joint_law(sizes, computes, errors, resamples=0).law == pytest.approx(
        JOINT, 1e-3
    )
    covered = []
    for seed in range(10):
        fit = laws.fit_joint_law(sizes, 1e18 * computes, with_noise(errors, seed), resamples=60)
        assert fit.law.s == pytest.approx(JOINT.s, rel=0.12)
        assert fit.law.optimum(100e18) == pytest.approx(JOINT.optimum(100), rel=0.15)
        low, high = fit.interval(lambda law: law.s)
        covered.append(low <= JOINT.s <= high)
    assert sum(covered) >= 8
    x = np.geomspace(1, 1000, 2000)
    assert JOINT.optimum(100) == pytest.approx(x[JOINT(x, 100).argmin()], rel=0.01)


X = np.geomspace(1, 100, 20)


@pytest.mark.parametrize(
    ("x", "errors", "message"),
    [
        (X[:4], LAW(X[:4]), "too few points for a law of 4 constants: 4; it needs 5"),
        (np.repeat(X[:3], 3), np.repeat(LAW(X[:3]), 3), "at 3 different places; it needs 4"),
        (X, 0.1 * X**0.2, "the error doesn't fall"),
        (X, with_noise(np.full(20, 0.3), 0), "doesn't converge"),
        (X, np.exp(-X / 10), "doesn't converge"),
        (X, np.where(X > 50, 0.0, LAW(X)), "finite and above 0"),
    ],
)
def test_points_without_a_law_are_refused(x, errors, message):
    with pytest.raises(UserError, match=message):
        laws.fit_power_law(x, errors, resamples=50)


def test_a_joint_law_needs_three_sizes():
    with pytest.raises(UserError, match="too few sizes for a joint law: 2; it needs 3"):
        laws.fit_joint_law(np.repeat([1, 2], 10), np.tile(X[:10], 2), np.tile(LAW(X[:10]), 2))
