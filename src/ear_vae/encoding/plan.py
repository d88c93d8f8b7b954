"""The plan of an output: what is encoded, how, and into which shard, written before anything is encoded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ear_vae.encoding.reading import RECEIPTS_FOLDER, SILENCE_FILE
from ear_vae.encoding.sources import AudioEntry, LeftOut
from ear_vae.errors import EarVAEError
from ear_vae.limits import first_names, parse_json, shown

PLAN_FORMAT_VERSION = 1
_LONGEST_NAME = 200


@dataclass(frozen=True)
class EncodingSettings:
    """What the bytes of an output depend on besides the audio.

    Attributes:
        format: `webdataset`, `stable-audio` or `safetensors`.
        model: Name of the model.
        weights_sha256: Fingerprint of its weights.
        sample_rate: Sample rate of the model in Hz.
        downsampling_ratio: Samples per latent frame.
        latent_dim: Channels D of the latents.
        compute_dtype: Dtype that the model computes in.
        compiled: Whether workers on CPUs compile the activation, where they can.
        dtype: Dtype that latents are stored in, `float16` or `float32`.
        crop_frames: Frames of an item; None for whole recordings.
        hop_frames: Frames from the start of one item of a recording to that of the next; None without crops.
        pad_to: Frames that shorter items are padded to with silence; None for none.
        files_per_shard: Recordings in a shard.
    """

    format: str
    model: str
    weights_sha256: str
    sample_rate: int
    downsampling_ratio: int
    latent_dim: int
    compute_dtype: str
    compiled: bool
    dtype: str
    crop_frames: int | None
    hop_frames: int | None
    pad_to: int | None
    files_per_shard: int

    def to_line(self) -> str:
        """Returns the first line of a plan."""
        return _line({"format_version": PLAN_FORMAT_VERSION, **asdict(self)})

    @classmethod
    def from_line(cls, line: str, where: Path) -> EncodingSettings:
        """Reads the first line of a plan.

        Raises:
            EarVAEError: It is damaged, or of a later version.
        """
        values = _object(line, where)
        version = values.pop("format_version", None)
        if version != PLAN_FORMAT_VERSION:
            raise EarVAEError(
                f"{where}: version {shown(version)} of the plan, this ear-vae reads {PLAN_FORMAT_VERSION}; "
                "update ear-vae, or choose another output folder"
            )
        if set(values) != {field.name for field in fields(cls)}:
            raise _damaged(where)
        return cls(**values)


def settings_of(plan: Path) -> EncodingSettings:
    """Reads the settings of a plan alone.

    Raises:
        EarVAEError: The file is damaged, of another version, or cannot be read.
    """
    try:
        with plan.open("rb") as file:
            return EncodingSettings.from_line(_text(file.readline()), plan)
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(plan) from error


@dataclass(frozen=True)
class PlannedEntry:
    """One recording of a plan.

    Attributes:
        entry: The recording.
        key: Its number, as digits.
        name: Name of its files, without an extension; no two of a plan have the same.
        shard: Number of its shard.
    """

    entry: AudioEntry
    key: str
    name: str
    shard: int


def write_plan(
    path: Path, settings: EncodingSettings, listed: Iterable[AudioEntry | LeftOut]
) -> tuple[int, int]:
    """Writes a plan: its settings, what is left out, and the recordings in the order in which they came.

    Args:
        path: File to write.
        settings: How to encode.
        listed: Recordings, and what is left out.

    Returns:
        Number of recordings, and of what is left out.
    """
    entries: list[AudioEntry] = []
    left_out: list[LeftOut] = []
    for item in listed:
        if isinstance(item, AudioEntry):
            entries.append(item)
        else:
            left_out.append(item)
    names = _Names()
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(settings.to_line())
        file.writelines(_line(asdict(item)) for item in left_out)
        for number, entry in enumerate(entries):
            planned = PlannedEntry(
                entry, f"{number:09d}", names.unused(entry.path), number // settings.files_per_shard
            )
            file.write(_line(_described(planned)))
    return len(entries), len(left_out)


class EncodingPlan:
    """A plan that was written, of which only the places of the shards are held in memory.

    Args:
        path: Its file.

    Attributes:
        path: Its file.
        settings: How to encode.
        left_out: What is in the sources and cannot be encoded.
        num_entries: Number of recordings.
        num_bytes: Size of all recordings together.

    Raises:
        EarVAEError: The file is damaged, of another version, or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left_out: list[LeftOut] = []
        self.num_entries = self.num_bytes = 0
        self._offsets: list[int] = []
        try:
            with path.open("rb") as file:
                self.settings = EncodingSettings.from_line(_text(file.readline()), path)
                offset = file.tell()
                for line in file:
                    self._take(_object(_text(line), path), offset)
                    offset += len(line)
        except (OSError, UnicodeDecodeError) as error:
            raise _damaged(path) from error
        self._offsets.append(offset)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self._offsets) - 1

    def shard(self, number: int) -> list[PlannedEntry]:
        """Reads the recordings of a shard.

        Raises:
            EarVAEError: The file is damaged, or changed meanwhile.
        """
        first, end = self._offsets[number : number + 2]
        with self.path.open("rb") as file:
            file.seek(first)
            lines = _text(file.read(end - first)).split("\n")[:-1]
        return [_planned(_object(line, self.path), self.path) for line in lines]

    def names(self) -> set[str]:
        """Names of the files of all recordings, without extensions.

        Raises:
            EarVAEError: The file is damaged, or changed meanwhile.
        """
        return {planned.name for planned in _entries(self)}

    def _take(self, values: Mapping[str, Any], offset: int) -> None:
        if "reason" in values:
            self.left_out.append(LeftOut(values["path"], values["reason"]))
            return
        if values.get("shard") not in (len(self._offsets) - 1, len(self._offsets)):
            raise _damaged(self.path)
        if values["shard"] == len(self._offsets):
            self._offsets.append(offset)
        self.num_entries += 1
        self.num_bytes += values.get("bytes") or 0


def differing_settings(old: EncodingSettings, new: EncodingSettings) -> list[str]:
    """Names the settings in which two differ, with both values."""
    ours, theirs = asdict(new), asdict(old)
    return [
        f"{name} was {shown(theirs[name])}, is {shown(ours[name])}"
        for name in ours
        if ours[name] != theirs[name]
    ]


def differing_entries(old: EncodingPlan, new: EncodingPlan) -> tuple[list[str], set[str]]:
    """Says in which recordings two plans differ.

    Returns:
        A phrase for each kind of difference, and the keys of the recordings of the old plan that are at their
        places in the new one with another size and nothing else changed.
    """
    removed: list[AudioEntry] = []
    added: list[AudioEntry] = []
    resized: set[str] = set()
    for before, after in zip_longest(_entries(old), _entries(new)):
        if before == after:
            continue
        if before is not None:
            removed.append(before.entry)
        if after is not None:
            added.append(after.entry)
        if before and after and _without_size(before) == _without_size(after):
            resized.add(before.key)
    sizes = {entry.path: entry.num_bytes for entry in removed}
    come = {entry.path for entry in added}
    kinds = {
        "changed": [
            entry.path for entry in added if sizes.get(entry.path, entry.num_bytes) != entry.num_bytes
        ],
        "gone": [entry.path for entry in removed if entry.path not in come],
        "new": [entry.path for entry in added if entry.path not in sizes],
    }
    if added and not any(kinds.values()):
        kinds["in another order, or with other columns"] = [entry.path for entry in added]
    return [f"{kind}: {first_names(paths)}" for kind, paths in kinds.items() if paths], resized


def _entries(plan: EncodingPlan) -> Iterator[PlannedEntry]:
    for number in range(plan.num_shards):
        yield from plan.shard(number)


def _without_size(planned: PlannedEntry) -> dict[str, Any]:
    return {name: value for name, value in _described(planned).items() if name != "bytes"}


def _described(planned: PlannedEntry) -> dict[str, Any]:
    entry = planned.entry
    return {
        "key": planned.key,
        "path": entry.path,
        "name": planned.name,
        "root": entry.root,
        "file": entry.file,
        "offset": entry.offset,
        "bytes": entry.num_bytes,
        "shard": planned.shard,
        "columns": entry.columns,
    }


def _planned(values: Mapping[str, Any], where: Path) -> PlannedEntry:
    try:
        entry = AudioEntry(
            values["path"],
            values["root"],
            values["file"],
            values["bytes"],
            values["offset"],
            values["columns"],
        )
        return PlannedEntry(entry, values["key"], values["name"], values["shard"])
    except KeyError as error:
        raise _damaged(where) from error


class _Names:
    """Names for the files of recordings: their paths without what other programs stumble over.

    No dots, because `X.npy` and `X.std.npy` belong together and stable-audio-tools replaces `.npy` anywhere
    in a path; nothing that leads out of the folder or is the name of something else in it; and none that
    differ in case only.
    """

    def __init__(self) -> None:
        self._taken = {SILENCE_FILE.removesuffix(".npy")}

    def unused(self, path: str) -> str:
        """Returns a name for a path that it has not returned before."""
        stem, dot, extension = path.rpartition(".")
        if not stem or "/" in extension:
            stem, dot, extension = path, "", ""
        name = "/".join(map(_part, stem.replace("\\", "/").split("/"))).strip("/")
        name = re.sub("/+", "/", name) or "_"
        if name.casefold().startswith(f"{RECEIPTS_FOLDER}/"):
            name = f"_{name}"
        candidates = [name, f"{name}_{_part(extension)}" if dot else name]
        number = 1
        while candidates[0].casefold() in self._taken:
            candidates.pop(0)
            if not candidates:
                number += 1
                candidates.append(f"{name}_{number}")
        self._taken.add(candidates[0].casefold())
        return candidates[0]


def _part(part: str) -> str:
    """A part of a path, without what is special in it."""
    if part in ("", ".", ".."):
        return ""
    plain = "".join(
        character if character.isprintable() and character not in '.:*?"<>|' else "_" for character in part
    )
    # Room for what is added, in bytes of UTF-8.
    return plain.encode("utf-8")[:_LONGEST_NAME].decode("utf-8", errors="ignore")


def _line(values: Mapping[str, Any]) -> str:
    # In ASCII, which takes names that are no UTF-8 too.
    return json.dumps(values) + "\n"


def _text(content: bytes) -> str:
    return content.decode("ascii")


def _object(line: str, where: Path) -> dict[str, Any]:
    try:
        values = parse_json(line)
    except ValueError as error:
        raise _damaged(where) from error
    if not isinstance(values, dict):
        raise _damaged(where)
    return values


def _damaged(path: Path) -> EarVAEError:
    return EarVAEError(
        f"{path}: is no plan of ear-vae encode-dataset, or damaged; choose another output folder, or start "
        "again",
        argument="overwrite",
    )
