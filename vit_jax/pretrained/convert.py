"""Converts weights from one format to another."""

import argparse
import logging
import sys

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.pretrained import architecture, export
from vit_jax.pretrained.export import save
from vit_jax.pretrained.loading import load
from vit_jax.pretrained.weights import names_in_file, read

logger = logging.getLogger("vit_jax")


def convert(
    source: str,
    target: str,
    format: str,
    image_size=None,
    class_names=None,
    num_heads: int | None = None,
    approximate: bool = False,
) -> str:
    """Writes what is at `source` to `target` in a format of `export.FORMATS`; says what it is.

    image_size: (height, width) of the images it is to be for; None: those it is of.
    """
    weights = read(source, num_heads)
    model = models.create("B/16", **weights.model_fields)
    image_size = image_size or weights.image_size
    save(
        load(weights, model, image_size),
        target,
        format,
        model=model,
        image_size=image_size,
        mean=weights.mean,
        std=weights.std,
        keep=weights.keep,
        class_names=class_names or weights.class_names,
        approximate=approximate,
    )
    return architecture.describe(weights.model_fields)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.pretrained", description="Turns weights of one format into another."
    )
    parser.add_argument("source", help="a file, a folder, a run, or hf:owner/name")
    parser.add_argument("target", help="a file; a folder for timm (unless .safetensors) and hf")
    parser.add_argument("--format", required=True, choices=export.FORMATS)
    parser.add_argument(
        "--image_size",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="of images: to resize positions to, or where the source doesn't tell",
    )
    parser.add_argument("--num_heads", type=int, help="where the source doesn't tell")
    parser.add_argument("--class_names", help="a text file with a name a line, for config.json")
    parser.add_argument(
        "--approximate",
        action="store_true",
        help="write even where the other code computes GELU or LayerNorm in another way",
    )
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    try:
        names = names_in_file(given.class_names) if given.class_names else None
        what = convert(
            given.source,
            given.target,
            given.format,
            given.image_size,
            names,
            given.num_heads,
            given.approximate,
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{given.source}, {what} -> {given.target}")
    return 0
