"""How a script ends: exit codes, what they are for, and Ctrl-C."""

import contextlib
import errno
import functools
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

import absl.logging
import jax

from command_line.flags import (
    COMPILE_FOR,
    COORDINATOR,
    DISTRIBUTED,
    HEARTBEAT,
    NUM_PROCESSES,
    PROCESS_ID,
    WORKDIR,
)
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
RESUMABLE = "Interrupted: the same command resumes a run from its last checkpoint"


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
        start_jax(preemptible)
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


def start_jax(preemptible: bool) -> None:
    """Joins the other processes, or uses the CPU to compile for a machine that isn't here."""
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


def is_stdout_broken() -> bool:
    """Whether stdout is a pipe that nothing reads, as in `python predict.py ... | head`."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False


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
