"""The results of an evaluation: as text, as JSON, and as files with pictures."""

import json
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from vit_jax.evaluation import classes, statistics
from vit_jax.evaluation.accuracy import Predictions
from vit_jax.figures import attention, drawing
from vit_jax.figures import predictions as figures
from vit_jax.inference.classifier import Classifier
from vit_jax.logs.curves import Curves
from vit_jax.storage.files import open_path, write_atomically
from vit_jax.storage.mirror import written_folder

logger = logging.getLogger("vit_jax")

NUM_MISTAKES = 24  # that are listed and drawn
MAX_CLASSES = 5_000  # more aren't reported: the confusion matrix would take gigabytes
PICTURES = ("confusion", "calibration", "mistakes", "attention")
NUM_EXAMPLES = 8  # whose attention is drawn
TITLES = {"accuracy_top5": "top-5", "ece": "calibration error"}


class Result(NamedTuple):
    """The numbers of an evaluation.

    Attributes:
        metrics: loss, accuracy, accuracy_top5, and ece, the expected calibration error.
        intervals: the 95% bootstrap interval of each but ece.
        evals: the numbers of each entry of `config.evals`, by its name.
        dataset: what the split is called.
        step: the checkpoint's step; None for weights that aren't a run's.
        predictions: what is predicted for each example.
        classes: the measures of each class, or None.
        mistakes: the wrong predictions with the highest confidence, as dictionaries, the highest
            first; empty without `classes`.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    evals: dict[str, dict[str, float]]
    dataset: str
    step: int | None
    predictions: Predictions
    classes: classes.ClassReport | None
    mistakes: list[dict]


def summarize(
    predictions: Predictions,
    source,
    evals: dict[str, dict[str, float]],
    step: int | None = None,
    reports_classes: bool = False,
) -> Result:
    """Computes the numbers of an evaluation.

    Args:
        predictions: what is predicted for each example of `source`.
        source: the split.
        evals, step: see `Result`.
        reports_classes: whether to report on each class.
    """
    report, mistakes = None, []
    if reports_classes and source.num_classes > MAX_CLASSES:
        logger.warning(f"{source.num_classes:,} classes are too many for a report of each")
    elif reports_classes:
        report = classes.report(predictions.labels, predictions.top[:, 0], source.class_names)
        mistakes = [describe_mistake(predictions, i, source) for i in worst(predictions)]
    return Result(
        metrics=predictions.metrics(),
        intervals=predictions.intervals(),
        evals=evals,
        dataset=source.name,
        step=step,
        predictions=predictions,
        classes=report,
        mistakes=mistakes,
    )


def worst(predictions: Predictions, count: int = NUM_MISTAKES) -> np.ndarray:
    """Returns the rows of the wrong predictions with the highest confidence, at most `count`."""
    wrong = np.flatnonzero(~predictions.correct)
    return wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:count]


def describe_mistake(predictions: Predictions, row: int, source) -> dict:
    """Returns a wrong prediction as a dictionary of text and numbers."""
    index, names = int(predictions.index[row]), source.class_names
    return {
        "index": index,
        "example": source.describe(index),
        "class": names[predictions.labels[row]],
        "predicted": names[predictions.top[row, 0]],
        "confidence": float(predictions.confidence[row]),
    }


def table(result: Result) -> list[str]:
    """Returns lines of text with each number, and its 95% interval."""
    rows = []
    for name, value in result.metrics.items():
        ends = [format_number(name, end) for end in result.intervals.get(name, ())]
        rows.append((TITLES.get(name, name), format_number(name, value), " to ".join(ends)))
    for evaluation, values in result.evals.items():
        for name, value in values.items():
            title = f"{evaluation} {TITLES.get(name, name).replace('_', ' ')}"
            rows.append((title, format_number(name, value), ""))
    return align(rows)


def class_table(report: classes.ClassReport) -> list[str]:
    """Returns lines of text with the measures of each class, and the pairs most confused."""
    rows = [("class", *classes.MEASURES, "examples")]
    for name, row in zip(report.class_names, report.per_class, strict=True):
        measures = (f"{row[measure]:.3f}" for measure in classes.MEASURES)
        rows.append((name, *measures, f"{row['support']:,}"))
    for name, row in report.averages.items():
        rows.append((f"{name} average", *(f"{row[m]:.3f}" for m in classes.MEASURES), ""))
    lines = align(rows)
    if pairs := classes.most_confused(report.confusion):
        names = report.class_names
        lines += ["", "most confused"]
        lines += align([(f"{names[i]} taken for {names[j]}", str(n)) for i, j, n in pairs])
    return lines


def align(rows: list[tuple[str, ...]]) -> list[str]:
    """Returns rows as lines whose columns line up; all but the first to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([f"{first:{widths[0]}}", *map(str.rjust, others, widths[1:])]).rstrip()
        for first, *others in rows
    ]


def format_number(name: str, value: float) -> str:
    """Returns an accuracy in percent, and other numbers with four decimals."""
    if name.startswith("accuracy"):
        return f"{value:.2%}"
    return f"{value:.4f}" if name in TITLES or name == "loss" else f"{value:g}"


def as_json(result: Result) -> dict:
    """Returns the contents of evaluation.json."""
    predictions = result.predictions
    bins = statistics.calibration_bins(predictions.confidence, predictions.correct)
    contents = {
        **result.metrics,
        "intervals": result.intervals,
        "evals": result.evals,
        "dataset": result.dataset,
        "num_examples": len(predictions.labels),
        "step": result.step,
        "calibration": {name: values.tolist() for name, values in bins.items()},
    }
    if report := result.classes:
        names = report.class_names
        contents |= {
            "classes": dict(zip(names, report.per_class, strict=True)),
            "averages": report.averages,
            "confusion": nonzero(report.confusion),
            "most_confused": [
                {"class": names[i], "predicted": names[j], "count": n}
                for i, j, n in classes.most_confused(report.confusion)
            ],
            "mistakes": result.mistakes,
        }
    return contents


def nonzero(matrix: np.ndarray) -> list[list[int]]:
    """Returns [row, column, value] of each entry of a matrix that isn't 0."""
    rows, columns = np.nonzero(matrix)
    return np.stack([rows, columns, matrix[rows, columns]], axis=1).tolist()


def write(result: Result, classifier: Classifier | None, images: Callable, out) -> None:
    """Writes evaluation.json, TensorBoard's events and, if the classes are reported, pictures.

    Args:
        result: the numbers.
        classifier: the model, whose attention is drawn; or None.
        images: indices of examples -> their images, uint8 (N, H, W, C).
        out: the folder, made if it doesn't exist.

    Raises:
        OSError: it can't be written.
        UserError: it is in a bucket, which can't be written.
    """
    for name in PICTURES:  # of an earlier evaluation
        (open_path(out) / f"{name}.png").unlink(missing_ok=True)
    with written_folder(out) as folder:
        write_files(result, classifier, images, folder)


def write_files(
    result: Result, classifier: Classifier | None, images: Callable, folder: pathlib.Path
) -> None:
    """Writes what `write` does, to a folder on a disk."""
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in as_json(result).items())
    write_atomically(folder / "evaluation.json", "{\n" + ",\n".join(lines) + "\n}\n")
    step = result.step or 0
    curves = Curves(folder)
    for name, values in {"val": result.metrics, **result.evals}.items():
        curves.add(step, {f"{name}/{key}": value for key, value in values.items()})
    curves.close()
    if result.classes is not None:
        for name, figure in pictures(result, classifier, images):
            drawing.save(figure, folder / f"{name}.png")


def pictures(result: Result, classifier: Classifier | None, images: Callable) -> Iterator[tuple]:
    """Yields the name and the figure of each picture of a report; see `write`."""
    yield "confusion", figures.confusion(result.classes)
    predictions = result.predictions
    bins = statistics.calibration_bins(predictions.confidence, predictions.correct)
    yield "calibration", figures.calibration(bins)
    if result.mistakes:
        wrong = images([mistake["index"] for mistake in result.mistakes])
        yield "mistakes", figures.mistakes(wrong, result.mistakes)
    if classifier is None:
        return
    rows = examples(predictions)
    drawn = images(predictions.index[rows])
    captions = [caption(predictions, row, result.classes.class_names) for row in rows]
    yield "attention", attention.rollout(drawn, classifier.attention(drawn), captions)


def caption(predictions: Predictions, row: int, names: tuple[str, ...]) -> str:
    """Returns what is predicted for an example, and what it is if that is wrong."""
    predicted = figures.shorten(names[predictions.top[row, 0]])
    text = f"{predicted}, {predictions.confidence[row]:.0%}"
    if not predictions.correct[row]:
        text += f"\nis {figures.shorten(names[predictions.labels[row]])}"
    return text


def examples(predictions: Predictions, count: int = NUM_EXAMPLES) -> np.ndarray:
    """Returns the rows of some right predictions of different classes, and of the worst ones."""
    wrong = worst(predictions, count // 2)
    right = np.flatnonzero(predictions.correct)
    _, firsts = np.unique(predictions.labels[right], return_index=True)
    return np.concatenate([right[firsts][: count - len(wrong)], wrong])
