"""How sure an evaluation is: calibration of the probabilities, and bootstrap intervals."""

from collections.abc import Callable

import numpy as np

BINS = 15
RESAMPLES = 1_000
LEVEL = 0.95


def calibration_bins(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> dict:
    """Groups predictions by their confidence, in bins of equal width.

    Args:
        confidence: the probability of each predicted class, (N,).
        correct: whether each prediction is right, bool (N,).
        bins: how many bins divide [0, 1].

    Returns:
        Arrays (bins,): `count`, the number of predictions; `confidence` and `accuracy`, their
        means, 0 in empty bins.
    """
    # A confidence on a boundary belongs to the bin below it, as in the paper's equation 3.
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(bin_of, minlength=bins)

    def mean(values):
        return np.bincount(bin_of, weights=values, minlength=bins) / np.maximum(count, 1)

    return {"count": count, "confidence": mean(confidence), "accuracy": mean(correct)}


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> float:
    """Returns the expected calibration error (arXiv:1706.04599, equation 3).

    Args:
        confidence, correct, bins: see `calibration_bins`.
    """
    groups = calibration_bins(confidence, correct, bins)
    gaps = np.abs(groups["accuracy"] - groups["confidence"])
    return float(np.sum(gaps * groups["count"]) / np.sum(groups["count"]))


def bootstrap_intervals(
    statistics: Callable[[np.ndarray], dict[str, float]],
    num_examples: int,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> dict[str, tuple[float, float]]:
    """Returns percentile bootstrap intervals of statistics over examples.

    The examples are drawn with replacement, always the same draws.

    Args:
        statistics: the rows of the examples drawn, int (num_examples,) -> numbers by name.
        num_examples: the number of examples.
        resamples: how often to draw.
        level: the share of the distribution that an interval covers.
    """
    rng = np.random.default_rng(0)
    draws = [statistics(rng.integers(num_examples, size=num_examples)) for _ in range(resamples)]
    tail = (1 - level) / 2
    return {
        name: tuple(map(float, np.quantile([draw[name] for draw in draws], (tail, 1 - tail))))
        for name in draws[0]
    }
