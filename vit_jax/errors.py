"""Exceptions that end a script with one line instead of a traceback."""

# Exit codes that programs which start train.py look for; command_line/exits.py has the others.
EXIT_DOES_NOT_FIT = 3
EXIT_PREEMPTED = 75  # EX_TEMPFAIL in sysexits.h: the same command resumes the run


class UserError(ValueError):
    """A mistake in what the user asked for.

    The message stands alone: what was found, what was expected, and the fix. Scripts print it
    and exit with code 2.
    """


class Unreachable(UserError):
    """A server doesn't answer now: the same command may succeed later."""


class DoesNotFit(Exception):
    """A run needs more memory than the devices it was compiled for have."""


class Preempted(Exception):
    """A run was asked to stop and has saved a checkpoint."""


def first_line(error: Exception) -> str:
    """Returns the first line of another library's error message."""
    return (str(error).strip().splitlines() or [repr(error)])[0]
