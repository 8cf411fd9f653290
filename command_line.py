"""What the scripts share: flags, exit codes, and user errors reported in one line."""

import contextlib
import errno
import functools
import logging
import os
import pathlib
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import absl.logging
import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from vit_jax.aot import topology
from vit_jax.errors import (
    EXIT_DOES_NOT_FIT,
    EXIT_PREEMPTED,
    DoesNotFit,
    Preempted,
    Unreachable,
    UserError,
    first_line,
)
from vit_jax.logs import profile, run_log
from vit_jax.parallel import distributed
from vit_jax.storage import buckets

# docs/operations.md has the table for users.
EXIT_CRASHED = 1
EXIT_USER_ERROR = 2
EXIT_LOST = 76
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as in shells
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

# Errors of a collective that mean that another process is gone. Others are this process's own.
LOST_PROCESS = re.compile(
    r"^(UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|CANCELLED)\b"
    r"|gloo.*(connection|peer|timed out)|remote process exited|heartbeat timeout",
    re.DOTALL | re.IGNORECASE,
)
GRACE_SECONDS = 10  # for a clean shutdown, before this process exits without one
ROOT = pathlib.Path(__file__).resolve().parent
NOT_PRESETS = ("__init__.py", "common.py", "recipes.py")

WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's folder. Default for train.py: runs/<config name>."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator_address",
    None,
    "host:port of process 0; required only without a cluster manager that JAX recognizes.",
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "The number of processes; requires --coordinator_address."
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "The index of this process, from 0; requires --coordinator_address."
)
DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    distributed.MODES,
    "Whether to join other processes: 'auto' does if JAX recognizes a cluster manager, or "
    "--coordinator_address is given; 'on' must; 'off' never does.",
)
HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds", 100, "How long a process may be silent before the others stop."
)
HANG = flags.DEFINE_float(
    "hang_seconds",
    1800,
    "For train.py: how long a step may take before the stacks of all threads are logged; 0: never.",
    lower_bound=0,
)
COMPILE_FOR = flags.DEFINE_string(
    "compile_for",
    None,
    "Only compiles train.py's steps for a TPU slice, such as v5e:16x16, or GPUs, such as h100:8, "
    "and reports their memory and speed: for TPUs an estimate, for GPUs a bound.",
)
RECOVER_CONFIG = flags.DEFINE_bool(
    "recover_config",
    False,
    "For train.py: writes the run's config.json anew from --config, if it is missing or corrupt.",
)
ALLOW_CHANGES = flags.DEFINE_list(
    "allow_changes",
    [],
    "For train.py: fields, or groups of them, that may differ though the run that resumes computes "
    "something else from then on, separated by commas. The run's changes.json records them.",
)


class StepsParser(flags.ArgumentParser):
    """Reads FIRST:LAST as a range of steps."""

    syntactic_help = "FIRST:LAST"

    def parse(self, argument):
        return profile.parse_steps(argument)


PROFILE = flags.DEFINE(
    StepsParser(),
    "profile",
    None,
    "For train.py: writes a trace of these steps, such as 10:15, to <workdir>/profile.",
)
JSON = flags.DEFINE_bool("json", False, "Prints JSON; for evaluate.py and predict.py.")
CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="The configuration: configs/vit_b16.py, or with an argument, "
    "configs/vit_b16.py:quick. --config.a.b=value overrides a field.",
)


IS_GROUP = "it is a group of fields"


class GroupParser(flags.ArgumentParser):
    """Refuses a value for a group of fields, which would drop the other fields."""

    def parse(self, argument):
        if isinstance(argument, ConfigDict):  # the preset's
            return argument
        raise ValueError(IS_GROUP)


config_flags.register_flag_parser_for_type(ConfigDict, GroupParser())


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


def config_name() -> str | None:
    """Returns the value of --config: FILE[:ARG]."""
    flag = flags.FLAGS["config"]
    return flag.config_filename if flag.present else None


def command(script: str, *arguments: str) -> str:
    """Returns the command, for a shell in the current folder, that runs a script next to this file.

    Args:
        script: such as "train.py".
        *arguments: the script's arguments; quoted where a shell needs it.
    """
    on_path = shutil.which("python") == sys.executable
    python = "python" if on_path else from_here(pathlib.Path(sys.executable))
    return shlex.join([python, from_here(ROOT / script), *arguments])


def arguments_without(*names: str) -> list[str]:
    """Returns the command line's arguments without some flags and their values."""
    kept, arguments = [], iter(sys.argv[1:])
    for argument in arguments:
        name, has_value, _ = argument.lstrip("-").partition("=")
        if not (argument.startswith("-") and name in names):
            kept.append(argument)
        elif not has_value:
            next(arguments, None)
    return kept


def from_here(path: pathlib.Path) -> str:
    """Returns a path relative to the current folder, if it is below it."""
    folder = pathlib.Path.cwd()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def default_workdir() -> str:
    """Returns runs/<config name>, including the config's argument: runs/vit_b16_quick."""
    path, _, arg = config_name().partition(":")
    words = [pathlib.Path(path).stem, *re.findall(r"[\w.]+", arg)]
    return str(pathlib.Path("runs") / "_".join(words))


def parse(argv: list[str]) -> list[str]:
    """Parses flags; returns the arguments that aren't flags, after the script's name."""
    # Presets import the `configs` next to this file, whatever the current folder is.
    sys.path.insert(0, str(ROOT))
    try:
        check_single_preset(argv)
        argv, unset = without_unset(argv)
        arguments = flags.FLAGS(with_preset_located(argv))
    except (AttributeError, KeyError) as error:  # an override of an unknown field
        stop(preset_error(error) or unknown_field(str(error.args[0])))
    except flags.Error as error:
        stop(flag_error(str(error)))
    except OSError:  # an override of a field, in a preset that can't be read
        stop(missing_preset())
    except SystemExit as error:
        if isinstance(error.code, int) or error.code is None:
            raise  # --help, or `stop`
        stop(f"The preset calls sys.exit({error.code!r})")
    except SyntaxError as error:
        is_python = str(error.filename).endswith(".py")
        place = f"{error.filename}, line {error.lineno}: {error.msg}"
        stop(place if is_python else unreadable_preset())
    except Exception as error:  # in the preset's code, or --config.dataset.name.x=1
        fields = f"Overrides must name a field, as in --config.dataset.name=cifar10 ({error})"
        if field := re.search(r'because field "(\w+)" is None', str(error)):
            fields = f"config.{field[1]} is set as a whole: --config.{field[1]}=VALUE"
        stop(preset_error(error) or fields)
    check_not_empty()
    expand_home()
    prefer_num_epochs()
    if unset:
        CONFIG.value.update_from_flattened_dict(dict.fromkeys(unset))
    return arguments


def without_unset(argv: list[str]) -> tuple[list[str], list[str]]:
    """Takes out --config.FIELD=None of fields that may be None: their flags parse numbers only.

    Returns:
        The other arguments, and the fields.
    """
    given = {argument: re.fullmatch(r"--?config\.([\w.]+)=None", argument) for argument in argv}
    if not any(given.values()) or not any(preset_paths(argv)):
        return list(argv), []
    from configs import common  # `parse` has put ROOT on the path

    defaults = common.get_config()
    unset = {a: field[1] for a, field in given.items() if field and may_be_none(defaults, field[1])}
    return [argument for argument in argv if argument not in unset], list(unset.values())


def may_be_none(defaults: ConfigDict, field: str) -> bool:
    """Whether a field, by its dotted name, is None by default."""
    *groups, name = field.split(".")
    for group in groups:
        defaults = defaults.get(group)
        if not isinstance(defaults, ConfigDict):
            return False
    return defaults.get(name, "") is None


def prefer_num_epochs() -> None:
    """Lets --config.num_epochs override a preset's `total_steps`, which has precedence."""

    def is_given(field):
        return f"config.{field}" in flags.FLAGS and flags.FLAGS[f"config.{field}"].present

    if is_given("num_epochs") and not is_given("total_steps"):
        CONFIG.value.total_steps = None


def check_single_preset(argv: list[str]) -> None:
    """Stops the script if --config is given more than once."""
    if len(names := [path for *_, path in preset_paths(argv)]) > 1:
        stop(f"--config is given {len(names)} times ({', '.join(names)}): give one preset")


def with_preset_located(argv: list[str]) -> list[str]:
    """Returns the arguments; a preset that isn't below the current folder is sought in ROOT."""
    argv = list(argv)
    for i, start, path in preset_paths(argv):
        if not pathlib.Path(path).exists() and (ROOT / path).is_file():
            argv[i] = argv[i][:start] + str(ROOT / path) + argv[i][start + len(path) :]
    return argv


def preset_paths(argv: list[str]) -> Iterator[tuple[int, int, str]]:
    """Yields each path in --config=PATH[:ARG]: the argument's index, the path's start, the path."""
    for i, argument in enumerate(argv[1:], start=1):
        flag = re.match("--?config=", argument)
        if flag or argv[i - 1] in ("-config", "--config"):
            start = flag.end() if flag else 0
            yield i, start, argument[start:].partition(":")[0]


def expand_home() -> None:
    """Replaces ~ at the start of a flag's value, as in --workdir=~/runs: some shells don't."""
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        if isinstance(flag.value, str) and flag.value.startswith("~"):
            flag.value = os.path.expanduser(flag.value)


# Fields for which an empty string means something.
MAY_BE_EMPTY = ("config.best_metric", "config.init_from_hint")


def check_not_empty() -> None:
    """Stops the script if a flag is an empty string: --workdir=$FOLDER, and FOLDER isn't set."""
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        if flag.present and flag.value in ("", [""]) and name not in MAY_BE_EMPTY:
            stop(
                f"--{name} is empty: give it a value, or leave it out (is a shell variable unset?)"
            )


def check_preset() -> None:
    """Stops the script if --config doesn't name a Python file."""
    path = (config_name() or "").partition(":")[0]
    if not path.endswith(".py") or not pathlib.Path(path).is_file():
        stop(unreadable_preset())
    if not isinstance(CONFIG.value, ConfigDict):
        stop(f"{path}: get_config returns no ConfigDict; start from that of configs/common.py")


def preset_error(error: Exception) -> str | None:
    """Returns where and why a preset's own code failed; None if it isn't the preset's error."""
    if any(path.endswith(".json") for *_, path in preset_paths(sys.argv)):
        return unreadable_preset()
    frames = traceback.extract_tb(error.__traceback__)
    paths = [os.path.abspath(path) for *_, path in preset_paths(with_preset_located(sys.argv))]
    inside = [
        frame
        for frame in frames
        if os.path.abspath(frame.filename) in paths
        or pathlib.Path(frame.filename).parent == ROOT / "configs"
    ]
    if inside:
        reason = f"{type(error).__name__}: {first_line(error)[:200]}"
        if field := re.search(r'Key "(\w+)" does not exist', str(error)):
            reason = f"There is no field {field[1]!r} in this group of the configuration"
        if re.search(r'mean "\w+" instead of', str(error)):  # ml_collections lists all fields first
            reason = unknown_field(str(error))
        return f"{inside[-1].filename}, line {inside[-1].lineno}: {reason}"
    if paths and "'get_config'" in str(error):
        return f"{paths[0]} is no preset: it has no function get_config"
    return None


def unknown_field(text: str) -> str:
    """Turns ml_collections' message about an unknown field into a sentence."""
    suggestion = re.search(r'mean "(\w+)" instead of "(\w+)"', text)
    if suggestion:
        return f"Unknown configuration field {suggestion[2]!r}: did you mean {suggestion[1]!r}?"
    name = text.strip("'\"")
    overrides = re.findall(rf"-config\.((?:\w+\.)*{re.escape(name)})\b", " ".join(sys.argv))
    field = overrides[0] if overrides else name
    return f"There is no field config.{field}; configs/common.py has all fields"


# The start of absl's message about a value of a wrong type -> what the value must be.
TYPE_ERRORS = {
    "invalid literal for int": "a whole number",
    "could not convert string to float": "a number",
    "('Non-boolean argument": "True or False",
    "Error while parsing string": 'a tuple, such as "(0.5, 1.0)"',
    IS_GROUP: None,
}


# What evaluate.py takes instead of a field of the configuration.
DATASET_FLAGS = {
    "config.dataset.name": "--dataset",
    "config.dataset.data_dir": "--data_dir",
    "config.dataset.eval_split": "--split",
}


# Flags of other codebases' training scripts, and what they are here.
FOREIGN_FLAGS = {
    **{name: f"config.{name}" for name in ("seed", "batch_size", "image_size", "total_steps")},
    **dict.fromkeys(("lr", "learning_rate", "base_lr"), "config.schedule.base_lr"),
    **dict.fromkeys(("epochs", "num_epochs"), "config.num_epochs"),
    **dict.fromkeys(("data", "data_path", "dataset", "train_dir"), "config.dataset.name"),
    **dict.fromkeys(("weight_decay", "wd"), "config.optimizer.weight_decay"),
    **dict.fromkeys(("model", "arch"), "config.model.variant"),
    **dict.fromkeys(("pretrained", "init_from", "finetune"), "config.init_from"),
    **dict.fromkeys(("output", "output_dir", "out", "resume"), "workdir"),
}


def flag_error(text: str) -> str:
    """Shortens absl's message, which may contain a preset's traceback, to one line."""
    for problem, expected in TYPE_ERRORS.items():
        pattern = rf"flag --config\.([\w.]+)=(.*): {re.escape(problem)}"
        if override := re.match(pattern, text, re.DOTALL):
            field, value = override.groups()
            if problem == IS_GROUP:
                return group_error(field, value)
            return f"config.{field} is {value!r}; it must be {expected}"
    if without_preset := re.match(r"Unknown command line flag '(config\.[\w.]+)'", text):
        field = without_preset[1]
        if re.search(r"-workdir\b", " ".join(sys.argv)) and "train.py" not in sys.argv[0]:
            flag = DATASET_FLAGS.get(field)
            remedy = f"give {flag} instead of" if flag and flag[2:] in flags.FLAGS else "leave out"
            return f"--workdir takes the run's own configuration: {remedy} --{field}"
        return f"--{field} overrides a field of a preset: add --config=FILE"
    if with_value := re.match(r"flag --(\w+)=(.*): \('Non-boolean argument", text):
        name, value = with_value.groups()
        return f"--{name} is {value!r}; it takes no value: give --{name} or --no{name}"
    if foreign := re.match(r"Unknown command line flag '([\w-]+)'", text):
        field = FOREIGN_FLAGS.get(foreign[1].replace("-", "_"))
        if field and "train.py" in sys.argv[0]:
            return f"There is no flag --{foreign[1]}: give --{field}"
    if "get_config() takes 0 positional arguments" in text:
        _, _, path = next(preset_paths(sys.argv))
        return f"{path} takes no argument: leave out :ARG, or define get_config(arg=None) there"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) == 1:
        return lines[0]
    return f"{lines[0].partition(': ')[0]}: {lines[-1].removeprefix('ValueError: ')}"


def group_error(group: str, value: str) -> str:
    """Returns the message for an override of a group of fields, such as "dataset"."""
    fields = list(functools.reduce(getattr, group.split("."), flags.FLAGS["config"].value))
    example = next((name for name in ("name", "variant") if name in fields), "FIELD")
    return (
        f"--config.{group} is a group of fields: set one of them, as in "
        f"--config.{group}.{example}={value}; they are {', '.join(fields)}"
    )


def unreadable_preset() -> str:
    """Returns the message for a --config that isn't a Python file, or can't be decoded as one."""
    path = next((path for *_, path in preset_paths(sys.argv)), "")
    if path.endswith(".json") and pathlib.Path(path).is_file():
        return (
            f"{path} is no preset: to resume a run, give its own --config and --workdir; "
            "evaluate.py and predict.py take --workdir alone"
        )
    if path.endswith(".py") and pathlib.Path(path).is_file():
        return f"{path} can't be read as Python: save it as UTF-8 text"
    return missing_preset()


def missing_preset() -> str:
    """Returns the message for a --config that is missing or names no file."""
    presets = sorted(path.name for path in (ROOT / "configs").glob("*.py"))
    known = ", ".join(name for name in presets if name not in NOT_PRESETS)
    given = re.search(r"-config[= ]([^: ]+)", " ".join(sys.argv))
    problem = f"There is no preset {given[1]}" if given else "--config=FILE is missing"
    return f"{problem}; configs/ has {known}"


def guarded(main: Callable, preemptible: bool) -> None:
    """Joins the other processes, calls `main`, and turns exceptions into exit codes."""
    absl.logging.set_verbosity(absl.logging.FATAL)  # Orbax logs every operation
    message = RESUMABLE if preemptible else "Interrupted"
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, functools.partial(interrupt, message))
        sys.unraisablehook = functools.partial(interrupt_again, sys.unraisablehook)
    less_memory = "use a smaller model, or smaller images"
    if preemptible:
        less_memory = "raise config.accum_steps, or lower config.batch_size or config.image_size"
    try:
        if COMPILE_FOR.value:
            topology.use_cpu()
        else:
            distributed.start(
                COORDINATOR.value,
                NUM_PROCESSES.value,
                PROCESS_ID.value,
                HEARTBEAT.value,
                preemptible,
                DISTRIBUTED.value,
            )
        if jax.process_count() > 1:  # JAX's runtime aborts if it loses another process
            signal.signal(signal.SIGABRT, signal.SIG_DFL)  # without a dump of all threads
        main()
        sys.stdout.flush()
    except Unreachable as error:
        stop(str(error), EXIT_PREEMPTED)
    except UserError as error:
        stop(str(error))
    except DoesNotFit as error:
        stop(str(error), EXIT_DOES_NOT_FIT)
    except Preempted as error:
        stop(str(error), EXIT_PREEMPTED)
    except KeyboardInterrupt:
        stop(message, EXIT_INTERRUPTED)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and is_stdout_broken():
            # Python would complain when it flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            stop("The output is closed", EXIT_BROKEN_PIPE)
        if isinstance(error, MemoryError):
            stop(f"This machine is out of memory ({first_line(error)}): {less_memory}")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            place = error.filename or WORKDIR.value
            file = f" ({place})" if place else ""
            stop(f"The disk is full{file}: free some space, and run the same command again")
        if buckets.is_client_error(error):
            stop(f"The bucket can't be used: {buckets.problem(error)}", EXIT_PREEMPTED)
        jax_errors = [e for e in causes(error) if isinstance(e, jax.errors.JaxRuntimeError)]
        for cause in jax_errors:
            if str(cause).startswith("RESOURCE_EXHAUSTED"):
                stop(f"The device is out of memory ({first_line(cause)}): {less_memory}")
        if jax.process_count() == 1:
            raise
        for cause in causes(error):  # JAX raises some as ValueError
            if LOST_PROCESS.search(str(cause)):
                exit_after_loss(cause)
        stop(traceback.format_exc(), EXIT_CRASHED)


def is_stdout_broken() -> bool:
    """Whether stdout is a pipe that nothing reads, as in `python predict.py ... | head`."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False


RESUMABLE = "Interrupted: the same command resumes a run from its last checkpoint"


def interrupt(message: str, number, frame) -> None:
    """Handles Ctrl-C: raises KeyboardInterrupt, and ends the process if a library swallows that.

    Threads that save a checkpoint may fail then, which is no news.
    """
    sys.unraisablehook = functools.partial(interrupt_again, lambda _: None)

    def end():
        print(message, file=sys.stderr)
        exit_now(EXIT_INTERRUPTED)

    start_timer(GRACE_SECONDS, end)
    raise KeyboardInterrupt


def interrupt_again(hook: Callable, unraisable) -> None:
    """Repeats a Ctrl-C whose exception Python drops, as in callbacks of its garbage collection.

    Args:
        hook: sys.unraisablehook for other exceptions.
        unraisable: what Python passes to it.
    """
    if unraisable.exc_type is KeyboardInterrupt:
        start_timer(0.05, os.kill, os.getpid(), signal.SIGINT)  # once the callback has returned
    else:
        hook(unraisable)


def causes(error: BaseException | None):
    """Yields an error and the errors that caused it: libraries wrap those of JAX."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def exit_after_loss(error: Exception) -> None:
    """Ends a process that has lost another one.

    A collective fails before it is known which process is gone. JAX's runtime logs which
    one it is, and ends this process, once the lost process's heartbeat is overdue.
    """
    overdue = re.search(r"Task (\d+) heartbeat timeout", str(error))
    lost = f"process {overdue[1]}" if overdue else f"another process ({first_line(error)})"
    ends = "ends" if overdue else f"ends within {HEARTBEAT.value} s"
    logging.getLogger("vit_jax").error(
        f"Process {jax.process_index()} lost {lost} and {ends}. The same command on all processes "
        "resumes from the last checkpoint"
    )
    if not overdue:
        time.sleep(HEARTBEAT.value + 10)
    os._exit(EXIT_LOST)  # a clean shutdown would wait for the others


def stop(message: str, code: int = EXIT_USER_ERROR) -> None:
    """Prints a message and exits."""
    logger = logging.getLogger("vit_jax")
    if logger.handlers:
        logger.error(message)
    else:  # the run's log isn't open yet
        print(message, file=sys.stderr)
    sys.exit(code)


def exit_within(seconds: float, code: int) -> None:
    """Ends the process with an exit code after some seconds, if it hasn't ended by itself."""
    start_timer(seconds, os._exit, code)


def exit_now(code: int) -> None:
    """Ends the process with an exit code, without the shutdown of Python and its libraries."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed
            stream.flush()
    os._exit(code)


def start_timer(seconds: float, function: Callable, *arguments) -> None:
    """Calls a function after some seconds, unless the process has ended."""
    timer = threading.Timer(seconds, function, arguments)
    timer.daemon = True
    timer.start()
