"""The command line of `python -m vit_jax.scaling`."""

import argparse
import logging
import sys
from collections.abc import Sequence

import jax

from vit_jax.errors import UserError
from vit_jax.scaling import count, fit, run

# Name -> help, and a module with `add_flags(parser)` and `run(args)`, which yields lines to print.
COMMANDS = {
    "flops": ("prints what models cost: parameters, operations, activations", count),
    "run": ("runs the cells of a study, or prints or submits them", run),
    "fit": ("prints the laws of a study's results, and draws them", fit),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse_flags(arguments)
    jax.config.update("jax_platforms", "cpu")  # it computes nothing that an accelerator would help
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        _, module = COMMANDS[args.command]
        for line in module.run(args):
            print(line, flush=True)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.scaling", description="How models scale."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, module) in COMMANDS.items():
        module.add_flags(commands.add_parser(name, help=text, description=f"{text.capitalize()}."))
    return parser.parse_args(arguments)
