"""The one exception class of the package, and errors of any kind in a line."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Any


class EarVAEError(Exception):
    """What was wrong, what was expected, and what to do about it, in one message.

    Everything a user can get wrong (a file, a folder, a config, a tensor's shape) ends in this
    class, so that callers can catch one thing; the command line prints it as one line.

    Args:
        message: What was wrong, what was expected, and what to do; complete without the argument.
        argument: Argument of the failed call that the message is about, such as `overwrite`. `str` of the
            error names it as Python does, the command line by its option.
        value: Value to give that argument, or the one that it was given; `...` for any.

    Attributes:
        message: The message without the argument.
        argument: The argument, None where there is none.
        value: Its value.
    """

    def __init__(self, message: str = "", *, argument: str | None = None, value: Any = True) -> None:
        shown = "..." if value is ... else repr(value)
        super().__init__(message if argument is None else f"{message} ({argument}={shown})")
        self.message = message
        self.argument = argument
        self.value = value


def in_one_line(error: BaseException, options: Mapping[str, str] | None = None) -> str:
    """Returns what went wrong, in one line.

    Args:
        error: Error of any class.
        options: Options by the arguments of `EarVAEError` that they stand for, such as
            `{"overwrite": "--force"}`; other arguments are left out. By default arguments are named
            themselves.
    """
    if isinstance(error, EarVAEError):
        return str(error) if options is None or error.argument is None else _with_option(error, options)
    text = first_line(error)
    # torch has an exception of its own for each device, and a plain RuntimeError for the CPU.
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "not enough memory; cut the audio into parts, or choose another device"
    if isinstance(error, OSError):
        reason = error.strerror or text
        return (
            f"{os.fsdecode(error.filename)}: {reason}" if isinstance(error.filename, (str, bytes)) else reason
        )
    return f"{type(error).__name__}: {text}"


def first_line(error: BaseException, *, most: int = 1) -> str:
    """Returns the first line of an error's message, or the name of its class where it has none.

    Args:
        error: Error of any class.
        most: Number of lines to join into one.
    """
    # libsndfile's own words come without the name of the file, which our messages begin with.
    text = str(getattr(error, "error_string", error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:most]) or type(error).__name__


def _with_option(error: EarVAEError, options: Mapping[str, str]) -> str:
    option = options.get(error.argument or "")
    if option is None:
        return error.message
    given = "" if error.value is True or error.value is ... else f" {shlex.quote(str(error.value))}"
    return f"{error.message} ({option}{given})"
