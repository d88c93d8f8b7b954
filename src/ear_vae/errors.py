"""The one exception class of the package."""


class EarVAEError(Exception):
    """What was wrong, what was expected, and what to do about it, in one message.

    Everything a user can get wrong (a file, a folder, a config, a tensor's shape) ends in this
    class, so that callers can catch one thing; the command line prints it as one line.
    """
