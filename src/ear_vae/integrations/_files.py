"""Several files that appear together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ear_vae._atomic import temporary_folder
from ear_vae.errors import EarVAEError


@contextmanager
def new_files(destination: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder, whose files are moved into `destination` when the block succeeds.

    When the block fails, an existing destination is left as it was.

    Args:
        destination: The folder; its parents are made.
        overwrite: Replace files of the same names in a folder that exists; its other files stay.

    Raises:
        EarVAEError: The destination is a file, a folder that is not empty and not to be overwritten, or
            cannot be written to.
    """
    if destination.exists() and not destination.is_dir():
        raise EarVAEError(f"{destination}: is a file, expected the path of a folder to write")
    if destination.is_dir() and not overwrite and any(destination.iterdir()):
        raise EarVAEError(f"{destination}: exists already; remove it, or overwrite it", argument="overwrite")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(destination if destination.is_dir() else destination.parent) as temporary:
            folder = temporary / "new"  # of ordinary permissions, unlike the temporary one
            folder.mkdir()
            yield folder
            if not destination.exists():
                folder.rename(destination)
                return
            for file in sorted(folder.iterdir()):
                file.replace(destination / file.name)
    except OSError as error:
        raise EarVAEError(f"{destination}: cannot be written: {error}") from error
