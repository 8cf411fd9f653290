"""Calibration, bootstrap intervals, and measures of each class."""

import numpy as np
import pytest
from sklearn.metrics import classification_report

from vit_jax.evaluation import classes, statistics


def test_calibration_error_by_hand():
    """Three predictions in the bin (0.6, 0.667], two in (0.933, 1]."""
    confidence = np.array([0.62, 0.64, 0.66, 0.95, 1.0])
    correct = np.array([True, False, False, True, True])
    expected = (3 * abs(1 / 3 - 0.64) + 2 * abs(1 - 0.975)) / 5
    assert statistics.calibration_error(confidence, correct) == pytest.approx(expected)
    bins = statistics.calibration_bins(confidence, correct)
    assert bins["count"].tolist() == [0] * 9 + [3] + [0] * 4 + [2]


def test_a_boundary_belongs_to_the_bin_below():
    bins = statistics.calibration_bins(np.array([0.0, 0.5, 1.0]), np.ones(3, bool), bins=2)
    assert bins["count"].tolist() == [2, 1]


def test_bootstrap_interval_of_a_mean():
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    means = statistics.bootstrap_intervals(lambda rows: {"mean": values[rows].mean()}, 400)
    error = 1.96 * values.std() / np.sqrt(400)
    assert means["mean"] == pytest.approx((values.mean() - error, values.mean() + error), abs=0.03)


def test_classes_as_in_scikit_learn():
    """A class without examples, and one that is never predicted, included."""
    rng = np.random.default_rng(0)
    names = ("accuracy", "b", "c", "never seen", "e")
    labels = rng.choice([0, 1, 2, 4], 200)
    predicted = np.where(rng.random(200) < 0.6, labels, rng.choice([0, 1, 3], 200))
    report = classes.report(labels, predicted, names)
    expected = classification_report(
        labels, predicted, labels=range(5), output_dict=True, zero_division=0
    )
    for label, row in enumerate(report.per_class):
        theirs = expected[str(label)]
        ours = {"f1-score" if name == "f1" else name: value for name, value in row.items()}
        assert ours == pytest.approx(theirs, abs=1e-4)
    for average in ("macro", "weighted"):
        assert report.averages[average]["f1"] == pytest.approx(
            expected[f"{average} avg"]["f1-score"]
        )
    assert report.averages["micro"]["f1"] == pytest.approx(np.mean(labels == predicted))

    (row, column, count), *others = classes.most_confused(report.confusion)
    assert count == np.sum((labels == row) & (predicted == column))
    assert all(count >= other for *_, other in others)
    assert row != column
