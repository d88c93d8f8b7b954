"""Finding the files to train on, and what is known about them."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, Literal

import torch

from ear_vae._atomic import atomic_path
from ear_vae.audio import AUDIO_EXTENSIONS, audio_info, read_audio
from ear_vae.audio.folders import find_files
from ear_vae.audio.manifests import BadRowError, manifest_rows
from ear_vae.audio.reading import HIGHEST_RATE, LOWEST_RATE
from ear_vae.dsp.bandwidth import bandwidth_hz
from ear_vae.errors import EarVAEError
from ear_vae.limits import counted

_LOG = logging.getLogger(__name__)
_BANDWIDTH_EXCERPTS, _BANDWIDTH_SECONDS = 6, 1.0
# Counts up when the same file would give other facts than before.
_CACHE_VERSION = 2
# So that ten thousand unreadable files do not hide all other messages.
_MOST_REPORTED = 10
# No format packs as many samples into a byte: a cache that says more is wrong.
_MOST_SAMPLES_PER_BYTE = 2**14


@dataclass(frozen=True)
class AudioFile:
    """A readable file, with the facts of its header and its weight.

    Attributes:
        path: Path of the file.
        sample_rate: Sample rate in Hz.
        num_samples: Number of samples per channel.
        channels: Number of channels, 1 or 2.
        bandwidth_hz: Bandwidth of its spectrum in Hz (`ear_vae.dsp.bandwidth`); None if it was not measured.
        weight: Weight with which its seconds are drawn, relative to those of other files.
    """

    path: Path
    sample_rate: int
    num_samples: int
    channels: int
    bandwidth_hz: float | None = None
    weight: float = 1.0

    @property
    def duration_seconds(self) -> float:
        """Length in seconds."""
        return self.num_samples / self.sample_rate


@dataclass(frozen=True)
class Policy:
    """Says which files are left out.

    Args:
        min_seconds: Shortest duration of a file in seconds.
        min_bandwidth_hz: Lowest bandwidth of a file in Hz; the spectrum of many mp3s breaks off at 16 kHz.
        mono: Treatment of mono files: `duplicate` makes two equal channels of them, `skip` leaves them out.

    Raises:
        EarVAEError: A value is out of range.
    """

    min_seconds: float = 0.0
    min_bandwidth_hz: float | None = None
    mono: Literal["duplicate", "skip"] = "duplicate"

    def __post_init__(self) -> None:
        if self.mono not in ("duplicate", "skip"):
            raise EarVAEError(f"mono must be duplicate or skip, got {self.mono!r}")
        if self.min_bandwidth_hz is not None and not self.min_bandwidth_hz > 0:
            raise EarVAEError(f"min_bandwidth_hz must be positive, got {self.min_bandwidth_hz}")


def find_usable_files(
    sources: Sequence[Path], policy: Policy, *, cache_dir: Path | None = None
) -> list[AudioFile]:
    """Finds the usable files of folders and manifests, in the order of sources and paths.

    A manifest is a `.csv` or `.parquet` with a column `path`, or a `.jsonl` with an object of that key on
    each line; paths are relative to it. A column `weight` says how often the seconds of that file are drawn.
    Headers and bandwidths are cached as long as size and time of a file stay the same. Files that are left
    out are reported through `logging`.

    Args:
        sources: Manifests, and folders, which are searched recursively except for what is hidden.
        policy: Which files to leave out.
        cache_dir: Folder of the cache; `~/.cache/ear-vae`, or below `XDG_CACHE_HOME`, by default.

    Raises:
        EarVAEError: A source does not exist or is not understood, or nothing usable is left.
    """
    weights: dict[Path, float] = {}
    for source in sources:
        for path, weight in _listed(source):
            if weight > 0:
                weights.setdefault(path, weight)
    cache = _Cache(cache_dir or _default_cache_dir(), sources)
    measure = policy.min_bandwidth_hz is not None
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda path: cache.examined(path, measure=measure), weights))
    cache.save()
    _report("unreadable", [str(entry) for entry in found if isinstance(entry, EarVAEError)])
    readable = [replace(file, weight=weights[file.path]) for file in found if isinstance(file, AudioFile)]
    usable, left_out = readable, []
    for reason, keep in _conditions(policy):
        failed = [str(file.path) for file in usable if not keep(file)]
        _report(reason, failed)
        left_out += [f"{len(failed)} {reason}"] if failed else []
        usable = [file for file in usable if keep(file)]
    if not usable:
        short = any(file.duration_seconds < policy.min_seconds for file in readable)
        raise EarVAEError(
            f"{', '.join(map(str, sources))}: no usable audio: {counted(len(weights), 'audio file')}, "
            f"{len(readable)} of them readable"
            + "".join(f", {part}" for part in left_out)
            + ("; give longer files, or a smaller segment_seconds or validation_seconds" if short else "")
        )
    return usable


def listed_sources(sources: Sequence[str] | str | Path) -> list[Path]:
    """Returns the paths of one or several folders or manifests, as data modules take them.

    Raises:
        EarVAEError: The list is empty.
    """
    listed = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if not listed:
        raise EarVAEError("an empty list of folders; give at least one")
    return [Path(source) for source in listed]


def _conditions(policy: Policy) -> list[tuple[str, Callable[[AudioFile], bool]]]:
    """Returns, for each condition, a description of a file that fails it, and a function that checks it."""
    conditions: list[tuple[str, Callable[[AudioFile], bool]]] = []
    least_seconds, least_hz = policy.min_seconds, policy.min_bandwidth_hz
    conditions.append(
        (f"shorter than {least_seconds:.2f} s", lambda file: file.duration_seconds >= least_seconds)
    )
    if policy.mono == "skip":
        conditions.append(("mono", lambda file: file.channels == 2))
    if least_hz is not None:
        conditions.append(
            (
                f"without anything above {least_hz:g} Hz",
                lambda file: file.bandwidth_hz is not None and file.bandwidth_hz >= least_hz,
            )
        )
    return conditions


def _report(what: str, entries: Sequence[str]) -> None:
    for entry in entries[:_MOST_REPORTED]:
        _LOG.warning("left out, %s: %s", what, entry)
    if len(entries) > _MOST_REPORTED:
        _LOG.warning("left out, %s: %d more", what, len(entries) - _MOST_REPORTED)


def _listed(source: Path) -> Iterable[tuple[Path, float]]:
    """Lists the paths and weights of one source."""
    if source.is_dir():
        found = find_files(source, AUDIO_EXTENSIONS)
        _report("unreadable", found.unreadable)
        _report("rebuilt from another file there", list(map(str, found.rebuilt)))
        return [(path, 1.0) for path in found.originals]
    if not source.exists():
        raise EarVAEError(f"{source}: does not exist; give a folder of audio or a manifest")
    if not source.is_file():
        raise EarVAEError(f"{source}: neither a folder nor a file")
    return [_entry(source, line, row) for line, row in manifest_rows(source)]


def _entry(manifest: Path, line: int, row: Any) -> tuple[Path, float]:
    if isinstance(row, BadRowError):
        raise row
    where = f"{manifest}, line {line}"
    path = row.get("path") if isinstance(row, Mapping) else None
    if not isinstance(path, str) or not path:
        raise EarVAEError(f"{where}: has no 'path'; each line names a file, and a .csv its columns first")
    if "\0" in path:
        raise EarVAEError(f"{where}: the path {shortened(path)} holds a NUL character, which no path can")
    given = row.get("weight")
    try:
        weight = 1.0 if given in (None, "") else float(given)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise EarVAEError(f"{where}: weight must be a number of 0 or more, got {shortened(given)}")
    return manifest.parent / path, weight


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ear-vae"


class _Cache:
    """Keeps headers and bandwidths of the files of some sources in one JSON file.

    Several processes may read and write it at once: each replaces the whole file, and what is lost that way
    is looked up again.
    """

    def __init__(self, folder: Path, sources: Sequence[Path]) -> None:
        identity = "\n".join([str(_CACHE_VERSION), *(str(source.resolve()) for source in sources)])
        self.path = folder / f"audio-{hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]}.json"
        self.known: dict[str, Any] = {}
        self.used: dict[str, Any] = {}
        # None yet, or damaged: everything is looked up.
        with suppress(OSError, ValueError, TypeError, RecursionError):
            if self.path.is_file():
                self.known = dict(json.loads(self.path.read_text(encoding="utf-8")))

    def examined(self, path: Path, *, measure: bool) -> AudioFile | EarVAEError:
        """Returns what is known about a file, looked up if need be, or why it cannot be used."""
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                return EarVAEError(f"{path}: is not a regular file")
            stamp = [status.st_size, status.st_mtime_ns]
            file = self._remembered(path, stamp)
            if file is None:
                info = audio_info(path)
                file = AudioFile(path, info.sample_rate, info.num_samples, info.channels)
            if measure and file.bandwidth_hz is None:
                file = replace(file, bandwidth_hz=_bandwidth_of(file))
        except OSError as error:
            return EarVAEError(f"{path}: {error.strerror or error}")
        except UnicodeError as error:
            return EarVAEError(f"{path}: its name cannot be given to the system: {error}")
        except EarVAEError as error:
            return error
        facts = {key: value for key, value in asdict(file).items() if key not in ("path", "weight")}
        self.used[str(path.resolve())] = {"stamp": stamp, **facts}
        return file

    def save(self) -> None:
        """Writes what was used, if it is new."""
        if self.used == self.known:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.path, overwrite=True) as temporary:
                temporary.write_text(json.dumps(self.used, sort_keys=True), encoding="utf-8")
        except (OSError, EarVAEError) as error:
            _LOG.warning("the lengths of the audio files could not be cached: %s", error)

    def _remembered(self, path: Path, stamp: list[int]) -> AudioFile | None:
        """Returns what the cache knows about the file as it is now, if all of it is plausible."""
        entry = self.known.get(str(path.resolve()))
        if not isinstance(entry, dict) or entry.get("stamp") != stamp:
            return None
        rate, length, channels = (entry.get(name) for name in ("sample_rate", "num_samples", "channels"))
        # Not `isinstance`, for which True is 1.
        if not type(rate) is type(length) is type(channels) is int:
            return None
        if not LOWEST_RATE <= rate <= HIGHEST_RATE or channels not in (1, 2):
            return None
        if not 0 < length <= stamp[0] * _MOST_SAMPLES_PER_BYTE:
            return None
        bandwidth = entry.get("bandwidth_hz")
        if bandwidth is not None and not (isinstance(bandwidth, float) and 0 <= bandwidth <= rate / 2):
            return None
        return AudioFile(path, rate, length, channels, bandwidth)


def _bandwidth_of(file: AudioFile) -> float:
    """Measures the bandwidth of one-second excerpts from all over the file."""
    length = min(file.num_samples, max(4096, round(_BANDWIDTH_SECONDS * file.sample_rate)))
    if length < 4096:
        return file.sample_rate / 2
    starts = [
        int((place + 0.5) / _BANDWIDTH_EXCERPTS * (file.num_samples - length))
        for place in range(_BANDWIDTH_EXCERPTS)
    ]
    audio = torch.cat([read_audio(file.path, start=s, num_samples=length)[0] for s in starts], dim=1)
    return bandwidth_hz(audio, file.sample_rate)
