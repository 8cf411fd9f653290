"""Fits laws to the results of a study, and draws them."""

import argparse
import collections
import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from vit_jax.checks import Range, check_range
from vit_jax.errors import UserError
from vit_jax.scaling import plots, tables
from vit_jax.scaling.laws import (
    RESAMPLES,
    Fit,
    fit_joint_law,
    fit_power_law,
    frontier,
    noise_tolerance,
)
from vit_jax.scaling.tables import EXAFLOPS, IMAGES, SIZE, Points, Row
from vit_jax.storage.files import open_path
from vit_jax.storage.mirror import written_folder

logger = logging.getLogger("vit_jax")


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns of a table are what: `shapes` are those of joint laws."""

    compute: str
    model: str | None
    size: str
    shapes: tuple[str, ...]


@dataclasses.dataclass
class Study:
    """The laws of one metric.

    Attributes:
        points: all results.
        chosen: which of them are on the frontier, bool (N,).
        tolerance: of the frontier.
        compute: the law of the frontier.
        models: the law in compute of each model that has enough points.
        images, size: the laws of the lowest errors, in images seen and in model size; or None.
        joint: the joint law of each column of a shape, by its name.
        shape_points: the points that each is fitted to.
        notes: which laws weren't fitted, and why.
        best: what is best for the budget, see `best_for`; None without one.
    """

    points: Points
    chosen: np.ndarray
    tolerance: float
    compute: Fit
    models: dict[str, Fit] = dataclasses.field(default_factory=dict)
    images: Fit | None = None
    size: Fit | None = None
    joint: dict[str, Fit] = dataclasses.field(default_factory=dict)
    shape_points: dict[str, Points] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    best: dict | None = None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `python -m vit_jax.scaling fit`."""
    add = parser.add_argument
    add("source", help="a folder of runs, or a CSV table")
    add("--out", help="the folder to write to (default: `fit` in the folder, or beside the table)")
    add("--error", help="columns of errors or accuracies, separated by commas (default: by name)")
    add("--compute", help=f"the column of compute (default: {EXAFLOPS})")
    add("--model", help="the column that tells models apart (default: variant or model)")
    add("--size", default=SIZE, help=f"the column of the models' size (default: {SIZE})")
    add(
        "--shape",
        help="columns to fit the joint law of a shape and compute to, separated by commas, such as "
        "model.width,model.depth (default: the size)",
    )
    add("--budget", type=float, help="in FLOPs, or as --compute: names the best model for it")
    add("--resamples", type=int, default=RESAMPLES, help=f"of intervals (default: {RESAMPLES})")


def run(args: argparse.Namespace) -> Iterator[str]:
    """Yields the lines to print; writes fit.json, the figures, and the table of runs.

    Raises:
        UserError: a table without the columns, too few points, a fit that doesn't converge, or a
            figure that would replace a file that isn't one.
    """
    check_range("--budget", args.budget, Range(0, above=True, optional=True))
    check_range("--resamples", args.resamples, Range(20, 1_000_000, whole=True))
    source = open_path(args.source)
    is_folder = source.is_dir()
    rows = tables.gather(source) if is_folder else tables.add_costs(tables.read_csv(source))
    out = epath.Path(args.out) if args.out else (source if is_folder else source.parent) / "fit"
    if is_folder:  # whether or not a law fits
        with written_folder(out) as folder:
            (folder / "table.csv").write_text(tables.to_csv(rows))
        yield f"{out / 'table.csv'}: {len(rows)} evaluations"
    columns = find_columns(rows, args)
    budget = args.budget and args.budget / (1e18 if columns.compute == EXAFLOPS else 1)
    studies = []
    for metric in error_columns(rows, args.error):
        study = fit_study(rows, metric, columns, args.resamples)
        study.best = budget and best_for(study, budget, columns.size)
        yield from describe(study, columns)
        studies.append(study)
    with written_folder(out) as folder:
        figures = plots.figures(studies, columns)
        for name in figures:
            plots.check(folder / name)
        write_json(folder / "fit.json", studies, columns)
        yield f"{out / 'fit.json'}: constants and intervals"
        for name, draw in figures.items():
            plots.save(draw(), folder / name)
            yield f"{out / name}.png, .pdf: {plots.DESCRIPTIONS[name.split('-')[0]]}"


def find_columns(rows: Sequence[Row], args: argparse.Namespace) -> Columns:
    """Returns the columns that the flags name, and the defaults of others."""
    if args.compute is None and EXAFLOPS not in rows[0]:
        raise UserError(
            f"The table has no column {EXAFLOPS!r}, nor what it follows from (variant, and "
            f"{IMAGES} or steps and batch_size): give --compute, one of {', '.join(rows[0])}"
        )
    shapes = tuple(args.shape.split(",")) if args.shape else ()
    for name in (*shapes, *filter(None, [args.model])):
        tables.check_column(rows, name)
    return Columns(
        compute=args.compute or EXAFLOPS,
        model=args.model or tables.model_column(rows),
        size=args.size,
        shapes=shapes or (args.size,),
    )


def error_columns(rows: Sequence[Row], names: str | None) -> list[str]:
    """Returns the columns of errors; raises UserError if they aren't named and can't be told."""
    if names:
        return names.split(",")
    errors = [name for name in rows[0] if name.endswith("error")]
    accuracies = [name for name in rows[0] if name.endswith("accuracy")]
    if "val/accuracy" in accuracies:
        accuracies = ["val/accuracy"]
    if found := errors or accuracies:
        return found
    raise UserError(
        "The table has no column whose name ends in 'error' or 'accuracy': give --error, one of "
        f"{', '.join(rows[0])}"
    )


def fit_study(rows: Sequence[Row], metric: str, columns: Columns, resamples: int) -> Study:
    """Fits every law of a metric; only that of the frontier must succeed."""
    points = tables.points(rows, metric, columns.compute, columns.model, columns.size)
    tolerance = noise_tolerance(points.compute, points.error, points.model)
    chosen = frontier(points.compute, points.error, tolerance)
    try:
        law = fit_power_law(points.compute[chosen], points.error[chosen], resamples=resamples)
    except UserError as error:
        at = f"{chosen.sum()} of {len(chosen)} points are on the frontier"
        raise UserError(f"{metric}: {error} ({at})") from None
    study = Study(points, chosen, tolerance, law)

    def attempt(what: str, function, *arguments):
        try:
            return function(*arguments, resamples=resamples)
        except UserError as error:
            study.notes.append(f"no law of {what}: {error}")
            return None

    for name in points.names() if columns.model else ():
        own = points[points.model == name]
        if fit := attempt(name, fit_power_law, own.compute, own.error):
            study.models[name] = fit
    if np.isfinite(points.images).any():
        study.images = attempt("images seen", fit_lowest, points.images, points.error)
    if np.isfinite(points.size).any():
        study.size = attempt(columns.size, fit_lowest, points.size, points.error)
    for shape in (name for name in columns.shapes if name in rows[0]):
        if fitted := attempt(f"{shape} and compute", fit_shape, rows, metric, columns, shape):
            study.joint[shape], study.shape_points[shape] = fitted
    return study


def fit_shape(
    rows: Sequence[Row], metric: str, columns: Columns, shape: str, resamples: int
) -> tuple[Fit, Points]:
    """Returns the joint law of a column and compute, and the points that it is fitted to."""
    rows = around_center(rows, shape, columns.shapes)
    points = tables.points(rows, metric, columns.compute, columns.model, shape)
    points = points[~np.isnan(points.size)]
    return fit_joint_law(points.size, points.compute, points.error, resamples=resamples), points


def fit_lowest(x: np.ndarray, error: np.ndarray, resamples: int) -> Fit:
    """Fits a power law without a shift to the lowest errors at no larger x, known x only."""
    x, error = x[~np.isnan(x)], error[~np.isnan(x)]
    lowest = frontier(x, error)
    return fit_power_law(x[lowest], error[lowest], shift=False, resamples=resamples)


def around_center(rows: Sequence[Row], shape: str, shapes: Sequence[str]) -> list[Row]:
    """Returns the rows of a star sweep in which only one of the columns has left the center.

    The center is the most frequent value of each column.
    """
    for other in shapes:
        if other != shape:
            center, _ = collections.Counter(row[other] for row in rows).most_common(1)[0]
            rows = [row for row in rows if row[other] == center]
    return list(rows)


def best_for(study: Study, budget: float, size: str) -> dict:
    """Returns what is best for a budget of compute.

    Args:
        study: the laws.
        budget: in the unit of the points' compute.
        size: the column of the points' size.

    Returns:
        compute: the budget.
        error: by the law of the frontier.
        is_extrapolated: whether the budget exceeds the compute of all points.
        model, model_error: the model whose own law has the lowest error, among those with a point
            at no more compute, and that error; None if there is none.
        images: how many images that model sees for the budget; None if that is unknown.
        shapes: by column, `value`, where the joint law is lowest, its `interval`, `error`, and
            `images` for the column of the size.
    """
    points = study.points
    errors = {
        name: float(fit.law(budget))
        for name, fit in study.models.items()
        if points.compute[points.model == name].min() <= budget
    }
    model = min(errors, key=errors.get, default=None)
    shapes = {}
    for name, fit in study.joint.items():
        value = float(fit.law.optimum(budget))
        interval = fit.interval(lambda law: law.optimum(budget))
        error = float(fit.law(value, budget))
        shapes[name] = dict(value=value, interval=interval, error=error)
        if name == size:
            shapes[name]["images"] = images_for(points, budget, value)
    return dict(
        compute=budget,
        error=float(study.compute.law(budget)),
        is_extrapolated=bool(budget > points.compute.max()),
        model=model,
        model_error=errors.get(model),
        images=None if model is None else images_for(points[points.model == model], budget),
        shapes=shapes,
    )


def images_for(points: Points, budget: float, size: float | None = None) -> float | None:
    """Returns how many images a budget is worth, for a model of a size or for that of the points.

    None: the points don't tell.
    """
    known = ~np.isnan(points.images) & ~(np.isnan(points.size) if size else False)
    if not known.any():
        return None
    log_ratio = np.log(points.images / points.compute)[known]
    if size is None:
        return float(budget * np.exp(np.median(log_ratio)))
    line = np.polyfit(np.log(points.size[known]), log_ratio, 1)
    return float(budget * np.exp(np.polyval(line, np.log(size))))


def describe(study: Study, columns: Columns) -> Iterator[str]:
    """Yields lines about the laws of a metric."""
    points, fit = study.points, study.compute
    yield (
        f"{points.metric}: error = {plots.formula(fit.law, 'C')}, C in {columns.compute}; from "
        f"{fit.points} of {len(points.error)} points, which scatter by {fit.noise:.1%}"
    )
    yield "  95% intervals: " + ", ".join(
        f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in fit.intervals().items()
    )
    for what, of in (("images seen", study.images), (columns.size, study.size)):
        if of:
            yield f"  lowest error for {what} x: {plots.formula(of.law, 'x')}"
    for name, of in study.joint.items():
        low, high = of.interval(lambda law: law.s)
        yield f"  best {name} grows as C^{of.law.s:.3f} (95%: {low:.3f} to {high:.3f})"
    if best := study.best:
        beyond = ", beyond all points" if best["is_extrapolated"] else ""
        yield f"  for {best['compute']:g} {columns.compute}: error {best['error']:.4f}{beyond}"
        if best["model"] is not None:
            images = of_images(best["images"])
            yield f"    best model {best['model']}{images}: error {best['model_error']:.4f}"
        for name, shape in best["shapes"].items():
            low, high = shape["interval"]
            images = of_images(shape.get("images"))
            yield f"    best {name} {shape['value']:.4g} (95%: {low:.4g} to {high:.4g}){images}"
    yield from (f"  {note}" for note in study.notes)


def of_images(images: float | None) -> str:
    return "" if images is None else f", {images:.3g} images"


def write_json(path, studies: Sequence[Study], columns: Columns) -> None:
    """Writes the constants of the first metric, and below `metrics` those of all."""
    metrics = {study.points.metric: as_json(study) for study in studies}
    first = studies[0].points.metric
    content = {"compute": columns.compute, "error": first, **metrics[first], "metrics": metrics}
    path.write_text(json.dumps(content, indent=2) + "\n")


def as_json(study: Study) -> dict:
    """Returns the laws of a metric as dictionaries."""
    joint = {
        name: constants(fit) | {"s": fit.law.s, "s_interval": fit.interval(lambda law: law.s)}
        for name, fit in study.joint.items()
    }
    return dict(
        **constants(study.compute),
        frontier=dict(
            points=int(study.chosen.sum()), of=len(study.chosen), tolerance=study.tolerance
        ),
        models={name: constants(fit) for name, fit in study.models.items()},
        images=study.images and constants(study.images),
        size=study.size and constants(study.size),
        joint=joint,
        budget=study.best,
        notes=study.notes,
    )


def constants(fit: Fit) -> dict:
    return dict(**fit.law._asdict(), intervals=fit.intervals(), noise=fit.noise, points=fit.points)
