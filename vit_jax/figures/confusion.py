"""The confusion matrix as a picture."""

import numpy as np

from vit_jax.evaluation.classes import ClassReport, most_confused

MAX_NAMES = 40  # classes whose names are legible at the matrix
MAX_NUMBERS = 20  # classes whose numbers fit into the cells
NUM_DETAILS = 20  # classes in the detail of a larger matrix


def draw(report: ClassReport):
    """Draws which classes are taken for which, as shares of each class's examples.

    With more than MAX_NAMES classes the matrix has no names; a second one, with names, has the
    classes that are confused most.

    Args:
        report: the predictions by class.

    Returns:
        A matplotlib Figure.
    """
    from matplotlib.figure import Figure

    num_classes = len(report.class_names)
    if num_classes <= MAX_NAMES:
        side = 3.5 + 0.28 * num_classes
        figure = Figure(figsize=(side + 1, side), dpi=100, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        draw_matrix(figure, figure.subplots(), report, np.arange(num_classes))
        return figure
    figure = Figure(figsize=(17, 8), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    whole, detail = figure.subplots(1, 2)
    draw_whole(figure, whole, report)
    draw_matrix(figure, detail, report, confused_classes(report))
    detail.set_title("The classes confused most often")
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
    names = [shorten(report.class_names[label]) for label in labels]
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
    axes.set_title(f"All {len(shares):,} classes")
    axes.set_xlabel("predicted class, by its number")
    axes.set_ylabel("class, by its number")
    figure.colorbar(image, ax=axes, label="share of the class's examples", shrink=0.8)


def shorten(name: str, length: int = 24) -> str:
    """Returns a name, cut if it is long."""
    return name if len(name) <= length else f"{name[: length - 1]}…"
