"""How well each class is recognized, and which classes are confused."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

AVERAGES = ("micro", "macro", "weighted")
MEASURES = ("precision", "recall", "f1")


class ClassReport(NamedTuple):
    """The predictions of a set of examples, by class.

    Attributes:
        class_names: in the order of the labels.
        confusion: how many examples of each class (row) were taken for each class (column), int
            (C, C).
        per_class: precision, recall, f1 and support of each class; 0 where undefined.
        averages: for each of AVERAGES, precision, recall and f1.
    """

    class_names: tuple[str, ...]
    confusion: np.ndarray
    per_class: list[dict[str, float]]
    averages: dict[str, dict[str, float]]


def report(labels: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]) -> ClassReport:
    """Returns scikit-learn's measures of each class, their averages, and the confusion matrix.

    Args:
        labels, predicted: int (N,).
        class_names: in the order of the labels.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    numbers = np.arange(len(class_names))
    options = dict(labels=numbers, zero_division=0)
    columns = precision_recall_fscore_support(labels, predicted, **options)
    per_class = [
        {**dict(zip(MEASURES, map(float, row), strict=True)), "support": int(support)}
        for *row, support in zip(*columns, strict=True)
    ]
    averages = {}
    for average in AVERAGES:
        *values, _ = precision_recall_fscore_support(labels, predicted, average=average, **options)
        averages[average] = dict(zip(MEASURES, map(float, values), strict=True))
    confusion = confusion_matrix(labels, predicted, labels=numbers)
    return ClassReport(tuple(class_names), confusion, per_class, averages)


def most_confused(confusion: np.ndarray, count: int = 10) -> list[tuple[int, int, int]]:
    """Returns the pairs of classes that are confused most often, the most frequent first.

    Args:
        confusion: (C, C), see `ClassReport`.
        count: at most so many pairs.

    Returns:
        (class, class it was taken for, number of examples), of which there is at least one.
    """
    mistakes = confusion.copy()
    np.fill_diagonal(mistakes, 0)
    largest = np.argsort(-mistakes, axis=None, kind="stable")[:count]
    pairs = zip(*np.unravel_index(largest, mistakes.shape), strict=True)
    return [
        (int(row), int(column), int(mistakes[row, column]))
        for row, column in pairs
        if mistakes[row, column]
    ]
