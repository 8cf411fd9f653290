"""Tidy tables of results, a row for each run and evaluation: gathered from runs, or read from CSV.

Columns of a gathered table, in this order:

    cell          the run's folder, below the study's
    variant, image_size, params, gflops    gflops: of the forward pass of one image
    step, final   final: 1 at the run's last step, otherwise 0
    images_seen, exaflops, device_hours    until then; exaflops: three times the forward passes'
    train_examples                         how many there are
    <field>       each field of the configuration that differs between runs, such as model.width
    <group>/<name>    each metric of metrics.jsonl but training's, such as val/accuracy

In a CSV made elsewhere, any columns will do: `points` says which are used.
"""

import contextlib
import csv
import dataclasses
import io
import json
import logging
import math
import re
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from vit_jax import models
from vit_jax.checks import size_pair
from vit_jax.errors import UserError, first_line
from vit_jax.logs.run_log import read_rows
from vit_jax.runs import run_folder
from vit_jax.scaling import flops
from vit_jax.storage.files import open_path
from vit_jax.training import train_state

logger = logging.getLogger("vit_jax")

Row = dict[str, str | float | None]

MODELS = ("variant", "model")  # columns that tell the models apart
EXAFLOPS, IMAGES, SIZE = "exaflops", "images_seen", "gflops"
IMAGE_SIZE = 224  # of a table that doesn't say
# Fields that follow from others, or that don't change what is learned.
NOT_AXES = (
    *("num_epochs", "init_from_hint", "num_classes", "dataset.fingerprint", "dataset.parts"),
    *("dataset.order", "dataset.num_examples", "log_every_steps", "eval_every_steps"),
    *("checkpoint_every_steps", "keep_every_steps", "best_metric", "report", "wandb"),
    *("model.remat", "model.attention_impl", "model.scan", "model.variant", "image_size"),
    *("dataset.in_memory_mb", "dataset.eval_cache_mb", "mesh.data", "mesh.fsdp", "mesh.tensor"),
)


@dataclasses.dataclass(frozen=True)
class Points:
    """What laws are fitted to, in increasing order of compute.

    Attributes:
        metric: the column that the error is from.
        error, compute: (N,).
        model: the names of the models, (N,).
        images: how many images were seen, (N,); NaN where that is unknown.
        size: the size of the models, (N,); NaN where that is unknown.
    """

    metric: str
    error: np.ndarray
    compute: np.ndarray
    model: np.ndarray
    images: np.ndarray
    size: np.ndarray

    def __getitem__(self, chosen) -> "Points":
        """Returns some of the points."""
        arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Points(arrays.pop("metric"), **{name: a[chosen] for name, a in arrays.items()})

    def names(self) -> list[str]:
        """Returns the names of the models, the smallest first: by their numbers, or by size."""
        names = np.unique(self.model)
        with contextlib.suppress(ValueError):
            return sorted(names, key=float)
        scale = self.compute if np.isnan(self.size).any() else self.size
        return sorted(names, key=lambda name: scale[self.model == name].min())


def points(rows: Sequence[Row], error: str, compute: str, model: str | None, size: str) -> Points:
    """Returns the rows that have an error and its compute, as points.

    Args:
        rows: a table.
        error: the column with the error; of a column whose name has "accuracy" in it, a share or
            percent, what is missing to 1.
        compute, size: columns.
        model: the column that tells the models apart; None: there is one.

    Raises:
        UserError: a column is missing, or has something else than numbers above 0.
    """
    known = {name: numbers(rows, name) for name in (error, compute)}
    errors = known[error]
    if "accuracy" in error:
        errors = 1 - errors / (100 if np.any(errors > 1) else 1)
    chosen = ~np.isnan(errors) & ~np.isnan(known[compute])
    if not chosen.any():
        raise UserError(f"No row of the table has both {error} and {compute}")
    if "final" in rows[0] and (unfinished := chosen & (numbers(rows, "final") == 0)).any():
        logger.info(f"{error}: {unfinished.sum()} evaluations before the end of runs aren't used")
        chosen &= ~unfinished
        if not chosen.any():
            raise UserError(f"No run has {error} at its last step yet: laws are of finished runs")
    if (perfect := chosen & (errors <= 0)).any():
        logger.warning(
            f"{error}: {perfect.sum()} of {chosen.sum()} rows have an error of 0 or less, which "
            "has no logarithm: they aren't used"
        )
        chosen &= ~perfect
    if (wrong := chosen & (known[compute] <= 0)).any():
        raise UserError(
            f"Row {np.flatnonzero(wrong)[0] + 1} has {known[compute][wrong][0]:g} in the column "
            f"{compute!r}; compute must be above 0"
        )
    of_row = numbers_or_nan(rows, IMAGES), numbers_or_nan(rows, size)
    names = ["all" if model is None else str(format_cell(row[model])) for row in rows]
    found = Points(error, errors, known[compute], np.array(names), *of_row)
    chosen = np.flatnonzero(chosen)
    return found[chosen[np.argsort(found.compute[chosen], kind="stable")]]


def check_column(rows: Sequence[Row], column: str) -> None:
    """Raises UserError if a table has no such column."""
    if column not in rows[0]:
        raise UserError(f"The table has no column {column!r}; it has {', '.join(rows[0])}")


def numbers(rows: Sequence[Row], column: str) -> np.ndarray:
    """Returns a column as numbers, NaN where it is empty.

    Raises:
        UserError: there is no such column, or it has something else in it.
    """
    check_column(rows, column)
    for number, row in enumerate(rows, 1):
        value = row[column]
        if isinstance(value, str) or (value is not None and not math.isfinite(value)):
            raise UserError(f"Row {number} has {value!r} in the column {column!r}, not a number")
    return np.array([math.nan if row[column] is None else row[column] for row in rows])


def numbers_or_nan(rows: Sequence[Row], column: str) -> np.ndarray:
    """Returns a column as `numbers`; all NaN if there is none."""
    return numbers(rows, column) if column in rows[0] else np.full(len(rows), math.nan)


def model_column(rows: Sequence[Row]) -> str | None:
    """Returns the first of MODELS that a table has; None if it has none."""
    return next((name for name in MODELS if name in rows[0]), None)


def add_costs(rows: Sequence[Row]) -> list[Row]:
    """Returns a table with `images_seen`, `gflops` and `exaflops`, as far as they can be computed.

    Images are steps x batch_size, and FLOPs are those of the variant for images of `image_size`
    pixels, 224 if there is no such column.
    """
    model, rows = model_column(rows), [dict(row) for row in rows]
    if IMAGES not in rows[0] and {"steps", "batch_size"} <= rows[0].keys():
        images = numbers(rows, "steps") * numbers(rows, "batch_size")
        set_column(rows, IMAGES, images)
    if SIZE not in rows[0] and model is not None:
        size = numbers(rows, "image_size") if "image_size" in rows[0] else IMAGE_SIZE
        sizes = np.broadcast_to(np.nan_to_num(size, nan=IMAGE_SIZE), len(rows)).astype(int)
        pairs = [(str(row[model]), int(side)) for row, side in zip(rows, sizes, strict=True)]
        try:
            costs = {pair: forward_gflops(*pair) for pair in set(pairs)}
        except UserError:  # names of other models
            return rows
        set_column(rows, SIZE, np.array([costs[pair] for pair in pairs]))
    if EXAFLOPS not in rows[0] and {IMAGES, SIZE} <= rows[0].keys():
        set_column(rows, EXAFLOPS, 3e-9 * numbers(rows, SIZE) * numbers(rows, IMAGES))
    return rows


def set_column(rows: list[Row], column: str, values: np.ndarray) -> None:
    """Sets a column of a table; NaN leaves it empty."""
    for row, value in zip(rows, values, strict=True):
        row[column] = None if math.isnan(value) else float(value)


def forward_gflops(variant: str, image_size: int) -> float:
    """Returns the operations of a variant with 1,000 classes in the forward pass of one image."""
    return flops.forward_flops(models.create(variant), (image_size, image_size, 3)) / 1e9


def read_csv(path) -> list[Row]:
    """Returns the rows of a CSV file with a header; empty cells are None.

    Raises:
        UserError: there is no such file, or it isn't a table.
    """
    path = open_path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} isn't a CSV file: {error}") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or first_line(error)}") from None
    try:
        header, *lines = [line for line in csv.reader(io.StringIO(text), strict=True) if line]
    except (csv.Error, ValueError) as error:
        problem = first_line(error) if text.strip() else "it is empty"
        raise UserError(f"{path} isn't a CSV file: {problem}") from None
    header = [name.strip() for name in header]
    if len(set(header)) < len(header):
        raise UserError(f"{path} has two columns of one name: its header is {', '.join(header)}")
    for number, line in enumerate(lines, 1):
        if len(line) != len(header):
            raise UserError(
                f"{path}: row {number} has {len(line)} cells; its header has {len(header)}"
            )
    if not lines:
        raise UserError(f"{path} has no rows, only a header")
    return [dict(zip(header, map(parse_cell, line), strict=True)) for line in lines]


def parse_cell(text: str) -> str | float | None:
    """Returns a cell as a number if it is one; None if it is empty."""
    try:
        return float(text)
    except ValueError:
        return text.strip() or None


def to_csv(rows: Sequence[Row]) -> str:
    """Returns a table as the text of a CSV file; whole numbers have no decimal point."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: format_cell(value) for name, value in row.items()})
    return text.getvalue()


def format_cell(value) -> str | float | None:
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return int(value) if is_whole else value


def gather(root) -> list[Row]:
    """Returns the table of the runs below a folder, see above.

    Runs without an evaluation are left out, with a warning.

    Raises:
        UserError: there is no run with an evaluation, or a run can't be read.
    """
    root = open_path(root)
    if not root.is_dir():
        raise UserError(f"There is no folder {root}")
    runs = {str(path.relative_to(root)): path for path in find_runs(root)}
    configs = {name: run_folder.require_config(path) for name, path in runs.items()}
    fields = {name: flatten(config.to_dict()) for name, config in configs.items()}
    axes = differing(list(fields.values()))
    table, empty = [], []
    for name, path in runs.items():
        described = dict(cell=name, **cost(configs[name])) if has_log(path) else None
        rows = list(evaluations(path, configs[name])) if described else []
        empty += [] if rows else [name]
        for measured, metrics in rows:
            seen = measured["images_seen"]
            exaflops = 3e-9 * described[SIZE] * seen
            values = {axis: fields[name].get(axis) for axis in axes}
            table.append(described | measured | {EXAFLOPS: exaflops} | values | metrics)
    if not table:
        raise UserError(f"{root} has no runs with an evaluation, of {len(runs)} runs below it")
    if empty:
        logger.warning(f"Not in the table, without an evaluation yet: {', '.join(empty)}")
    columns = dict.fromkeys(column for row in table for column in row)
    return [{column: row.get(column) for column in columns} for row in table]


def find_runs(folder) -> Iterator:
    """Yields the folders of runs at and below a folder, in order."""
    if run_folder.has_config(folder):
        yield folder
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            yield from find_runs(path)


def has_log(workdir) -> bool:
    """Whether a run has logged anything yet."""
    return (workdir / "metrics.jsonl").exists()


def cost(config) -> Row:
    """Returns what a run's model is and costs."""
    sides = size_pair("config.image_size", config.image_size)
    shape, model = (*sides, config.dataset.get("channels", 3)), models.from_config(config)
    params = jax.eval_shape(lambda: train_state.init_params(model, shape, config.seed))
    return dict(
        variant=config.model.variant,
        image_size=sides[0],
        params=flops.num_params(params),
        gflops=flops.forward_flops(model, shape) / 1e9,
    )


def evaluations(workdir, config) -> Iterator[tuple[Row, Row]]:
    """Yields what was spent until an evaluation of a run, and its metrics."""
    found, seconds, last, hours = {}, 0.0, 0, {}
    for row in read_rows(workdir):
        step, rate = row["step"], row.get("train/images_per_second")
        if rate:
            seconds += (step - last) * config.batch_size / rate
            last = step
        hours[step] = seconds / 3600
        metrics = {n: v for n, v in row.items() if n != "step" and not n.startswith("train/")}
        if metrics:
            found.setdefault(step, {}).update(metrics)
    devices = num_devices(workdir)
    for step, metrics in found.items():
        yield (
            dict(
                step=step,
                final=int(step == config.get("total_steps")),
                images_seen=step * config.batch_size,
                device_hours=hours[step] * devices if devices and seconds else None,
                train_examples=config.dataset.get("num_examples"),
            ),
            metrics,
        )


def num_devices(workdir) -> int | None:
    """Returns how many devices a run last started on, by its log; None if it doesn't say."""
    try:
        log = (workdir / "train.log").read_bytes().decode(errors="replace")
    except OSError:
        return None
    counts = re.findall(r" Devices +(\d+) x ", log)
    return int(counts[-1]) if counts else None


def flatten(fields: dict, prefix: str = "") -> dict:
    """Returns the fields of a configuration by their dotted names; sequences are JSON."""
    flat = {}
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            is_plain = value is None or isinstance(value, (str, int, float))
            flat[prefix + name] = value if is_plain else json.dumps(value)
    return flat


def differing(configs: Sequence[dict]) -> list[str]:
    """Returns the fields whose values differ between flat configurations, but for NOT_AXES."""
    names = dict.fromkeys(name for config in configs for name in config if name not in NOT_AXES)
    return [name for name in names if len({repr(config.get(name)) for config in configs}) > 1]
