"""Writing files so that nothing is ever half-written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ear_vae.errors import EarVAEError


@contextmanager
def atomic_path(destination: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    """A temporary path beside `destination` that takes its place when the block succeeds.

    When the block fails, for whatever reason, the temporary file is removed and an existing
    destination is left as it was. The suffix of the destination is kept.

    Args:
        destination: The file to write.
        overwrite: Replace an existing file.

    Raises:
        EarVAEError: The destination exists and is not to be overwritten, is a folder, or lies in a
            folder that is missing or cannot be written to.
    """
    destination = Path(destination)
    try:
        if destination.is_dir():
            raise EarVAEError(f"{destination}: is a folder, expected the path of a file to write")
        if destination.exists() and not overwrite:
            raise EarVAEError(
                f"{destination}: exists already; remove it, or overwrite it (overwrite=True, --force)"
            )
        handle, name = tempfile.mkstemp(prefix=".ear-vae-", suffix=destination.suffix, dir=destination.parent)
    except FileNotFoundError:
        raise EarVAEError(f"{destination}: the folder {destination.parent} does not exist") from None
    except OSError as error:
        raise EarVAEError(f"{destination}: cannot write in {destination.parent}: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes the file private; what is left behind has the permissions of any new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(destination)
    finally:
        temporary.unlink(missing_ok=True)


def system_path(path: str | os.PathLike[str]) -> str | bytes:
    """A path as libsndfile must be given it: where names are bytes, those need not be UTF-8."""
    return os.fsencode(path) if os.name == "posix" else os.fspath(path)


def name_of(source: Any) -> str:
    """What to call a path or an open file in a message."""
    if isinstance(source, (str, os.PathLike)):
        return str(os.fspath(source))
    return str(getattr(source, "name", "<stream>"))
