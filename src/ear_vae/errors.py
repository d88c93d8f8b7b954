"""The one exception class of the package, and errors of any kind in a line."""

from __future__ import annotations

import os
from collections.abc import Mapping


class EarVAEError(Exception):
    """What was wrong, what was expected, and what to do about it, in one message.

    Everything a user can get wrong (a file, a folder, a config, a tensor's shape) ends in this
    class, so that callers can catch one thing; the command line prints it as one line.

    Args:
        message: What was wrong, what was expected, and what to do. It names no option of a command.
        argument: Argument of the failed call that permits what was refused when it is True, such as
            `overwrite`. `str` of the error names it; the command line names its option for it instead.

    Attributes:
        message: The message without the argument.
        argument: The argument, None where there is none.
    """

    def __init__(self, message: str = "", *, argument: str | None = None) -> None:
        super().__init__(message if argument is None else f"{message} ({argument}=True)")
        self.message = message
        self.argument = argument


def in_one_line(error: BaseException, options: Mapping[str, str] | None = None) -> str:
    """What went wrong; of errors that are not ours only the first line.

    Args:
        error: Error of any class.
        options: What the user writes for an argument that an error names, such as
            `{"overwrite": "--force"}`; by default the argument itself.
    """
    if isinstance(error, EarVAEError):
        option = (options or {}).get(error.argument or "")
        return str(error) if option is None else f"{error.message} ({option})"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # torch has an exception of its own for each device, and a plain RuntimeError for the CPU.
    if isinstance(error, MemoryError) or "out of memory" in lines[0] or "can't allocate memory" in lines[0]:
        return "not enough memory; cut the audio into parts, or choose another device"
    if isinstance(error, OSError):
        reason = error.strerror or lines[0]
        return (
            f"{os.fsdecode(error.filename)}: {reason}" if isinstance(error.filename, (str, bytes)) else reason
        )
    return f"unexpected {type(error).__name__}, --debug shows where: {lines[0]}"
