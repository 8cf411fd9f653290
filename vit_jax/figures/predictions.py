"""Pictures of predictions: the confusion matrix, the worst mistakes, and calibration."""

from collections.abc import Mapping, Sequence

import numpy as np

from vit_jax.evaluation.classes import ClassReport, most_confused
from vit_jax.figures.drawing import create_figure, mean_aspect, show_image

MAX_NAMES = 40  # classes whose names are legible at the matrix
MAX_NUMBERS = 20  # classes whose numbers fit into the cells
NUM_DETAILS = 20  # classes in the detail of a larger matrix
SHEET_COLUMNS = 6


def confusion(report: ClassReport, title: str = ""):
    """Draws which classes are taken for which, as shares of each class's examples.

    With more than MAX_NAMES classes the matrix has no names; a second one, with names, has the
    classes that are confused most.

    Args:
        report: the predictions by class.
        title: the text above.

    Returns:
        A matplotlib Figure.
    """
    num_classes = len(report.class_names)
    if num_classes <= MAX_NAMES:
        side = 3.5 + 0.28 * num_classes
        figure = create_figure(title, side + 1, side)
        draw_matrix(figure, figure.subplots(), report, np.arange(num_classes))
    else:
        figure = create_figure(title, 17, 8)
        whole, detail = figure.subplots(1, 2)
        draw_whole(figure, whole, report)
        draw_matrix(figure, detail, report, confused_classes(report))
        detail.set_title("The classes confused most often", fontsize=11)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure


def confused_classes(report: ClassReport) -> np.ndarray:
    """Returns up to NUM_DETAILS classes of the pairs that are confused most, in ascending order."""
    chosen = []
    for row, column, _ in most_confused(report.confusion, count=10 * NUM_DETAILS):
        chosen += [label for label in (row, column) if label not in chosen]
    return np.array(sorted(chosen[:NUM_DETAILS] or range(NUM_DETAILS)))


def shares_of_rows(confusion: np.ndarray) -> np.ndarray:
    """Divides each row by its sum; rows without examples stay 0."""
    return confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)


def draw_matrix(figure, axes, report: ClassReport, labels: np.ndarray) -> None:
    """Draws the rows and columns of some classes, with names."""
    shares = shares_of_rows(report.confusion)[np.ix_(labels, labels)]
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [escape(report.class_names[label]) for label in labels]
    ticks = np.arange(len(labels))
    axes.set_xticks(ticks, names, rotation=90)
    axes.set_yticks(ticks, names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("class")
    figure.colorbar(image, ax=axes, label="share of the class's examples", shrink=0.8)
    if len(labels) > MAX_NUMBERS:
        return
    for row, column in np.ndindex(shares.shape):
        if count := report.confusion[labels[row], labels[column]]:
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count}", ha="center", va="center", color=color, fontsize=8)


def draw_whole(figure, axes, report: ClassReport) -> None:
    """Draws the matrix of many classes, without names; rare mistakes stay visible."""
    from matplotlib.colors import LogNorm

    shares = shares_of_rows(report.confusion)
    image = axes.imshow(shares, cmap="viridis", norm=LogNorm(1e-3, 1), interpolation="nearest")
    axes.set_facecolor("white")
    axes.set_title(f"All {len(shares):,} classes", fontsize=11)
    axes.set_xlabel("predicted class, by its number")
    axes.set_ylabel("class, by its number")
    figure.colorbar(image, ax=axes, label="share of the class's examples", shrink=0.8)


def mistakes(images, wrong: Sequence[Mapping], title: str = ""):
    """Draws images with the class that they were taken for, and their own.

    Args:
        images: N images, uint8 (H, W, 1, 3 or 4).
        wrong: for each image "class", "predicted" and "confidence".
        title: the text above.

    Returns:
        A matplotlib Figure.
    """
    columns = min(SHEET_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    row_height = 0.6 + 2.0 * mean_aspect(images)  # inches
    figure = create_figure(title, 2.0 * columns, row_height * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, image, mistake in zip(axes, images, wrong, strict=False):
        predicted, actual = (shorten(mistake[key]) for key in ("predicted", "class"))
        show_image(axis, image, f"{predicted}, {mistake['confidence']:.0%}\nis {actual}")
    return figure


def calibration(bins: Mapping, title: str = ""):
    """Draws how often predictions are right, against how confident they are.

    Args:
        bins: the result of `statistics.calibration_bins`.
        title: the text above.

    Returns:
        A matplotlib Figure.
    """
    figure = create_figure(title, 5.0, 5.0)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    count, confidence, accuracy = (
        np.asarray(bins[name]) for name in ("count", "confidence", "accuracy")
    )
    edges = np.linspace(0, 1, len(count) + 1)
    centers, width = (edges[1:] + edges[:-1]) / 2, 1 / len(count)
    upper.plot([0, 1], [0, 1], color="gray", linestyle="--", label="perfectly calibrated")
    upper.plot(confidence[count > 0], accuracy[count > 0], "o-", label="the model")
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    upper.legend(fontsize=9, loc="upper left")
    lower.bar(centers, count, 0.9 * width)
    lower.set(xlabel="confidence", ylabel="predictions", yscale="log", ylim=(0.5, None))
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
    return figure


def escape(name: str) -> str:
    """Returns a name for a label of an axis, where matplotlib reads formulas."""
    return shorten(name).replace("$", r"\$")


def shorten(name: str, length: int = 20) -> str:
    """Returns a name, cut if it is long."""
    return name if len(name) <= length else f"{name[: length - 1]}…"
