"""What there is to encode: audio in folders, in manifests with columns, and in webdataset tars."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ear_vae.audio.folders import find_files
from ear_vae.audio.formats import AUDIO_EXTENSIONS
from ear_vae.audio.manifests import MANIFEST_EXTENSIONS, BadRowError, manifest_rows
from ear_vae.audio.processes import AudioLocation
from ear_vae.errors import EarVAEError, first_line
from ear_vae.limits import parse_json

_TAR = ".tar"
_KEY_COLUMN = "__key__"
_TEXT_MEMBER, _JSON_MEMBER = ".txt", ".json"
# Bytes of a second of audio in formats that lose some of it, at their highest usual rate, and as on a CD.
_LOSSY = frozenset((".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".wma", ".ac3", ".mp2"))
_LOSSY_BYTES_PER_SECOND, _BYTES_PER_SECOND = 40_000, 176_400
# Of a sample's text and JSON, which are read when the plan is made.
_MOST_COLUMN_BYTES = 2**20


@dataclass(frozen=True)
class AudioEntry:
    """One recording to encode.

    Attributes:
        path: Its path as the source names it: relative to the folder or the manifest, in a tar `TAR/MEMBER`;
            with several sources the name of its own stands before.
        root: Number of the source that it is from.
        file: Path of its file, or of the tar, relative to `base_of(source)`.
        num_bytes: Size; None where there is no such file.
        offset: Where it begins in the tar; None for a file of its own.
        columns: What the user says of it, JSON-ready.
    """

    path: str
    root: int
    file: str
    num_bytes: int | None
    offset: int | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    def location(self, bases: Sequence[Path]) -> AudioLocation:
        """Where it lies, given the folders that its sources are relative to."""
        span = None if self.offset is None else (self.offset, self.num_bytes or 0)
        return AudioLocation(str(bases[self.root] / self.file), span)


def estimated_seconds(entries: Iterable[AudioEntry]) -> float:
    """Estimates the length of recordings together, by their sizes and extensions alone; rather too short."""
    return sum(
        (entry.num_bytes or 0)
        / (_LOSSY_BYTES_PER_SECOND if Path(entry.path).suffix.lower() in _LOSSY else _BYTES_PER_SECOND)
        for entry in entries
    )


@dataclass(frozen=True)
class LeftOut:
    """What is in a source and cannot be encoded.

    Attributes:
        path: What it is called in the source.
        reason: Why it is left out.
    """

    path: str
    reason: str


def base_of(source: Path) -> Path:
    """Returns the folder that the paths of a source are relative to: itself, or that of a manifest or tar."""
    return source if source.is_dir() else source.parent


def list_sources(sources: Sequence[Path], output: Path) -> Iterator[AudioEntry | LeftOut]:
    """Lists what there is to encode, without opening any audio.

    Folders are searched for audio and tars, and listed by path; manifests and tars keep their own order.

    Args:
        sources: Folders, manifests (`.csv`, `.jsonl`, `.parquet`) and webdataset tars.
        output: Folder of the results: what lies in it is no source.

    Raises:
        EarVAEError: A source does not exist, or is of another kind; a manifest or a folder cannot be read.
    """
    for root, (source, prefix) in enumerate(zip(sources, _prefixes(sources), strict=True)):
        if source.is_dir():
            listed = _in_folder(root, source, output)
        elif not source.exists():
            raise EarVAEError(f"{source}: does not exist; give a folder of audio, a manifest or a tar")
        elif source.suffix.lower() == _TAR:
            listed = _in_tar(root, source, source.name)
        elif source.suffix.lower() in MANIFEST_EXTENSIONS:
            listed = _in_manifest(root, source)
        else:
            raise EarVAEError(
                f"{source}: is no folder, manifest (.csv, .jsonl, .parquet) or webdataset (.tar); a single "
                "file is encoded with ear-vae encode"
            )
        for entry in listed:
            if prefix:
                yield replace(entry, path=f"{prefix}/{entry.path}")
            else:
                yield entry


def _prefixes(sources: Sequence[Path]) -> list[str]:
    """Returns what tells several sources apart: their names, numbered where these are the same."""
    if len(sources) == 1:
        return [""]
    prefixes: list[str] = []
    for source in sources:
        name = Path(os.path.abspath(source)).name
        prefix, number = name, 1
        while prefix in prefixes:
            number += 1
            prefix = f"{name}-{number}"
        prefixes.append(prefix)
    return prefixes


def _in_folder(root: int, folder: Path, output: Path) -> Iterator[AudioEntry | LeftOut]:
    found = find_files(folder, AUDIO_EXTENSIONS | {_TAR})
    for problem in found.unreadable:
        place, _, reason = problem.rpartition(": ")
        yield LeftOut(os.path.relpath(place, folder), reason)
    inner, outer = output.resolve(), folder.resolve()
    # What an earlier run wrote there is no source.
    skipped = inner if inner != outer and inner.is_relative_to(outer) else None
    for path in found.files:
        if skipped and path.resolve().is_relative_to(skipped):
            continue
        relative = path.relative_to(folder).as_posix()
        if path.suffix.lower() == _TAR:
            yield from _in_tar(root, path, relative)
        else:
            yield AudioEntry(relative, root, relative, _size(path))


def _in_manifest(root: int, manifest: Path) -> Iterator[AudioEntry | LeftOut]:
    seen: dict[bytes, int] = {}
    for number, row in manifest_rows(manifest):
        where = f"{manifest.name}, line {number}"
        if isinstance(row, BadRowError):
            yield LeftOut(where, row.message.removeprefix(f"{manifest}: "))
            continue
        path = row.get("path") if isinstance(row, Mapping) else None
        if not isinstance(path, str) or not path:
            yield LeftOut(where, "has no 'path', which names the audio file")
            continue
        if "\0" in path:
            yield LeftOut(where, "its path holds a NUL character, which no path can")
            continue
        if None in row:
            yield LeftOut(where, "has more fields than the first line has columns")
            continue
        try:
            text = json.dumps({key: value for key, value in row.items() if key != "path"}, default=_plain)
        except (TypeError, ValueError) as error:
            yield LeftOut(where, first_line(error))
            continue
        digest = hashlib.sha256(f"{path}\0{text}".encode(errors="surrogatepass")).digest()[:16]
        if digest in seen:
            yield LeftOut(where, f"says the same as line {seen[digest]}")
            continue
        seen[digest] = number
        yield AudioEntry(path, root, path, _size(manifest.parent / path), columns=json.loads(text))


def _plain(value: Any) -> str:
    """What a value of a parquet file that JSON has no kind for is carried over as."""
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (decimal.Decimal, datetime.timedelta)):
        return str(value)
    raise TypeError(f"a column holds {type(value).__name__}, which JSON cannot")


def _in_tar(root: int, tar: Path, relative: str) -> Iterator[AudioEntry | LeftOut]:
    """Lists the samples of a webdataset tar: members whose names are alike up to the first dot."""
    samples: dict[str, list[tarfile.TarInfo]] = {}
    broken: LeftOut | None = None
    try:
        # Not compressed: members are read where they lie.
        with tarfile.open(tar, "r:") as file:
            for member in file:
                folder, slash, name = member.name.rpartition("/")
                if member.isfile() and not name.startswith("."):
                    samples.setdefault(folder + slash + name.partition(".")[0], []).append(member)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        broken = LeftOut(relative, f"no tar, compressed, or damaged: {first_line(error)}")
    if samples:
        with tar.open("rb") as content:
            for key, members in samples.items():
                yield from _sample(root, relative, key, members, content)
    if broken:
        yield broken


def _sample(
    root: int, tar: str, key: str, members: Sequence[tarfile.TarInfo], content: Any
) -> Iterator[AudioEntry | LeftOut]:
    audio: tarfile.TarInfo | None = None
    columns: dict[str, Any] = {_KEY_COLUMN: key}
    for member in members:
        extension = os.path.splitext(member.name)[1].lower()
        path = f"{tar}/{member.name}"
        if extension in AUDIO_EXTENSIONS:
            if audio is None:
                audio = member
            else:
                yield LeftOut(path, f"its sample has {audio.name} already")
        elif extension in (_TEXT_MEMBER, _JSON_MEMBER):
            content.seek(member.offset_data)
            data = content.read(min(member.size, _MOST_COLUMN_BYTES + 1))
            try:
                if len(data) > _MOST_COLUMN_BYTES:
                    raise ValueError(f"is larger than {_MOST_COLUMN_BYTES} bytes")
                text = data.decode("utf-8")
                if extension == _TEXT_MEMBER:
                    columns["txt"] = text
                    continue
                value = parse_json(text)
                columns |= value if isinstance(value, dict) else {"json": value}
            except ValueError as error:
                yield LeftOut(path, f"its sample is encoded without it: {first_line(error)}")
    if audio is None:
        yield LeftOut(f"{tar}/{key}", "a sample without audio")
        return
    yield AudioEntry(f"{tar}/{audio.name}", root, tar, audio.size, audio.offset_data, columns)


def _size(path: Path) -> int | None:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return None
