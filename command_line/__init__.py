"""What the scripts share: flags, exit codes, and user errors reported in one line."""

import os
import sys
from collections.abc import Callable

from absl import app
from absl import flags as absl_flags

from command_line import flags
from command_line.commands import arguments_without, command
from command_line.exits import EXIT_INTERRUPTED, GRACE_SECONDS, exit_now, exit_within, guarded, stop
from command_line.flags import (
    ALLOW_CHANGES,
    COMPILE_FOR,
    CONFIG,
    HANG,
    JSON,
    PROFILE,
    RECOVER_CONFIG,
    WORKDIR,
)
from command_line.mistakes import DATASET_FLAGS
from command_line.parsing import check_preset, parse
from command_line.presets import ROOT, config_name, default_workdir
from vit_jax.logs import run_log

__all__ = [
    "ALLOW_CHANGES",
    "COMPILE_FOR",
    "CONFIG",
    "DATASET_FLAGS",
    "HANG",
    "JSON",
    "PROFILE",
    "RECOVER_CONFIG",
    "ROOT",
    "WORKDIR",
    "arguments_without",
    "command",
    "config_name",
    "default_workdir",
    "run",
]

absl_flags.adopt_module_key_flags(flags)  # scripts adopt those of this module


def run(
    main: Callable, needs_config: bool = True, takes_paths: bool = False, trains: bool = False
) -> None:
    """Parses the command line and calls `main`; a user error ends with one line and exit code 2.

    Args:
        main: called without arguments, or with the list of paths.
        needs_config: whether --config is required.
        takes_paths: whether the script takes arguments that aren't flags.
        trains: whether the script handles --compile_for and requests to stop.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, as in `python train.py ... >&-`
            setattr(sys, name, open(os.devnull, "w"))

    def parse_checked(argv):
        arguments = parse(argv)
        if len(arguments) > 1 and not takes_paths:
            stop(f"Unknown argument {arguments[1]!r}: flags start with --")
        if COMPILE_FOR.value and not trains:
            stop("--compile_for is a flag of train.py only")
        if PROFILE.value and not trains:
            stop("--profile is a flag of train.py only")
        if JSON.value and trains:
            stop("--json is a flag of evaluate.py and predict.py only")
        if RECOVER_CONFIG.value and not trains:
            stop("--recover_config is a flag of train.py only")
        if ALLOW_CHANGES.value and not trains:
            stop("--allow_changes is a flag of train.py only")
        if PROFILE.value and COMPILE_FOR.value:
            stop("--profile traces steps, and --compile_for takes none: leave one out")
        if needs_config or config_name():
            check_preset()
        return arguments

    def guarded_main(argv):
        try:
            guarded(lambda: main(argv[1:]) if takes_paths else main(), preemptible=trains)
        except SystemExit as error:
            run_log.stop_logging()
            if error.code == EXIT_INTERRUPTED:
                # Python's shutdown can crash while XLA compiles, or a thread reads data.
                exit_now(EXIT_INTERRUPTED)
            # Python would wait for the thread that reads data, on a file system that may be gone,
            # and JAX for the other processes, which may wait for this one in a collective. They
            # notice once it is gone.
            exit_within(GRACE_SECONDS, error.code if isinstance(error.code, int) else 0)
            raise
        finally:
            run_log.stop_logging()  # uploads the last lines if the run is in a bucket

    app.run(guarded_main, flags_parser=parse_checked)
