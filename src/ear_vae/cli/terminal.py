"""Printing: one line per message, with control characters escaped, whatever a file is called."""

from __future__ import annotations

import io
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from ear_vae.errors import EarVAEError, in_one_line
from ear_vae.limits import escaped, shortened

_LONGEST_LINE = 2_000
# Options for the arguments that errors name.
OPTIONS = {
    "overwrite": "--force",
    "force_download": "--force-download",
    "variant": "--variant",
    "revision": "--revision",
    "retry_failed": "--retry-failed",
    "config": "--config",
    "pattern": "--pattern",
}
OPTIONS_OF_FIT = {
    "overwrite": "--force",
    "pretrained": "--model.pretrained",
    "variant": "--model.variant",
}


def reason(error: BaseException, options: Mapping[str, str] = OPTIONS) -> str:
    """Returns what went wrong in a line, with the command's options for the arguments that it names.

    Args:
        error: Error of any class.
        options: Options of the command by argument.
    """
    text = in_one_line(error, options)
    expected = isinstance(error, (EarVAEError, OSError, MemoryError))
    return text if expected else f"unexpected {text} (--debug shows where)"


def say(text: str) -> None:
    """Prints a line on standard error; if it cannot be written it is lost, and the work goes on."""
    with suppress(OSError):
        print(shortened(escaped(text), _LONGEST_LINE), file=sys.stderr)  # noqa: T201


def say_traceback(error: BaseException) -> None:
    """Prints the traceback on standard error."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    with suppress(OSError):
        print("\n".join(map(escaped, lines)), file=sys.stderr)  # noqa: T201


def put(text: str) -> None:
    """Prints text on standard output; control characters other than line breaks are escaped."""
    print("\n".join(map(escaped, text.split("\n"))))  # noqa: T201


def is_watched() -> bool:
    """Whether standard error is a terminal."""
    return sys.stderr.isatty()


@contextmanager
def usable_streams() -> Iterator[None]:
    """Makes the standard streams take every character, and exist even if the caller has closed them.

    A descriptor that the caller has closed is opened again, or the next file to be opened would get it, and
    receive what torch and others write there. Reading from closed input and writing to closed output are
    errors of the operating system; messages to closed standard error are lost.
    """
    streams = sys.stdin, sys.stdout, sys.stderr
    _fill_descriptors()
    if sys.stdin is None:
        sys.stdin = _stream(0, "r")
    if sys.stdout is None:
        sys.stdout = _stream(1, "w")
    if sys.stderr is None:
        sys.stderr = _stream(2, "w")
    handlers = [
        (stream, stream.errors) for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)
    ]
    for stream, _ in handlers:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in handlers:
            with suppress(OSError, ValueError):
                stream.reconfigure(errors=errors)
        sys.stdin, sys.stdout, sys.stderr = streams


@contextmanager
def silent_libraries() -> Iterator[None]:
    """Silences what C libraries write to standard error themselves, such as the mp3 decoder's remarks.

    Meanwhile Python's standard error has a descriptor of its own. Where it has none of the system's, as in
    a notebook, nothing changes.
    """
    try:
        own = os.dup(2) if sys.stderr.fileno() == 2 else None
    except (OSError, ValueError):
        own = None
    if own is None:
        yield
        return
    before = sys.stderr
    _flush(before)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    # Unbuffered: what could not be written must not be written later, to whatever has the descriptor then.
    sys.stderr = io.TextIOWrapper(
        io.FileIO(own, "w", closefd=False),
        encoding=before.encoding,
        errors="backslashreplace",
        write_through=True,
    )
    try:
        yield
    finally:
        _flush(sys.stderr)
        sys.stderr = before
        os.dup2(own, 2)
        os.close(own)


def _flush(stream: Any) -> None:
    with suppress(OSError):
        stream.flush()


def discard_unwritten_output() -> None:
    """Keeps Python from failing again, at exit, on output that cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _fill_descriptors() -> None:
    """Opens the null device, the wrong way round, for closed descriptors: using one is then an error."""
    for descriptor, mode in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        if not _is_open(descriptor):
            opened = os.open(os.devnull, mode)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _stream(descriptor: int, mode: str) -> io.TextIOWrapper:
    raw = io.FileIO(descriptor, mode, closefd=False)
    buffer = io.BufferedReader(raw) if mode == "r" else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding="utf-8", line_buffering=descriptor == 2)


def put_facts(facts: dict[str, Any], *, as_json: bool, longest: int | None = None) -> None:
    """Prints facts on standard output, one per line or as JSON."""
    if as_json:
        put(json.dumps(facts))
        return
    width = max(map(len, facts))
    lines = []
    for name, value in facts.items():
        # Several lines of text stand below each other.
        parts = value if isinstance(value, list) and all(isinstance(part, str) for part in value) else [value]
        for index, part in enumerate(parts or ["none"]):
            text = escaped(str(part))
            text = shortened(text, longest) if longest else text
            lines.append(f"{'' if index else name:{width}}  {text}")
    put("\n".join(lines))
