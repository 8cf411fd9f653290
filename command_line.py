"""What the scripts share: flags with their configuration file, and users' mistakes in one line."""

import errno
import logging
import os
import pathlib
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable

import absl.logging
import jax
from absl import app, flags
from ml_collections import config_flags

from vit_jax.aot import topology
from vit_jax.errors import DoesNotFit, Preempted, UserError, first_line
from vit_jax.parallel import distributed

EXIT_USER_ERROR = 2
EXIT_DOES_NOT_FIT = 3
EXIT_CRASHED = 1
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on
EXIT_LOST = 76
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
# What a collective says when another process is gone; the rest is this one's own fault.
GONE = re.compile(
    r"^(UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|CANCELLED)\b"
    r"|gloo.*(connection|peer|timed out)|remote process exited",
    re.DOTALL | re.IGNORECASE,
)
GRACE_SECONDS = 10  # for the others to end in the same way
HERE = pathlib.Path(__file__).resolve().parent

WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's folder. train.py's default: runs/<config name>."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0; where no cluster manager tells."
)
PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the program; goes with the above.")
PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds", 100, "How long a process may be silent before the others stop."
)
COMPILE_FOR = flags.DEFINE_string(
    "compile_for", None, "Of train.py: compiles for a TPU slice, such as v5e:16x16, and reports."
)
JSON = flags.DEFINE_bool("json", False, "Of evaluate.py and predict.py: JSON for programs.")
CONFIG = config_flags.DEFINE_config_file(  # --config.a.b=value overrides its fields
    "config", help_string="Preset, such as configs/vit_b16.py, or configs/vit_b16.py:quick."
)


def run(
    main: Callable, needs_config: bool = True, takes_paths: bool = False, trains: bool = False
) -> None:
    """Parses the command line and calls main(); a mistake of the user ends in one line, exit 2.

    takes_paths: whether main takes the list of arguments that aren't flags.
    trains: whether it knows --compile_for, and saves when asked to stop; others just stop.
    """

    def parse_checked(argv):
        rest = parse(argv)
        if len(rest) > 1 and not takes_paths:
            stop(f"Unknown argument {rest[1]!r}: flags begin with --")
        if COMPILE_FOR.value and not trains:
            stop("--compile_for is train.py's")
        if needs_config or config_name():
            check_preset()
        return rest

    def guarded_main(argv):
        guarded(lambda: main(argv[1:]) if takes_paths else main(), preemptible=trains)

    app.run(guarded_main, flags_parser=parse_checked)


def config_name() -> str | None:
    """What was given as --config: FILE[:ARG]."""
    flag = flags.FLAGS["config"]
    return flag.config_filename if flag.present else None


def python() -> str:
    """How this Python is called from here: ".venv/bin/python", or "python"."""
    executable = pathlib.Path(sys.executable)
    here = pathlib.Path.cwd()
    return str(executable.relative_to(here)) if executable.is_relative_to(here) else "python"


def default_workdir() -> str:
    """runs/<config name>, with the argument where there is one: runs/vit_b16_quick."""
    path, _, arg = config_name().partition(":")
    words = [pathlib.Path(path).stem, *re.findall(r"[\w.]+", arg)]
    return str(pathlib.Path("runs") / "_".join(words))


def parse(argv: list[str]) -> list[str]:
    # Presets import `configs`: the one beside this file, wherever the command runs.
    sys.path.insert(0, str(HERE))
    try:
        rest = flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:  # an override of a field that isn't there
        stop(unknown_field(str(error.args[0])))
    except flags.Error as error:
        stop(first_and_last(str(error)))
    except OSError:  # the preset can't be read, and a field of it is overridden
        stop(missing_preset())
    return rest


def check_preset() -> None:
    path = (config_name() or "").partition(":")[0]
    if not path.endswith(".py") or not pathlib.Path(path).is_file():
        stop(missing_preset())


def unknown_field(text: str) -> str:
    """ml_collections' words for a field that isn't there, as a sentence."""
    near = re.search(r'mean "(\w+)" instead of "(\w+)"', text)
    if near:
        return f"Unknown configuration field {near[2]!r}: did you mean {near[1]!r}?"
    return f"Unknown configuration field ({text}); configs/common.py lists them"


def first_and_last(text: str) -> str:
    """An error in a preset comes with its traceback: the flag it began with, and the message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) == 1:
        return lines[0]
    return f"{lines[0].partition(': ')[0]}: {lines[-1].removeprefix('ValueError: ')}"


def missing_preset() -> str:
    presets = sorted(path.name for path in (HERE / "configs").glob("*.py"))
    presets = [name for name in presets if name not in ("__init__.py", "common.py", "recipes.py")]
    given = re.search(r"-config[= ]([^: ]+)", " ".join(sys.argv))
    found = f"There is no preset {given[1]}" if given else "--config=FILE is missing"
    return f"{found}; configs/ has {', '.join(presets)}"


def guarded(main: Callable, preemptible: bool) -> None:
    absl.logging.set_verbosity(absl.logging.FATAL)  # Orbax tells of each thing it does
    try:
        if COMPILE_FOR.value:
            topology.without_accelerator()
        else:
            joining = (COORDINATOR.value, PROCESSES.value, PROCESS.value, HEARTBEAT.value)
            distributed.start(*joining, preemptible)
        main()
    except UserError as error:
        stop(str(error))
    except DoesNotFit as error:
        stop(str(error), EXIT_DOES_NOT_FIT)
    except Preempted as error:
        stop(str(error), EXIT_PREEMPTED)
    except KeyboardInterrupt:
        message = "Interrupted: a run goes on from its last checkpoint with the same command"
        stop(message, EXIT_INTERRUPTED)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" ({error.filename})" if error.filename else ""
            stop(f"The disk is full{where}: make room, and start the same command again")
        if jax.process_count() == 1:
            raise
        for cause in causes(error):
            if isinstance(cause, jax.errors.JaxRuntimeError) and GONE.search(str(cause)):
                lost(cause)
        stop(traceback.format_exc(), EXIT_CRASHED)


def causes(error: BaseException | None):
    """An error, what it was raised from, and so on: libraries wrap those of JAX."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def lost(error: Exception) -> None:
    """Ends a process that can't compute with the others any more.

    A collective fails before it is known who is gone: JAX's runtime says that, and ends the
    process, when the heartbeat is overdue.
    """
    reason = first_line(error)
    logging.getLogger("vit_jax").error(
        f"Process {jax.process_index()} lost the others ({reason}); it ends within "
        f"{HEARTBEAT.value} s. The same command, for all of them, goes on from the last checkpoint"
    )
    time.sleep(HEARTBEAT.value + 10)
    os._exit(EXIT_LOST)  # a shutdown would wait for the others


def stop(message: str, code: int = EXIT_USER_ERROR) -> None:
    logger = logging.getLogger("vit_jax")
    if logger.handlers:
        logger.error(message)
    else:  # the run's log isn't open yet
        print(message, file=sys.stderr)
    if jax.distributed.is_initialized():
        # The others may wait for this one in a collective, and this one, as it shuts down, for
        # them: once it is gone they are told.
        timer = threading.Timer(GRACE_SECONDS, os._exit, [code])
        timer.daemon = True
        timer.start()
    sys.exit(code)
