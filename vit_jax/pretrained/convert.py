"""The command line: converts weights from one format to another, and lists known weights."""

import argparse
import csv
import importlib.resources
import logging
import sys
from collections.abc import Sequence

import jax

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.pretrained import export
from vit_jax.pretrained.adapt import image_size_of
from vit_jax.pretrained.codebases.architecture import describe
from vit_jax.pretrained.export import save
from vit_jax.pretrained.loading import load, with_mask_token
from vit_jax.pretrained.weights import read, read_class_names
from vit_jax.runs.checkpoint_paths import at_step
from vit_jax.weight_flags import add_weight_flags

logger = logging.getLogger("vit_jax")


def convert(
    source: str,
    target: str,
    format: str,
    image_size: Sequence[int] | None = None,
    grid: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    num_heads: int | None = None,
    approximate: bool = False,
    overwrite: bool = False,
) -> str:
    """Reads weights in any format, and writes them in another one.

    Args:
        source: what `pretrained.load` takes as its path.
        target, format, approximate: see `pretrained.save`.
        image_size: (height, width) to resize the positions to; None: the source's.
        grid: (rows, columns) of the source's positions, if the file doesn't specify it.
        class_names: in the order of the labels; None: the source's.
        num_heads: used if the source doesn't tell.
        overwrite: whether a model that is already there may be replaced.

    Returns:
        A short description of the model, such as "ViT-B/16".

    Raises:
        UserError: as `pretrained.load` and `pretrained.save`; the target is the source, or exists;
            or the source has another number of heads.
    """
    weights = read(source, num_heads)
    weights.check_num_heads(num_heads)
    export.check_target(target, format, source)
    if not overwrite and export.exists(target):
        raise UserError(f"{target} exists: write to another path, or add --overwrite")
    if format != "google":  # which has no settings
        weights.warn_of_assumptions()
    model = models.create("B/16", **weights.model_fields)
    stored_size = image_size_of(weights, model, grid) if grid else weights.image_size
    image_size = image_size or stored_size
    params = load(weights, model, image_size, grid=grid, new_head=False)
    save(
        with_mask_token(params, weights, model),
        target,
        format,
        model=model,
        image_size=image_size,
        mean=weights.mean,
        std=weights.std,
        eval_crop=weights.eval_crop,
        eval_method=weights.eval_method,
        class_names=class_names or weights.class_names,
        approximate=approximate,
    )
    return describe(weights.model_fields)


def published() -> list[dict[str, str]]:
    """Returns weights whose architecture loads, with the numbers that were published for them.

    The columns: weights, a path for `open`; image_size, in pixels, of its positions or settings;
    accuracy, in percent on ImageNet, or empty; eval_size, in pixels, of the images that it was
    measured with; measured: what has this accuracy; source: who says so.
    """
    table = importlib.resources.files("vit_jax.pretrained") / "published.csv"
    return list(csv.DictReader(table.read_text().splitlines()))


NUMBERS = ("image_size", "accuracy", "eval_size")  # columns of `published`


def published_table() -> list[str]:
    """Returns the lines of a text with a row for each of `published`."""
    rows = [{name: name for name in published()[0]}, *published()]
    widths = {name: max(len(row[name]) for row in rows) for name in rows[0]}
    lines = []
    for row in rows:
        cells = (
            row[name].rjust(width) if name in NUMBERS else row[name].ljust(width)
            for name, width in widths.items()
        )
        lines.append("  ".join(cells).rstrip())
    return lines


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.pretrained",
        description="Converts weights to another format.",
        epilog="`python -m vit_jax.pretrained list` lists weights whose architecture loads.",
    )
    parser.add_argument("source", help="a file, a folder, a run's folder, or hf:owner/name")
    parser.add_argument(
        "target",
        help="the file or folder to write: an .npz for google, a folder or a .safetensors file for "
        "timm, a folder for hf",
    )
    parser.add_argument("--format", required=True, choices=export.FORMATS)
    add_weight_flags(parser)
    parser.add_argument(
        "--class_names", help="a text file with the name of a class per line, for config.json"
    )
    parser.add_argument(
        "--approximate",
        action="store_true",
        help="write a model whose GELU, LayerNorm epsilon or normalization the other codebase "
        "can't represent",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    if list(sys.argv[1:] if arguments is None else arguments) == ["list"]:
        print("\n".join(published_table()))
        return 0
    args = parse_flags(arguments)
    jax.config.update("jax_platforms", "cpu")  # it computes nothing that an accelerator would help
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    try:
        source = at_step(args.source, args.step)
        description = convert(
            source,
            args.target,
            args.format,
            image_size=args.image_size,
            grid=args.grid,
            class_names=read_class_names(args.class_names) if args.class_names else None,
            num_heads=args.num_heads,
            approximate=args.approximate,
            overwrite=args.overwrite,
        )
        print(f"{source}, {description} -> {args.target}", flush=True)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"Not enough memory: {error or 'use a smaller --image_size'}", file=sys.stderr)
        return 2
    return 0
