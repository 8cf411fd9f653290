"""Figures of a study's laws, as in "Scaling Vision Transformers" (arXiv:2106.04560)."""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from vit_jax.checks import check_png
from vit_jax.errors import UserError
from vit_jax.figures import drawing
from vit_jax.scaling.laws import Fit, PowerLaw

DESCRIPTIONS = {
    "overview": "error against compute, model size and images seen, with the laws",
    "compute": "error against compute, with the frontier and its law",
    "images": "error against images seen, by model",
    "size": "error against model size, by images seen",
    "shape": "error against a shape's dimension and compute, with the optimum",
}
UNITS = {"exaflops": "exaFLOPs", "gflops": "GFLOPs per image", "images_seen": "images seen"}
BEYOND = 10.0  # how far laws are drawn beyond the points, as a factor
MAX_LINES = 10  # of one panel; more aren't told apart
AUTHOR = {"Creator": "vit_jax", "CreationDate": None}  # of PDF files: the same bytes every time


def figures(studies: Sequence, columns) -> dict[str, Callable]:
    """Returns the functions that draw the figures of some metrics, by the figures' names.

    Args:
        studies: of each metric, see `fit.Study`.
        columns: see `fit.Columns`.
    """
    kinds = {"compute": [draw_compute]}
    if all(np.isfinite(study.points.images).any() for study in studies):
        kinds["images"] = [draw_images]
    if all(np.isfinite(study.points.size).any() for study in studies):
        kinds["size"] = [draw_size]
    if len(kinds) == 3:
        kinds["overview"] = [draw_compute, draw_size, draw_images]
    drawn = {
        name: lambda panels=panels: draw_panels(studies, columns, panels)
        for name, panels in kinds.items()
    }
    for shape in columns.shapes:
        if fitted := [study for study in studies if shape in study.joint]:
            name = f"shape-{shape.replace('/', '_')}"
            drawn[name] = lambda fitted=fitted, shape=shape: draw_shapes(fitted, columns, shape)
    return drawn


def draw_panels(studies: Sequence, columns, panels: Sequence[Callable]):
    """Draws the panels of each metric: in a row of its own, or a single row of one panel each."""
    across = len(panels) if len(panels) > 1 else len(studies)
    down = len(studies) if len(panels) > 1 else 1
    figure = drawing.create_figure("", 6.3 * across, 4.1 * down)
    axes = figure.subplots(down, across, squeeze=False).ravel()
    pairs = [(study, panel) for study in studies for panel in panels]
    for axis, (study, panel) in zip(axes, pairs, strict=True):
        axis.set(xscale="log", yscale="log", ylabel=title_of(study.points.metric))
        panel(axis, study, columns)
        low, high = axis.get_ylim()  # a band may be much wider than the points
        errors = study.points.error
        axis.set_ylim(max(low, errors.min() / 4), min(high, errors.max() * 2))
        finish(axis)
    return figure


def draw_compute(axis, study, columns) -> None:
    """Draws error against compute: points off the frontier are faint, few images small."""
    points = study.points
    areas = marker_areas(points.images)
    for name, color in model_colors(points).items():
        axis.scatter([], [], 30, color=color, label=name)  # for the legend
        for on_frontier, style in ((False, dict(alpha=0.3)), (True, dict(edgecolors="black"))):
            own = (points.model == name) & (study.chosen == on_frontier)
            style = dict(color=color, linewidths=0.6) | style
            axis.scatter(points.compute[own], points.error[own], areas[own], **style)
        if fit := study.models.get(name):
            x = points.compute[points.model == name]
            x = np.geomspace(x.min(), x.max(), 50)
            axis.plot(x, fit.law(x), color=color, linewidth=0.7)
    budget = study.best and study.best["compute"]
    draw_law(axis, study.compute, points.compute[study.chosen], "C", budget)
    if budget:
        axis.axvline(budget, color="gray", linestyle=":", linewidth=1, label="budget")
    axis.set_xlabel(f"compute C ({UNITS.get(columns.compute, columns.compute)})")


def draw_images(axis, study, columns) -> None:
    """Draws error against images seen, a line for each model."""
    points = study.points
    for name, color in model_colors(points).items():
        own = points[points.model == name]
        style = dict(marker=".", color=color, linewidth=1, label=name)
        axis.plot(*lowest(own.images, own.error), **style)
    if study.images:
        draw_law(axis, study.images, known(points.images), "D")
    axis.set_xlabel("images seen D")


def draw_size(axis, study, columns) -> None:
    """Draws error against model size, a line for each number of images if they are few."""
    points = study.points
    unit = UNITS.get(columns.size)
    axis.set_xlabel(f"model size N ({unit})" if unit else f"{columns.size} N")
    counts = np.unique(known(points.images))
    colors = colormap(len(counts), "cividis")
    for count, color in zip(counts, colors, strict=True) if len(counts) <= MAX_LINES else ():
        own = points[points.images == count]
        style = dict(marker=".", color=color, linewidth=0.7, label=f"{short(count)} images")
        axis.plot(*lowest(own.size, own.error), **style)
    if not 0 < len(counts) <= MAX_LINES:
        axis.scatter(points.size, points.error, 15, color="gray")
    if study.size:
        draw_law(axis, study.size, known(points.size), "N")


def lowest(x: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values of x in order, and the lowest error at each."""
    values = np.unique(x)
    return values, np.array([error[x == value].min() for value in values])


def draw_law(axis, fit: Fit, x: np.ndarray, name: str, reach: float | None = None) -> None:
    """Draws a law with its 95% band: a line over the points, dashed beyond them."""
    low, high = x.min(), x.max()
    inside, outside = (
        np.geomspace(low, high, 100),
        np.geomspace(high, max(BEYOND * high, 2 * (reach or 0)), 50),
    )
    axis.plot(inside, fit.law(inside), "k-", linewidth=1.5, label=formula(fit.law, name))
    axis.plot(outside, fit.law(outside), "k--", linewidth=1.2, label="beyond the points")
    everywhere = np.concatenate([inside, outside])
    band = fit.interval(lambda law: law(everywhere))
    axis.fill_between(everywhere, *band, color="black", alpha=0.12, linewidth=0)


def draw_shapes(studies: Sequence, columns, shape: str):
    """Draws error against a dimension at five amounts of compute, and the optimum."""
    from matplotlib import colors as matplotlib_colors
    from matplotlib.cm import ScalarMappable

    figure = drawing.create_figure("", 5.6 * len(studies), 4.3)
    axes = figure.subplots(1, len(studies), squeeze=False).ravel()
    for axis, study in zip(axes, studies, strict=True):
        points, law = study.shape_points[shape], study.joint[shape].law
        scale = matplotlib_colors.LogNorm(points.compute.min(), points.compute.max())
        colors = ScalarMappable(scale, "viridis")
        limits = points.error.min() / 1.2, points.error.max() * 1.2
        axis.set(xscale="log", yscale="log", ylabel=title_of(points.metric), ylim=limits)
        axis.scatter(points.size, points.error, 18, color=colors.to_rgba(points.compute))
        x = np.geomspace(points.size.min() / 2, points.size.max() * 2, 100)
        budgets = np.geomspace(points.compute.min(), points.compute.max(), 5)
        for budget in budgets:
            axis.plot(x, law(x, budget), color=colors.to_rgba(budget), linewidth=1)
        inside = (law.optimum(budgets) >= x.min()) & (law.optimum(budgets) <= x.max())
        best = law.optimum(budgets[inside])
        label = f"lowest: x ~ C^{law.s:.2f}"
        axis.plot(best, law(best, budgets[inside]), "k*-", linewidth=1, label=label)
        axis.set_xlabel(f"x: {UNITS.get(shape, shape)}")
        unit = UNITS.get(columns.compute, columns.compute)
        figure.colorbar(colors, ax=axis, label=f"compute C ({unit})")
        finish(axis, is_inside=True)
    return figure


def finish(axis, is_inside: bool = False) -> None:
    """Sets what all panels share: plain numbers on the error's axis, a grid, a legend."""
    from matplotlib import ticker

    low, high = axis.get_ylim()
    subs = (1, 2, 3, 5, 7) if high / low > 3 else (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=9)
    place = {} if is_inside else dict(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for text in axis.legend(fontsize=8, **place).get_texts():
        text.set_parse_math(False)  # "$" in a model's name is no formula


def model_colors(points) -> dict:
    """Returns a color for each model, from light for the smallest to dark for the largest."""
    names = points.names()
    return dict(zip(names, colormap(len(names), "viridis_r"), strict=True))


def colormap(count: int, name: str):
    """Returns colors from a map, (count, 4), without its palest end."""
    from matplotlib import colormaps

    return colormaps[name](np.linspace(0.12, 1.0, count))


def marker_areas(images: np.ndarray) -> np.ndarray:
    """Returns areas of markers that grow with the logarithm of images seen."""
    if not np.isfinite(images).any():
        return np.full(len(images), 30.0)
    log = np.log(images)
    low, high = np.nanmin(log), np.nanmax(log)
    return np.nan_to_num(12 + 60 * (log - low) / max(high - low, 1e-9), nan=30.0)


def known(values: np.ndarray) -> np.ndarray:
    """Returns the values that aren't NaN."""
    return values[~np.isnan(values)]


def title_of(metric: str) -> str:
    """Returns what the axis of a metric's error is called."""
    name = metric.replace("accuracy", "error") if "accuracy" in metric else metric
    return name.replace("_", " ")


def formula(law: PowerLaw, x: str) -> str:
    """Returns a power law as text."""
    shifted = f"({x} + {law.d:.3g})" if law.d else x
    return f"{law.a:.3g} {shifted}^-{law.b:.3g}{f' + {law.c:.3g}' if law.c else ''}"


def short(count: float) -> str:
    """Returns a number of images such as 82M."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{letter}"
    return f"{count:.3g}"


def check(path: pathlib.Path) -> None:
    """Raises UserError if a figure would replace files that this program didn't write."""
    check_png("--out", f"{path}.png")
    pdf = path.with_name(f"{path.name}.pdf")
    if pdf.exists() and b"vit_jax" not in pdf.read_bytes():
        raise UserError(f"--out has {pdf}, a file that this program didn't write: move it")


def save(figure, path: pathlib.Path) -> None:
    """Writes a figure as a PNG and a PDF."""
    drawing.save(figure, f"{path}.png")
    figure.savefig(f"{path}.pdf", metadata=AUTHOR)
