"""Curves of one or several runs, from their metrics.jsonl."""

import math
import os
from collections.abc import Sequence

from vit_jax.errors import UserError
from vit_jax.figures.drawing import create_figure
from vit_jax.logs.run_log import read_rows

LINES = ("-", "--", ":", "-.")  # of train, val and others, in the order in which they appear


def curves(workdirs: Sequence, title: str = ""):
    """Draws the metrics of runs against the step, a panel for each metric.

    Runs differ by color, and groups of metrics, such as train and val, by line; the groups of a
    single run by color too.

    Args:
        workdirs: the runs' folders.
        title: the text above; "": the names of the runs.

    Returns:
        A matplotlib Figure.

    Raises:
        UserError: a folder without metrics.jsonl, or without rows in it.
    """
    runs = [series(workdir) for workdir in workdirs]
    names = list(dict.fromkeys(name for run in runs for name, _ in run))
    groups = list(dict.fromkeys(group for run in runs for _, group in run))
    labels = run_names(workdirs)
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = create_figure(title or ", ".join(labels), 4.2 * columns, 2.8 * rows + 1.0)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axis, name in zip(axes, names, strict=False):
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.3)
    for axis in axes[len(names) :]:
        axis.axis("off")
    handles = draw_lines(axes, runs, labels, names, groups)
    columns = min(len(groups) if len(runs) > 1 else 6, 2 * columns)
    style = dict(loc="outside lower center", ncols=columns, fontsize=9)
    for text in figure.legend(handles.values(), handles, **style).get_texts():
        text.set_parse_math(False)  # "$" in a run's name is no formula
    return figure


def draw_lines(axes, runs, labels, names, groups) -> dict:
    """Draws the curves of runs, see `series`, in the panels of their metrics.

    Returns:
        {text: line} for a legend; a label of Matplotlib's own is hidden if it starts with "_".
    """
    handles = {}
    is_single = len(runs) == 1
    colors = palette(len(groups) if is_single else len(runs))
    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        for (name, group), points in run.items():
            color = colors[groups.index(group) if is_single else number]
            line = LINES[groups.index(group) % len(LINES)]
            marker = "." if len(points) < 30 else None
            text = group if is_single else f"{label}: {group}"
            steps, values = zip(*points, strict=True)
            axis = axes[names.index(name)]
            (handles[text],) = axis.plot(steps, values, line, color=color, marker=marker)
    return handles


def palette(count: int):
    """Returns a color for each run."""
    from matplotlib import colormaps

    if count <= 10:
        return colormaps["tab10"].colors[:count]
    return colormaps["viridis"]([i / (count - 1) for i in range(count)])


def run_names(workdirs: Sequence) -> list[str]:
    """Returns the last parts of the runs' paths; the paths if two would have the same name."""
    paths = [os.path.normpath(workdir) for workdir in workdirs]
    names = [os.path.basename(path) for path in paths]
    return names if len(set(names)) == len(names) else paths


def series(workdir) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Returns a run's curves: {(metric, group): points (step, value)}, the loss first.

    Of "train/loss", the metric is "loss" and the group "train".
    """
    found = {}
    for row in read_rows(workdir):
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                group, _, metric = name.rpartition("/")
                found.setdefault((metric, group), []).append((row["step"], value))
    if not found:
        raise UserError(f"{workdir} has no metrics yet: its metrics.jsonl has no rows")
    first = ("loss", "accuracy")
    return {
        key: found[key] for key in sorted(found, key=lambda key: (*first, key[0]).index(key[0]))
    }
