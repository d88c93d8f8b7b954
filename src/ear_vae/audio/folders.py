"""Listing the files below a folder, and what of it could not be read."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ear_vae.errors import EarVAEError

OUTPUT_MARK = ".ear-vae-output"
"""Name of the empty file that tells a folder of rebuilt audio inside a folder of music from the music."""
REBUILT = ".rebuilt"
"""What the name of a file or folder of rebuilt audio ends with, before the extension, if none is chosen."""


@dataclass(frozen=True)
class Found:
    """Files in a folder.

    Attributes:
        files: Sorted paths, each beginning with the folder's.
        unreadable: One line, `PATH: reason`, for each subfolder that could not be entered and each file of
            a fitting name that is not there to be read, such as a link that leads nowhere or a pipe.
        rebuilt: Those of `files` that this package made of others: in a folder with `OUTPUT_MARK` or in
            `album.rebuilt` beside `album`, other than the folder searched, and `song.rebuilt.wav` beside
            `song.mp3`.
    """

    files: tuple[Path, ...]
    unreadable: tuple[str, ...] = ()
    rebuilt: tuple[Path, ...] = ()

    @property
    def originals(self) -> tuple[Path, ...]:
        """Files that are not `rebuilt`."""
        rebuilt = set(self.rebuilt)
        return tuple(path for path in self.files if path not in rebuilt)


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
    rebuilt: set[Path] = set()
    outputs: set[str] = set()
    for current, folders, names in os.walk(root, onerror=problems.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if OUTPUT_MARK in names and Path(current) != root:
            outputs.add(current)
        outputs.update(
            os.path.join(current, name)
            for name in folders
            if current in outputs or (name.endswith(REBUILT) and name.removesuffix(REBUILT) in folders)
        )
        fitting = [name for name in names if Path(name).suffix.lower() in extensions]
        stems = {Path(name).stem for name in fitting}
        for name in fitting:
            path = Path(current, name)
            if name.startswith("."):
                continue
            made_of = path.stem.removesuffix(REBUILT)
            if current in outputs or (made_of != path.stem and made_of in stems):
                rebuilt.add(path)
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
    files.sort()
    return Found(tuple(files), tuple(unreadable), tuple(path for path in files if path in rebuilt))
