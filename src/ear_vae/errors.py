"""The one exception class of the package, and errors of any kind in a line."""

from __future__ import annotations

import os


class EarVAEError(Exception):
    """What was wrong, what was expected, and what to do about it, in one message.

    Everything a user can get wrong (a file, a folder, a config, a tensor's shape) ends in this
    class, so that callers can catch one thing; the command line prints it as one line.
    """


def in_one_line(error: BaseException) -> str:
    """What went wrong; of errors that are not ours only the first line."""
    if isinstance(error, EarVAEError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # torch has an exception of its own for each device, and a plain RuntimeError for the CPU.
    if isinstance(error, MemoryError) or "out of memory" in lines[0] or "can't allocate memory" in lines[0]:
        return "not enough memory; cut the audio into parts, or choose another --device"
    if isinstance(error, OSError):
        reason = error.strerror or lines[0]
        return (
            f"{os.fsdecode(error.filename)}: {reason}" if isinstance(error.filename, (str, bytes)) else reason
        )
    return f"unexpected {type(error).__name__}, --debug shows where: {lines[0]}"
