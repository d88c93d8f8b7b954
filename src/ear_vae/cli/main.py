"""The command `ear-vae`, from its arguments to its exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any, NoReturn

from ear_vae.cli.terminal import (
    OPTIONS,
    OPTIONS_OF_FIT,
    discard_unwritten_output,
    reason,
    say,
    say_traceback,
    silent_libraries,
    usable_streams,
)

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
# With any of these the user has chosen how OpenMP's threads wait: in GNU's and in Intel's.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those in `sys.argv` by default.

    Returns:
        0 when all went well, 1 when a file or the command failed, 130 when interrupted.

    Raises:
        SystemExit: With 2 on wrong usage, with 0 after `--help`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Training ends its step and writes a checkpoint when it is terminated.
    trains = arguments[:1] == ["fit"]
    cleaning_up = nullcontext() if trains else _terminated_like_interrupted()
    libraries = nullcontext() if trains or "--debug" in arguments else silent_libraries()
    _wait_without_spinning()
    with usable_streams(), libraries:
        try:
            with cleaning_up, warnings.catch_warnings():
                warnings.showwarning = _show_warning
                code = _run(arguments)
                if code == 0:
                    sys.stdout.flush()
                return code
        # Text was printed, and its reader has read enough, as `head` has after some lines. Audio that could
        # not be written has been reported with its file.
        except BrokenPipeError:
            return EXIT_FAILED
        # Whatever it is, it is said in a line; for what should not have come this far, the line says so.
        except Exception as error:
            if "--debug" in arguments:
                say_traceback(error)
            else:
                say(f"ear-vae: {reason(error, OPTIONS_OF_FIT if trains else OPTIONS)}")
            return EXIT_FAILED
        except KeyboardInterrupt:
            say("ear-vae: interrupted")
            return EXIT_INTERRUPTED
        finally:
            discard_unwritten_output()


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["fit"]:
        from ear_vae.cli.fit import run_fit

        return run_fit([argument for argument in arguments[1:] if argument != "--debug"])
    # Not before OpenMP's way of waiting is set: the formats that options offer come with torch.
    from ear_vae.cli.options import parse

    try:
        options = parse(arguments)
    except SystemExit as left:
        if not left.code:  # help that did not get through is no success
            sys.stdout.flush()
        raise
    return int(_command(options.name)(options))


def _command(name: str) -> Any:
    """Returns the function that runs a command; only its module is imported, because torch takes seconds."""
    module = name.replace("-", "_")
    return getattr(import_module(f"ear_vae.cli.{module}"), f"run_{module}")


def _wait_without_spinning() -> None:
    """Makes OpenMP's threads sleep while they wait for each other: spinning slows down everything else.

    It reads its environment when torch is loaded. docs/speed.md has the figures.
    """
    if "torch" not in sys.modules and not any(variable in os.environ for variable in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Makes a terminated process clean up as an interrupted one does."""
    # Elsewhere Python refuses, and signals are the caller's business.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Windows has no SIGHUP, which a terminal sends when it closes. What is ignored, as by nohup, stays so.
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, _interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"ear-vae: warning: {' '.join(str(message).split())}")


if __name__ == "__main__":
    sys.exit(main())
