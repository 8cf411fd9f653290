"""The exceptions that end a script in one line."""


class UserError(ValueError):
    """Something the user asked for can't be done.

    The message is complete by itself: what was found, what was expected, the way out. The
    scripts print it as it is, without a traceback, and exit with code 2.
    """


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line."""
    return (str(error).strip().splitlines() or [repr(error)])[0]


class DoesNotFit(Exception):
    """A run needs more memory than the machine has that it was compiled for."""


class Preempted(Exception):
    """A run was asked to stop, and has saved where it is; the message says so."""
