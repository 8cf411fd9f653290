"""Prints what models cost, by name: parameters, operations, activations, exaFLOPs of training."""

import argparse
import json
import math
from collections.abc import Iterator, Sequence

from vit_jax import models
from vit_jax.checks import COUNT, Range, check_range
from vit_jax.scaling import flops

IMAGES = Range(0, above=True, optional=True)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `python -m vit_jax.scaling flops`."""
    parser.add_argument(
        "variants", nargs="+", metavar="VARIANT", help="such as B/16, R50+L/32 or SoViT-400m/14"
    )
    parser.add_argument(
        "--image_size", type=int, default=224, help="in pixels, of square images (default: 224)"
    )
    parser.add_argument(
        "--images", type=float, help="how many images to train on, such as 2.121e9, for exaFLOPs"
    )
    parser.add_argument("--json", action="store_true", help="print an object per line")


def run(args: argparse.Namespace) -> Iterator[str]:
    """Yields the lines to print.

    Raises:
        UserError: an unknown variant, or a size or number that can't be used.
    """
    check_range("--image_size", args.image_size, COUNT)
    check_range("--images", args.images, IMAGES)
    for variant in args.variants:  # a mistake in the last is reported before the first is counted
        flops.check_image(models.create(variant), (args.image_size, args.image_size, 3))
    counts = (count(variant, args.image_size, args.images) for variant in args.variants)
    if args.json:
        yield from map(json.dumps, counts)
    else:
        yield from table(list(counts))


def count(variant: str, image_size: int, images: float | None = None) -> dict:
    """Returns what a model with 1,000 classes costs in bfloat16.

    Args:
        variant: such as "B/16".
        image_size: in pixels, of square images.
        images: how many images it is trained on; None: unknown.

    Returns:
        variant and image_size.
        params: the number of parameters.
        gflops: 1e9 operations of the forward pass of one image, two for a multiply-add.
        train_gflops: the same of its forward and backward pass.
        forward_activation_bytes, train_activation_bytes: see `flops.activation_bytes`.
        train_exaflops: 1e18 operations of training on `images`, as papers count them: three
            times those of the forward passes.
    """
    model, shape = models.create(variant, dtype="bfloat16"), (image_size, image_size, 3)
    forward = flops.forward_flops(model, shape)
    return dict(
        variant=variant,
        image_size=image_size,
        params=flops.count_params(model, shape),
        gflops=forward / 1e9,
        train_gflops=flops.training_flops(model, shape) / 1e9,
        forward_activation_bytes=flops.activation_bytes(model, shape, training=False),
        train_activation_bytes=flops.activation_bytes(model, shape, training=True),
        train_exaflops=None if images is None else 3 * forward * images / 1e18,
    )


def table(counts: Sequence[dict]) -> Iterator[str]:
    """Yields the lines of a table."""
    heads = "variant", "image", "parameters", "GMACs"
    heads += "GFLOPs", "train GFLOPs", "MB", "train MB"
    has_images = counts[0]["train_exaflops"] is not None
    rows = [heads + ("exaFLOPs",) * has_images]
    for row in counts:
        activations = row["forward_activation_bytes"], row["train_activation_bytes"]
        cells = row["variant"], f"{row['image_size']}", f"{row['params'] / 1e6:,.1f} M"
        cells += tuple(map(number, (row["gflops"] / 2, row["gflops"], row["train_gflops"])))
        cells += tuple(number(size / 1e6) for size in activations)
        rows.append(cells + (number(row["train_exaflops"]),) if has_images else cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *others = map(str.rjust, row, widths)
        yield "  ".join([row[0].ljust(widths[0]), *others])
    yield ""
    yield "Models have 1,000 classes and a class token. Of one image, forward, and in training"
    yield "forward and backward. GMACs: multiply-adds; MB: of activations in bfloat16."
    if has_images:
        yield "exaFLOPs: of training on all images, 3 x forward, as papers count."


def number(value: float) -> str:
    """Returns a number with four digits, or more if it is 10,000 or larger."""
    digits = 0 if value == 0 else max(3 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{digits}f}"
