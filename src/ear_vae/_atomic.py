"""Writing files so that nothing is ever half-written, and nothing is left behind."""

from __future__ import annotations

import io
import os
import select
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ear_vae.errors import EarVAEError

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed: that is lock enough
    fcntl = None  # type: ignore[assignment]

_PREFIX = ".ear-vae-"
_LOCK = "lock"
_STANDARD_STREAMS = {"<stdin>": "standard input", "<stdout>": "standard output", 1: "standard output"}
# Folders in which this process has removed what others had left.
_tidied: set[str] = set()


@contextmanager
def atomic_path(destination: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    """Gives a temporary path, and moves it to `destination` when the block succeeds.

    When the block fails, for whatever reason, the temporary file is removed and an existing
    destination is left as it was. The suffix of the destination is kept.

    Args:
        destination: File to write.
        overwrite: Replace an existing file.

    Raises:
        EarVAEError: The destination exists and is not to be overwritten, also if it came to exist meanwhile;
            it is a folder, a device, a pipe or a link, or lies in a folder that is missing or cannot be
            written to; or the block raised an `OSError`, as on a full disk.
    """
    destination = Path(destination)
    with ExitStack() as stack:
        try:
            _require_ordinary(destination)
            if destination.exists() and not overwrite:
                raise _exists_already(destination)
            if destination.is_symlink():
                raise EarVAEError(
                    f"{destination}: is a link to {os.path.realpath(destination)}; name that file itself, or "
                    "remove the link"
                )
            folder = stack.enter_context(temporary_folder(destination.parent))
        except FileNotFoundError:
            raise EarVAEError(f"{destination}: the folder {destination.parent} does not exist") from None
        except OSError as error:
            raise EarVAEError(
                f"{destination}: cannot write in {destination.parent}: {error.strerror}"
            ) from error
        temporary = folder / f"new{destination.suffix}"
        try:
            yield temporary
            # Some writers make private files; what is left behind has the permissions of any new file.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            if overwrite:
                temporary.replace(destination)
            else:
                _put(temporary, destination)
        except FileExistsError:
            raise _exists_already(destination) from None
        except OSError as error:
            raise EarVAEError(f"{destination}: could not be written: {error.strerror or error}") from error


def _require_ordinary(destination: Path) -> None:
    """Refuses what is there and is no file to replace: root can put a file in the place of a device."""
    if destination.is_dir():
        raise EarVAEError(f"{destination}: is a folder, expected the path of a file to write")
    if destination.exists() and not destination.is_file():
        raise EarVAEError(f"{destination}: is a pipe or a device, expected the path of a file to write")
    if destination.is_symlink() and not destination.exists():
        raise EarVAEError(f"{destination}: is a link that leads nowhere; remove it, or choose another name")


def _exists_already(destination: Path) -> EarVAEError:
    return EarVAEError(f"{destination}: exists already; remove it, or overwrite it", argument="overwrite")


def _put(temporary: Path, destination: Path) -> None:
    """Gives a file its name unless another process has given it to a file meanwhile.

    Raises:
        FileExistsError: It has.
        OSError: The file cannot have that name.
    """
    try:
        os.link(temporary, destination)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links, where only a moment is left to fall between
        if os.path.lexists(destination):
            raise FileExistsError from None
        temporary.replace(destination)


def require_free(destination: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Refuses an output that `atomic_path` would refuse, before hours are spent on it.

    Args:
        destination: File to write.
        overwrite: Replace an existing file.

    Raises:
        EarVAEError: As `atomic_path`.
    """
    with suppress(_OnlyLookingError), atomic_path(destination, overwrite):
        raise _OnlyLookingError


class _OnlyLookingError(Exception):
    """Leaves `atomic_path` without writing."""


@contextmanager
def temporary_folder(parent: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Makes a folder for unfinished files, and removes it at the end with all that is in it.

    A process that is killed leaves its folder behind; the next one to make such a folder in the same place
    removes those of dead processes. A live one holds a lock on a file in its folder.

    Args:
        parent: Folder to make it in; the system's folder for temporary files by default.

    Raises:
        EarVAEError: There is no folder for temporary files.
        OSError: The folder cannot be made.
    """
    place = _place_for_temporary_files() if parent is None else os.fspath(parent) or os.curdir
    _tidy(place)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    try:
        with _locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_all(file: IO[bytes], data: bytes | memoryview) -> None:
    """Writes all of the data, even where one call writes only a part, as with unbuffered files.

    Raises:
        OSError: The file cannot be written to.
    """
    rest = memoryview(data).cast("B")
    while rest:
        count = file.write(rest)
        if count is None and isinstance(file, io.RawIOBase):
            # It would block; select is there wherever that can happen.
            select.select([], [file], [])
            continue
        rest = rest[len(rest) if count is None else count :]


def same_file(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to one file or folder that exists, through links too."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def system_path(path: str | os.PathLike[str]) -> str | bytes:
    """Returns a path as libsndfile needs it: as bytes where file names are bytes, which need not be UTF-8."""
    return os.fsencode(path) if os.name == "posix" else os.fspath(path)


def name_of(source: Any) -> str:
    """Returns the name of a path or an open file for messages."""
    if isinstance(source, (str, os.PathLike)):
        return str(os.fspath(source))
    name = getattr(source, "name", "<stream>")
    return _STANDARD_STREAMS.get(name) or str(name)


def _place_for_temporary_files() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError as error:
        raise EarVAEError("there is no writable folder for temporary files; name one with TMPDIR") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # Under another name until it is locked, or it could be taken for that of a dead process.
    unlocked = folder / (f"{_LOCK}.new" if fcntl else _LOCK)
    handle = os.open(unlocked, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if fcntl:
            with suppress(OSError):  # a file system without locks: nobody will take it for abandoned
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unlocked.rename(folder / _LOCK)
        yield
    finally:
        os.close(handle)


def _tidy(place: str) -> None:
    """Removes the temporary folders of dead processes, once for each place."""
    key = os.path.realpath(place)
    if key in _tidied:
        return
    _tidied.add(key)
    with suppress(OSError), os.scandir(place) as entries:
        found = [
            Path(entry.path)
            for entry in entries
            if entry.name.startswith(_PREFIX) and entry.is_dir(follow_symlinks=False)
        ]
        for folder in found:
            with suppress(OSError):
                _remove_if_abandoned(folder)


def _remove_if_abandoned(folder: Path) -> None:
    lock = folder / _LOCK
    if fcntl is None:
        lock.unlink()  # fails where it is open
        shutil.rmtree(folder)
        return
    handle = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    finally:
        os.close(handle)
