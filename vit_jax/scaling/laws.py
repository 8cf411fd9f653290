"""Laws of how a model's error falls, fitted in log space, with bootstrap intervals.

`PowerLaw` is the saturating power law of "Scaling Vision Transformers" (arXiv:2106.04560, section
2.1), `JointLaw` the law in a shape's dimension and in compute of "Getting ViT in Shape"
(arXiv:2305.13035, section 3).
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize

from vit_jax.errors import UserError

RESAMPLES = 500
LEVEL = 0.95  # the share of fits whose intervals hold all constants of the law at once
MAX_EXPONENT = 10.0  # a larger one is an exponential, which the data don't bound
MAX_NOISE = 0.05  # points that scatter more can't be told from points off the frontier
TINY = 1e-4  # `c` and `d` below this share of the smallest error and `x` are 0


class PowerLaw(NamedTuple):
    """E = a (x + d)^-b + c."""

    a: float
    b: float
    c: float
    d: float

    def __call__(self, x):
        return self.a * (np.asarray(x) + self.d) ** -self.b + self.c

    @property
    def is_bounded(self) -> bool:
        """Whether the constants are what data can tell apart from a constant or exponential."""
        return 0 < self.b < MAX_EXPONENT and bool(np.all(np.isfinite(self)))


class JointLaw(NamedTuple):
    """E = alpha x^-a + (beta x^b + xi) t^-c + epsilon, of a dimension x and compute t."""

    alpha: float
    a: float
    beta: float
    b: float
    xi: float
    c: float
    epsilon: float

    def __call__(self, x, t):
        x, t = np.asarray(x), np.asarray(t)
        later = (self.beta * x**self.b + self.xi) * t**-self.c
        return self.alpha * x**-self.a + later + self.epsilon

    @property
    def is_bounded(self) -> bool:
        """See `PowerLaw`."""
        return max(self.a, self.b, self.c) < MAX_EXPONENT and bool(np.all(np.isfinite(self)))

    @property
    def s(self) -> float:
        """The exponent with which the optimal x grows with compute."""
        return self.c / (self.a + self.b)

    def optimum(self, t):
        """Returns the x with the lowest error at compute t."""
        ratio = self.alpha * self.a / (self.beta * self.b)
        return (ratio * np.asarray(t) ** self.c) ** (1 / (self.a + self.b))


@dataclasses.dataclass(frozen=True)
class Fit:
    """A law that was fitted to points.

    Attributes:
        law: the PowerLaw or the JointLaw.
        samples: the laws fitted to resampled errors.
        noise: the standard deviation of the errors' logarithms around the law.
        points: the number of points that it was fitted to.
    """

    law: PowerLaw | JointLaw
    samples: list
    noise: float
    points: int

    def interval(self, value: Callable, together: int = 1) -> tuple[float, float]:
        """Returns the interval of a value of the law, given as a function of the law.

        Args:
            value: such as `lambda law: law.s`; it may return an array, and so are the ends then.
            together: how many intervals are to hold at once (Bonferroni).
        """
        tail = (1 - LEVEL) / 2 / together
        values = np.array([value(sample) for sample in self.samples])
        low, high = np.quantile(values, (tail, 1 - tail), axis=0)
        return (float(low), float(high)) if values.ndim == 1 else (low, high)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Returns intervals that hold all constants of the law at once, by their names."""
        names = self.law._fields
        return {
            name: self.interval(lambda law, name=name: getattr(law, name), len(names))
            for name in names
        }


def frontier(x: np.ndarray, error: np.ndarray, tolerance: float = 0.0) -> np.ndarray:
    """Returns which points are on the Pareto frontier, bool (N,).

    Args:
        x: compute, or what else is spent, (N,).
        error: (N,).
        tolerance: how much a point's logarithmic error may exceed the lowest at no larger x. With
            0, noise decides which points are chosen, and the chosen are too low.
    """
    order = np.lexsort((error, x))
    lowest = np.minimum.accumulate(error[order])
    chosen = np.zeros(len(x), bool)
    chosen[order] = error[order] <= lowest * np.exp(tolerance)
    return chosen


def noise_tolerance(x: np.ndarray, error: np.ndarray, group: np.ndarray) -> float:
    """Returns a tolerance for `frontier`: three standard deviations of the noise of log error.

    The noise is the smaller of two estimates, of which a model's shape raises either: by what
    errors scatter around a law of each group, and around the line between their neighbors. It is 0
    if neither can be had, or if it is so large that the groups may be mixtures of models.

    Args:
        x, error: (N,).
        group: the model of each point, (N,).
    """
    of_laws, of_lines = [], []
    for name in np.unique(group):
        chosen = np.flatnonzero(group == name)
        chosen = chosen[np.argsort(x[chosen], kind="stable")]
        of_lines += neighbor_noise(np.log(x[chosen]), np.log(error[chosen]))
        if (freedom := len(chosen) - len(PowerLaw._fields)) > 1:
            with contextlib.suppress(UserError):
                fit = fit_power_law(x[chosen], error[chosen], resamples=0)
                of_laws += [fit.noise**2] * freedom
    noise = min(
        (np.sqrt(np.mean(squares)) for squares in (of_laws, of_lines) if squares), default=0
    )
    return 3 * float(noise) if noise <= MAX_NOISE else 0.0


def neighbor_noise(x: np.ndarray, y: np.ndarray) -> list[float]:
    """Returns estimates of the variance of y, from each point and its neighbors in x.

    Those of Gasser, Sroka and Jennen-Steinmetz, "Residual variance and residual pattern in
    nonlinear regression" (1986).
    """
    left = (x[2:] - x[1:-1]) / np.maximum(x[2:] - x[:-2], 1e-9)  # the left neighbor's weight
    difference = left * y[:-2] + (1 - left) * y[2:] - y[1:-1]
    return list(difference**2 / (left**2 + (1 - left) ** 2 + 1))


def fit_power_law(x, error, shift: bool = True, resamples: int = RESAMPLES, seed: int = 0) -> Fit:
    """Fits E = a (x + d)^-b + c by least squares of log E, from many starts.

    Args:
        x: such as compute, above 0, (N,).
        error: above 0, (N,).
        shift: whether `d` is fitted; otherwise it is 0.
        resamples, seed: of the bootstrap.

    Raises:
        UserError: too few points, an error that doesn't fall, or a fit that doesn't converge.
    """
    x, error = np.asarray(x, np.float64), np.asarray(error, np.float64)
    check_points(x, error, 4 if shift else 3)
    unit, middle = x.min(), np.exp(np.mean(np.log(x / x.min())))
    x = x / unit

    def predict(constants):  # of log power at the middle, b, sqrt(c) and sqrt(d)
        log_power, b, root_c, root_d = *constants, *(() if shift else (0.0,))
        ratio = np.log((x + root_d**2) / (middle + root_d**2))
        power = np.exp(log_power - b * ratio)
        total = power + root_c**2
        slope_d = -b * power * 2 * root_d * (1 / (x + root_d**2) - 1 / (middle + root_d**2))
        slopes = power, -power * ratio, np.full_like(x, 2 * root_c), slope_d
        return np.log(total), np.stack(slopes[: len(constants)], axis=1) / total[:, None]

    def law(constants) -> PowerLaw:
        log_power, b, root_c, root_d = *constants, *(() if shift else (0.0,))
        c, d = root_c**2, root_d**2
        log_a = log_power + b * np.log((middle + d) * unit)
        with np.errstate(over="ignore"):
            a = float(np.exp(log_a))
        return PowerLaw(
            a, float(b), float(c * (c > TINY * error.min())), float(d * unit * (d > TINY))
        )

    if np.polyfit(np.log(x), np.log(error), 1)[0] >= 0:
        raise UserError("the error doesn't fall: a law has nothing to describe")
    starts = power_law_starts(x, error, middle, shift)
    fit = fit_log(predict, law, starts, error, resamples, seed)
    if not fit.law.is_bounded:
        raise UserError(
            f"the fit of {len(x)} points doesn't converge to a power law: its exponent is "
            f"{fit.law.b:.3g}; it must be above 0 and below {MAX_EXPONENT:g}. Errors over a wider "
            "range would bound it"
        )
    return fit


def power_law_starts(x, error, middle: float, shift: bool) -> list[np.ndarray]:
    """Returns constants to start from: given `c` and `d`, the others are a linear regression."""
    starts = []
    shifts = (0.01, 0.1, 0.5, 2.0, 10.0, 100.0) if shift else (0.0,)
    for share, d in itertools.product((0.02, 0.4, 0.7, 0.85, 0.95), shifts):
        c = share * error.min()
        ratio = np.log((x + d) / (middle + d))
        weight = (error - c) / error  # of log(E - c), whose noise is larger than that of log E
        columns = np.stack([weight, -weight * ratio], axis=1)
        (log_power, b), *_ = np.linalg.lstsq(columns, weight * np.log(error - c), rcond=None)
        start = [log_power, max(b, 1e-3), np.sqrt(c), np.sqrt(d)]
        starts.append(np.array(start if shift else start[:3]))
    return starts


def fit_joint_law(x, t, error, resamples: int = RESAMPLES, seed: int = 0) -> Fit:
    """Fits E = alpha x^-a + (beta x^b + xi) t^-c + epsilon by least squares of log E.

    Args:
        x: the dimension of each point, such as its width, above 0, (N,).
        t: compute, above 0, (N,).
        error: above 0, (N,).
        resamples, seed: of the bootstrap.

    Raises:
        UserError: fewer than 8 points or 3 sizes, or a fit that doesn't converge.
    """
    x, t, error = (np.asarray(values, np.float64) for values in (x, t, error))
    check_points(t, error, len(JointLaw._fields))
    if len(np.unique(x)) < 3:
        raise UserError(f"too few sizes for a joint law: {len(np.unique(x))}; it needs 3")
    units = np.exp(np.mean(np.log(x))), np.exp(np.mean(np.log(t)))
    log_x, log_t = np.log(x / units[0]), np.log(t / units[1])

    def predict(constants):  # logarithms, but for the square roots of xi and epsilon
        alpha, a, beta, b, c = np.exp(constants[[0, 1, 2, 3, 5]])
        root_xi, root_epsilon = constants[[4, 6]]
        size, growth, fall = alpha * np.exp(-a * log_x), beta * np.exp(b * log_x), -c * log_t
        fall = np.exp(fall)
        later = (growth + root_xi**2) * fall
        total = size + later + root_epsilon**2
        slopes = (size, -a * log_x * size, growth * fall, b * log_x * growth * fall)
        slopes += (2 * root_xi * fall, -c * log_t * later, np.full_like(x, 2 * root_epsilon))
        return np.log(total), np.stack(slopes, axis=1) / total[:, None]

    def law(constants) -> JointLaw:
        with np.errstate(over="ignore"):
            alpha, a, beta, b, c = np.exp(constants[[0, 1, 2, 3, 5]])
            alpha, beta = alpha * units[0] ** a, beta * units[0] ** -b * units[1] ** c
        xi, epsilon = constants[4] ** 2 * units[1] ** c, constants[6] ** 2
        epsilon *= epsilon > TINY * error.min()
        return JointLaw(*map(float, (alpha, a, beta, b, xi, c, epsilon)))

    fit = fit_log(predict, law, joint_law_starts(log_x, log_t, error), error, resamples, seed)
    if not fit.law.is_bounded:
        raise UserError(
            f"the joint law's fit of {len(x)} points doesn't converge: an exponent goes to "
            f"{max(fit.law.a, fit.law.b, fit.law.c):.3g}. More sizes and durations would bound it"
        )
    return fit


def joint_law_starts(log_x, log_t, error) -> list[np.ndarray]:
    """Returns constants to start from: given the exponents, the others are a linear problem."""
    starts = []
    for a, b, c in itertools.product((0.2, 0.5, 1.0), (0.2, 0.5, 1.0), (0.2, 0.4, 0.7)):
        fall = np.exp(-c * log_t)
        columns = np.exp(-a * log_x), np.exp(b * log_x) * fall, fall, np.ones_like(fall)
        solution, _ = optimize.nnls(np.stack(columns, axis=1) / error[:, None], np.ones_like(error))
        alpha, beta, xi, epsilon = np.maximum(solution, 1e-3 * error.min())
        log = np.log([alpha, a, beta, b])
        starts.append(np.array([*log, np.sqrt(xi), np.log(c), np.sqrt(epsilon)]))
    return starts


def check_points(x: np.ndarray, error: np.ndarray, constants: int) -> None:
    """Raises UserError if points are too few for a law, or can't be drawn on logarithmic axes."""
    if len(x) <= constants:
        raise UserError(
            f"too few points for a law of {constants} constants: {len(x)}; it needs {constants + 1}"
        )
    if len(np.unique(x)) < constants:
        raise UserError(
            f"too few points for a law of {constants} constants: they are at {len(np.unique(x))} "
            f"different places; it needs {constants}"
        )
    if min(x.min(), error.min()) <= 0 or not np.all(np.isfinite([x, error])):
        raise UserError("a law is fitted to logarithms: its points must be finite and above 0")


def fit_log(
    predict: Callable, law: Callable, starts: Sequence, error: np.ndarray, resamples: int, seed: int
) -> Fit:
    """Fits a law from many starts, and again to resampled errors.

    Args:
        predict: constants -> log E (N,) and its derivatives (N, constants).
        law: constants -> the law.
        starts: constants to start from; the best ones are used.
        error: (N,).
        resamples: how often errors are resampled.
        seed: of the resampling.
    """
    log_error = np.log(error)

    def cost(start):
        return np.sum((predict(start)[0] - log_error) ** 2)

    with np.errstate(all="ignore"):
        solutions = [solve(predict, t, log_error) for t in sorted(starts, key=cost)[:6]]
        solutions = [s for s in solutions if s is not None]
        if not solutions:
            raise UserError(
                f"the fit of {len(error)} points doesn't converge from any of {len(starts)} starts"
            )
        constants = min(solutions, key=cost)
        samples = bootstrap(predict, law, constants, log_error, resamples, seed)
        noise = np.sqrt(cost(constants) / (len(error) - len(constants)))
        return Fit(law(constants), samples, float(noise), len(error))


def solve(predict: Callable, start: np.ndarray, log_error: np.ndarray) -> np.ndarray | None:
    """Returns the constants of least squares near a start; None without convergence."""
    try:
        constants, _, _, _, status = optimize.leastsq(
            lambda constants: predict(constants)[0] - log_error,
            start,
            Dfun=lambda constants: predict(constants)[1],
            full_output=True,
            maxfev=200,
        )
    except (ValueError, np.linalg.LinAlgError):  # a number overflows
        return None
    return constants if status in range(1, 5) and np.all(np.isfinite(constants)) else None


def bootstrap(
    predict: Callable, law: Callable, constants: np.ndarray, log_error: np.ndarray, resamples, seed
) -> list:
    """Returns the laws fitted to the law's own values with resampled residuals.

    A residual is divided by the share of it that the fit leaves, and those of a resample are
    scaled by one draw, so that the intervals are as wide as Student's t makes them.
    """
    values, slopes = predict(constants)
    residuals = log_error - values
    basis, _ = np.linalg.qr(slopes)
    left = np.maximum(1 - np.sum(basis**2, axis=1), 0.1)
    residuals = residuals / np.sqrt(left)
    residuals -= residuals.mean()
    rng, freedom = np.random.default_rng(seed), len(values) - len(constants)
    samples = []
    for _ in range(resamples):
        scale = np.sqrt(freedom / rng.chisquare(freedom))
        drawn = values + scale * rng.choice(residuals, len(values))
        # A square root of 0 would stay 0: its derivative is 0 there.
        sample = solve(predict, constants + 0.01, drawn)
        if sample is not None and law(sample).is_bounded:
            samples.append(law(sample))
    if len(samples) < resamples / 2:
        raise UserError(
            f"the fit of {len(values)} points doesn't converge for {resamples - len(samples)} of "
            f"{resamples} resamples of their errors: they don't determine a law"
        )
    return samples
