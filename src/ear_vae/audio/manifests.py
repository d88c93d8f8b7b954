"""Manifests: files that list audio files, one in each row, with columns of the user's own."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ear_vae.errors import EarVAEError, first_line
from ear_vae.limits import parse_json, shown

MANIFEST_EXTENSIONS = (".csv", ".jsonl", ".parquet")
# Enough rows at a time to be fast, and few enough to hold.
_PARQUET_ROWS = 4096


class BadRowError(EarVAEError):
    """A row cannot be read, and the others can."""


def manifest_rows(manifest: Path) -> Iterator[tuple[int, Any]]:
    """Reads the rows of a manifest one after the other.

    Args:
        manifest: A `.csv` whose first line names the columns, all of which are text; a `.jsonl` with a JSON
            value on each line; or a `.parquet`, which takes pyarrow.

    Yields:
        Number of the row, for a `.csv` and a `.jsonl` that of its line from 1 on, and the row: a dict, any
        JSON value of a `.jsonl`, or the `BadRowError` that says why a line of it is none.

    Raises:
        EarVAEError: The manifest is of another kind, or cannot be read any further.
    """
    readers = {".csv": _csv_rows, ".jsonl": _json_rows, ".parquet": _parquet_rows}
    reader = readers.get(manifest.suffix.lower())
    if reader is None:
        raise EarVAEError(f"{manifest}: not a folder, and a manifest ends in .csv, .jsonl or .parquet")
    with _readable(manifest):
        yield from reader(manifest)


@contextmanager
def _readable(manifest: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise EarVAEError(
            f"{manifest}: is not UTF-8 at byte {error.start}; save the manifest as UTF-8"
        ) from None
    except (OSError, ValueError, csv.Error) as error:
        raise EarVAEError(f"{manifest}: cannot be read as a manifest: {error}") from error


def _csv_rows(manifest: Path) -> Iterator[tuple[int, Any]]:
    with manifest.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or ()
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"it has two columns {shown(twice)}; leave one of them out, or rename it")
        for row in reader:
            yield reader.line_num, row


def _json_rows(manifest: Path) -> Iterator[tuple[int, Any]]:
    # Lines end with \n only: other characters that text is split at may stand within a JSON string.
    with manifest.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                row = BadRowError(f"{manifest}: cannot be read as a manifest: line {number}: {error}")
            yield number, row


def _parquet_rows(manifest: Path) -> Iterator[tuple[int, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise EarVAEError(
            f"{manifest}: a parquet file takes pyarrow; install it with: pip install 'ear-vae[datasets]'"
        ) from None
    number = 0
    try:
        with parquet.ParquetFile(manifest) as file:
            for batch in file.iter_batches(_PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except ArrowException as error:
        raise EarVAEError(f"{manifest}: cannot be read as a manifest: {first_line(error)}") from error
