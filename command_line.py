"""What the scripts share: flags with their configuration file, and users' mistakes in one line."""

import logging
import os
import pathlib
import re
import sys
from collections.abc import Callable

import absl.logging
from absl import app, flags
from ml_collections import config_flags

from vit_jax.errors import UserError

EXIT_USER_ERROR = 2


def define_config():
    """The flag --config=FILE[:ARG], whose fields --config.a.b=value overrides."""
    return config_flags.DEFINE_config_file(
        "config", help_string="Preset, such as configs/vit_b16.py, or configs/vit_b16.py:quick."
    )


def run(main: Callable) -> None:
    """Parses the command line and calls main(); a mistake of the user ends in one line, exit 2."""
    app.run(lambda argv: guarded(main), flags_parser=parse)


def config_name() -> str:
    """What was given as --config: FILE[:ARG]."""
    return flags.FLAGS["config"].config_filename


def default_workdir() -> str:
    """runs/<config name>, with the argument where there is one: runs/vit_b16_quick."""
    path, _, arg = config_name().partition(":")
    words = [pathlib.Path(path).stem, *re.findall(r"[\w.]+", arg)]
    return str(pathlib.Path("runs") / "_".join(words))


def parse(argv: list[str]) -> list[str]:
    # Presets import `configs`; wherever the command runs, it is the one beside this file.
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    try:
        rest = flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:  # an override of a field that isn't there
        message = " ".join(str(error.args[0]).strip("\"'").split()).replace("\\n", " ")
        stop(f"Unknown configuration field {message}")
    except flags.Error as error:
        # Errors in a preset come with the traceback of ml_collections; the last line tells.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        last = lines[-1].removeprefix("ValueError: ")
        stop(f"{lines[0].split(': ')[0]}: {last}" if len(lines) > 1 else last)
    if len(rest) > 1:
        stop(f"Unknown argument {rest[1]!r}: flags begin with --")
    return rest


def guarded(main: Callable) -> None:
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax tells of each thing it does
    try:
        main()
    except UserError as error:
        stop(str(error))
    except KeyboardInterrupt:
        stop("Interrupted: start the same command again to go on from the last checkpoint")


def stop(message: str) -> None:
    logging.getLogger("vit_jax").error(message)
    sys.exit(EXIT_USER_ERROR)
