"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """Something the user asked for can't be done.

    The message is complete by itself: what was found, what was expected, the way out. The
    scripts print it as it is, without a traceback, and exit with code 2.
    """
