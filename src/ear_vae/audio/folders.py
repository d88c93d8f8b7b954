"""Listing the files below a folder, and what of it could not be read."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ear_vae.errors import EarVAEError


@dataclass(frozen=True)
class Found:
    """Files in a folder.

    Attributes:
        files: Sorted paths, each beginning with the folder's.
        unreadable: One line, `PATH: reason`, for each subfolder that could not be entered and each file of
            a fitting name that is not there to be read, such as a link that leads nowhere or a pipe.
    """

    files: tuple[Path, ...]
    unreadable: tuple[str, ...] = ()


def find_files(folder: str | os.PathLike[str], extensions: Collection[str]) -> Found:
    """Lists all files below a folder with one of some extensions.

    Hidden files and folders are left out, and links to folders are not followed.

    Args:
        folder: Folder to search.
        extensions: Extensions in lower case, with the dot; files may have them in upper case.

    Raises:
        EarVAEError: The folder does not exist or cannot be read itself.
    """
    root = Path(folder)
    if not root.is_dir():
        raise EarVAEError(f"{root}: not a folder")
    files: list[Path] = []
    problems: list[OSError] = []
    special: list[str] = []
    for current, folders, names in os.walk(root, onerror=problems.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(current, name)
            if name.startswith(".") or path.suffix.lower() not in extensions:
                continue
            try:
                # Reading from a pipe would wait for a writer that may never come.
                if stat.S_ISREG(path.stat().st_mode):
                    files.append(path)
                else:
                    special.append(f"{path}: is a pipe, a device or a socket")
            except OSError as error:
                problems.append(error)
    unreadable = sorted([*special, *(f"{problem.filename}: {problem.strerror}" for problem in problems)])
    if any(problem.filename == str(root) for problem in problems):
        raise EarVAEError(unreadable[0])
    return Found(tuple(sorted(files)), tuple(unreadable))
