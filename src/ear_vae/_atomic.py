"""Writing files so that nothing is ever half-written, and nothing is left behind."""

from __future__ import annotations

import errno
import io
import os
import select
import shutil
import signal
import tempfile
import threading
from collections.abc import Collection, Iterator
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
            _make_ordinary(temporary)
            if overwrite:
                temporary.replace(destination)
            else:
                _put(temporary, destination)
        except FileExistsError:
            raise _exists_already(destination) from None
        except OSError as error:
            raise EarVAEError(f"{destination}: could not be written: {error.strerror or error}") from error


def _make_ordinary(file: Path) -> None:
    """Gives a file the permissions of any new one: some writers make private files."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


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
def atomic_folder(destination: Path, *, overwrite: bool, keep: Collection[str] = ()) -> Iterator[Path]:
    """Gives a temporary folder, whose files become those of `destination` when the block succeeds.

    When the block fails or is interrupted, an existing destination is left as it was.

    Args:
        destination: Folder to write; its parents are made.
        overwrite: Replace files of the same names in a folder that exists; its other files stay.
        keep: Files of the destination, relative to it, that stay even so.

    Raises:
        EarVAEError: As `require_free_folder`, also where the destination came to exist meanwhile; or it
            cannot be written to.
    """
    require_free_folder(destination, overwrite=overwrite)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(destination if destination.is_dir() else destination.parent) as temporary:
            folder = temporary / "new"  # of ordinary permissions, unlike the temporary one
            folder.mkdir()
            try:
                yield folder
            except EarVAEError as error:
                # What is wrong with the temporary folder is wrong with the one that it was to become.
                raise EarVAEError(str(error).replace(str(folder), str(destination))) from error
            for file in folder.rglob("*"):
                if file.is_file():
                    _make_ordinary(file)
            with signals_held():
                try:
                    _move_files(folder, destination, overwrite=overwrite, keep=keep)
                except FileExistsError:
                    raise _exists_already(destination) from None
    except OSError as error:
        raise EarVAEError(f"{destination}: cannot be written: {error.strerror or error}") from error


def require_free_folder(destination: Path, *, overwrite: bool) -> None:
    """Refuses a destination that is neither new, nor an empty folder, nor a folder to overwrite.

    Raises:
        EarVAEError: It is.
    """
    if destination.exists() and not destination.is_dir():
        raise EarVAEError(f"{destination}: is a file, expected the path of a folder to write")
    if destination.is_dir() and not overwrite and any(destination.iterdir()):
        raise _exists_already(destination)


def _move_files(folder: Path, destination: Path, *, overwrite: bool, keep: Collection[str]) -> None:
    try:
        if not destination.exists():
            folder.rename(destination)
            return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # Another process was first.
        if not overwrite:
            raise FileExistsError from None
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        relative = file.relative_to(folder)
        target = destination / relative
        if relative.as_posix() in keep and target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if overwrite:
            file.replace(target)
        else:
            _put(file, target)


@contextmanager
def signals_held() -> Iterator[None]:
    """Lets signals that would end the process wait for the end of the block.

    By handlers, because a blocked signal goes to another thread. Python sets them in the main thread alone,
    and no other thread is interrupted by one.
    """
    received: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # None: one that was not set by Python, and could not be set again.
            if number is not None and signal.getsignal(number) is not None:
                before[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)


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
