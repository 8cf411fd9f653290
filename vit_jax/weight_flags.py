"""The flags of every command that reads weights: which of a run's, and what they may not tell."""

import argparse


def add_weight_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --step, of a run, and --image_size, --grid and --num_heads: see `Classifier.load`."""
    parser.add_argument(
        "--step", help="a checkpoint of the run: best, latest or its step (default: latest)"
    )
    pair = dict(nargs=2, type=int)
    parser.add_argument(
        "--image_size",
        **pair,
        metavar=("HEIGHT", "WIDTH"),
        help="the image size to resize the positions to (default: that of the weights; required if "
        "they don't tell it)",
    )
    parser.add_argument(
        "--grid",
        **pair,
        metavar=("ROWS", "COLUMNS"),
        help="the grid of the weights' positions; required if they don't tell it",
    )
    parser.add_argument(
        "--num_heads", type=int, help="the number of heads; required if the weights don't tell it"
    )
