"""Reading what `ear-vae encode-dataset` wrote, in any of its three formats, piece by piece.

Nothing is read before it is asked for, and of a tensor only the frames that are: a million items cost the
memory of their places.
"""

from __future__ import annotations

import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ear_vae.audio.folders import find_files
from ear_vae.errors import EarVAEError, first_line
from ear_vae.limits import integer, parse_json, sample_rate_of, shown, unpack_facts
from ear_vae.posterior import Posterior

PLAN_FILE, RECEIPTS_FOLDER = "plan.jsonl", "receipts"
FILELIST_FILE, SILENCE_FILE = "filelist.txt", "silence.npy"
FORMATS = ("webdataset", "stable-audio", "safetensors")
OWN_FACTS = "ear_vae"
"""Key in the JSON of an item of what the user's columns do not say."""
# What is said in the JSON of an item about its place in the source: a crop of the item has another.
_PLACE = ("timestamps", "seconds_start", "seconds_total", "sample_rate", "padding_mask", OWN_FACTS)
_MEMBERS = ("json", "npy", "std.npy")
_LONGEST_NPY_HEADER = 4096


def accompanies_items(path: Path) -> bool:
    """Whether a file is the encoded silence of a data set, or standard deviations beside the means."""
    if path.name == SILENCE_FILE:
        return path.with_name(PLAN_FILE).is_file()
    item = path.name.removesuffix(".std.npy")
    return item != path.name and path.with_name(f"{item}.npy").is_file()


class _Span(NamedTuple):
    """Where a file lies: on its own, or as a member of another one."""

    path: Path
    offset: int
    size: int


@dataclass(frozen=True)
class LatentItem(ABC):
    """One item of a data set of latents: a piece of audio, encoded.

    Attributes:
        where: Name of the item's file in messages.
        key: Name of the item in the data set.
        metadata: The user's columns as they were; `path` and `relpath` too, unless columns have these names.
        num_frames: Number of latent frames N without padding.
        latent_dim: Channels D of the latents.
        sample_rate: Sample rate of the model, in Hz.
        downsampling_ratio: Samples per latent frame.
        seconds_start: Place of the item in its source, in seconds.
        seconds_total: Length of the source in seconds.
        weights_sha256: Fingerprint of the model that made it.
    """

    where: str
    key: str
    metadata: Mapping[str, Any]
    num_frames: int
    latent_dim: int
    sample_rate: int
    downsampling_ratio: int
    seconds_start: float
    seconds_total: float
    weights_sha256: str

    def posterior(self, start: int = 0, num_frames: int | None = None) -> Posterior:
        """Reads frames, without those that were added as padding.

        Args:
            start: First frame.
            num_frames: Number of frames; all that are left by default.

        Returns:
            The posterior with tensors [D, num_frames] in float32.

        Raises:
            EarVAEError: There are no such frames, or the file is missing or damaged.
        """
        length = self.num_frames - start if num_frames is None else num_frames
        if start < 0 or length < 1 or start + length > self.num_frames:
            raise EarVAEError(
                f"{self.where}: has {self.num_frames} frames; {shown(length)} from {shown(start)} on are not "
                "among them"
            )
        mean, std = self._read(start, start + length)
        for name, tensor in (("mean", mean), ("std", std)):
            if tensor.shape != (self.latent_dim, length):
                raise EarVAEError(
                    f"{self.where}: its {name} is not {self.latent_dim} channels of {self.num_frames} frames"
                )
            if not bool(tensor.isfinite().all()):
                raise EarVAEError(f"{self.where}: its {name} holds NaN or infinity")
        return Posterior(mean, std)

    @abstractmethod
    def _read(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Reads frames of mean and std in float32."""


@dataclass(frozen=True)
class _ArrayItem(LatentItem):
    """An item of two numpy arrays."""

    mean: _Span
    std: _Span

    def _read(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        mean, std = (_frames(span, self.where, start, end) for span in (self.mean, self.std))
        return mean, std


@dataclass(frozen=True)
class _SafetensorsItem(LatentItem):
    """An item in a latent file."""

    path: Path

    def _read(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        try:
            with safe_open(self.path, framework="pt") as file:
                mean, std = (file.get_slice(name)[:, start:end].float() for name in ("mean", "std"))
                return mean, std
        except (OSError, SafetensorError) as error:
            raise _damaged(self.where, error) from error


class LatentFolder(Sequence[LatentItem], ABC):
    """The items of a data set of latents in their order, and what they have in common.

    Args:
        folder: The output of `ear-vae encode-dataset`.

    Attributes:
        folder: The folder.
        sample_rate: Sample rate of the model that made them, in Hz.
        downsampling_ratio: Samples per latent frame.
        latent_dim: Channels D of the latents.
        weights_sha256: Fingerprint of the model.

    Raises:
        EarVAEError: There are no items, or the first one is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not len(self):
            raise EarVAEError(f"{folder}: holds no latents")
        first = self._item(0)
        self.sample_rate = first.sample_rate
        self.downsampling_ratio = first.downsampling_ratio
        self.latent_dim = first.latent_dim
        self.weights_sha256 = first.weights_sha256

    @property
    def latent_rate(self) -> float:
        """Latent frames per second."""
        return self.sample_rate / self.downsampling_ratio

    @overload
    def __getitem__(self, index: int) -> LatentItem: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[LatentItem]: ...

    def __getitem__(self, index: int | slice) -> LatentItem | Sequence[LatentItem]:
        """Looks up an item; its tensors are not read yet.

        Raises:
            IndexError: There is none of that number.
            EarVAEError: It is damaged, or another model made it than the first one.
        """
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(index)
        item = self._item(number)
        for name in ("weights_sha256", "latent_dim", "sample_rate", "downsampling_ratio"):
            value, expected = getattr(item, name), getattr(self, name)
            if value != expected:
                raise EarVAEError(
                    f"{item.where}: was made by another model than the first item: its {name} is "
                    f"{shown(value)} instead of {shown(expected)}"
                )
        return item

    def silence(self) -> Tensor | None:
        """Reads the latent of digital silence, [D, 1] in float32; None where the folder holds none.

        Raises:
            EarVAEError: The file is damaged.
        """
        path = self.folder / SILENCE_FILE
        if not path.exists():
            return None
        try:
            frames = torch.from_numpy(np.load(path)).float()
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise _damaged(str(path), error) from error
        if frames.shape[:2] != (1, self.latent_dim) or frames.ndim != 3 or not frames.shape[2]:
            raise EarVAEError(
                f"{path}: has the shape {list(frames.shape)}, expected [1, {self.latent_dim}, M]"
            )
        # Far from the edges, which sound of their own.
        middle = frames.shape[2] // 2
        return frames[0, :, middle : middle + 1]

    @abstractmethod
    def _item(self, number: int) -> LatentItem: ...


class _Tars(LatentFolder):
    """Items in tars; which ones is looked up when the first of a tar is asked for."""

    def __init__(self, folder: Path, noted: Mapping[str, int]) -> None:
        self._paths = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
        self._spans: dict[int, np.ndarray] = {}
        counts = (
            noted[path.stem] if path.stem in noted else len(self._index(number))
            for number, path in enumerate(self._paths)
        )
        self._ends = list(accumulate(counts))
        super().__init__(folder)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _index(self, number: int) -> np.ndarray:
        """Returns offset and size of each member of each item, [items, members, 2]."""
        if number not in self._spans:
            self._spans[number] = _members(self._paths[number])
        return self._spans[number]

    def _item(self, number: int) -> LatentItem:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        index, path = self._index(shard), self._paths[shard]
        before = self._ends[shard - 1] if shard else 0
        if len(index) != self._ends[shard] - before:
            raise EarVAEError(
                f"{path}: holds {len(index)} items, its receipt says {self._ends[shard] - before}; run "
                "ear-vae encode-dataset again"
            )
        facts, mean, std = (_Span(path, int(start), int(size)) for start, size in index[number - before])
        where = f"{path}, item {number - before}"
        values = _json(_content(facts, where), where)
        return _ArrayItem(**_described(values, where), mean=mean, std=std)


class _Arrays(LatentFolder):
    """Items as files of numpy arrays, listed in one file."""

    def __init__(self, folder: Path) -> None:
        path = folder / FILELIST_FILE
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise _damaged(str(path), error) from error
        self._names = [line for line in lines if line]
        for name in self._names:
            relative = PurePosixPath(name)
            if relative.is_absolute() or ".." in relative.parts or relative.suffix != ".npy":
                raise EarVAEError(f"{path}: {shown(name)} is no .npy file below the folder")
        super().__init__(folder)

    def __len__(self) -> int:
        return len(self._names)

    def _item(self, number: int) -> LatentItem:
        path = self.folder / self._names[number]
        stem = str(path).removesuffix(".npy")
        try:
            sizes = [os.path.getsize(name) for name in (f"{stem}.json", f"{stem}.npy", f"{stem}.std.npy")]
        except OSError as error:
            raise _damaged(str(path), error) from error
        facts, mean, std = (
            _Span(Path(f"{stem}.{ending}"), 0, size) for ending, size in zip(_MEMBERS, sizes, strict=True)
        )
        values = _json(_content(facts, str(path)), str(facts.path))
        return _ArrayItem(**_described(values, str(path)), mean=mean, std=std)


class _LatentFiles(LatentFolder):
    """Items as latent files."""

    def __init__(self, folder: Path) -> None:
        self._paths = find_files(folder, {".safetensors"}).files
        super().__init__(folder)

    def __len__(self) -> int:
        return len(self._paths)

    def _item(self, number: int) -> LatentItem:
        path = self._paths[number]
        try:
            with safe_open(path, framework="pt") as file:
                facts = unpack_facts(file.metadata())
        except (OSError, SafetensorError, ValueError) as error:
            raise _damaged(str(path), error) from error
        return _SafetensorsItem(**_described(facts.get("metadata"), str(path)), path=path)


def open_latents(folder: str | os.PathLike[str]) -> LatentFolder:
    """Opens the output of `ear-vae encode-dataset` for reading.

    Args:
        folder: Its folder, in any format; the tars alone of one in the webdataset format will do.

    Raises:
        EarVAEError: There is no such folder, no latents in it, or it is not complete or has lost files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise EarVAEError(f"{folder}: is no folder; give the output of ear-vae encode-dataset")
    _require_complete(folder)
    noted = {receipt.stem: _items_noted(receipt) for receipt in receipts(folder)}
    latents: LatentFolder
    if any(folder.glob("*.tar")):
        latents = _Tars(folder, noted)
    else:
        latents = _Arrays(folder) if (folder / FILELIST_FILE).exists() else _LatentFiles(folder)
    expected = sum(noted.values()) if (folder / PLAN_FILE).exists() else 0
    if missing := max(0, expected - len(latents)):
        # As by a copy that was cut short.
        raise EarVAEError(
            f"{folder}: {missing} of {expected} items are missing, whose files were there once; copy the "
            "folder again, or run ear-vae encode-dataset again, which makes them anew"
        )
    return latents


def receipts(folder: Path) -> list[Path]:
    """Lists the receipts of the finished shards of a folder, in the order of the shards."""
    return sorted((folder / RECEIPTS_FOLDER).glob("[0-9]*.json"))


def read_receipt(path: Path) -> dict[str, Any]:
    """Reads what is noted of a finished shard.

    Raises:
        EarVAEError: The file is damaged.
    """
    try:
        return _json(path.read_bytes(), str(path))
    except OSError as error:
        raise _damaged(str(path), error) from error


def _require_complete(folder: Path) -> None:
    """Refuses a folder whose plan has shards that are not there yet.

    Raises:
        EarVAEError: It is not complete.
    """
    path = folder / PLAN_FILE
    if not path.exists():
        return
    last = _json(_last_line(path), str(path))
    # The shards are numbered in the order of the plan; the first line, which has no number, is its header.
    planned = (integer(last.get("shard", -1)) or 0) + 1
    finished = len(receipts(folder))
    if finished < planned:
        raise EarVAEError(
            f"{folder}: {planned - finished} of {planned} shards are not finished; run ear-vae "
            "encode-dataset again, it goes on where it stopped"
        )


def _items_noted(receipt: Path) -> int:
    """Reads how many items a finished shard has."""
    count = integer(read_receipt(receipt).get("items"))
    if count is None or count < 0:
        raise EarVAEError(f"{receipt}: does not say how many items the shard has")
    return count


def _last_line(path: Path) -> bytes:
    """Reads the last line of a file that may have millions."""
    size, length = path.stat().st_size, 2**16
    with path.open("rb") as file:
        while True:
            file.seek(max(0, size - length))
            lines = file.read().rstrip(b"\n").split(b"\n")
            if len(lines) > 1 or length >= size:
                return lines[-1]
            length *= 2


def _members(path: Path) -> np.ndarray:
    """Lists the members of the complete items of a tar, in its order; what else is in it does not count."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                key, _, ending = name.partition(".")
                if member.isfile() and ending in _MEMBERS:
                    found.setdefault(f"{folder}/{key}", {})[ending] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _damaged(str(path), error) from error
    complete = [[members[ending] for ending in _MEMBERS] for members in found.values() if len(members) == 3]
    return np.array(complete, dtype=np.int64).reshape(-1, len(_MEMBERS), 2)


def _content(span: _Span, where: str) -> bytes:
    try:
        with span.path.open("rb") as file:
            file.seek(span.offset)
            return file.read(span.size)
    except OSError as error:
        raise _damaged(where, error) from error


def _frames(span: _Span, where: str, start: int, end: int) -> Tensor:
    """Reads frames of an array [D, N], of which the rest is not touched, in float32."""
    try:
        with span.path.open("rb") as file:
            file.seek(span.offset)
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"version {version} of the format, expected (1, 0)")
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(
                file, max_header_size=_LONGEST_NPY_HEADER
            )
            offset = file.tell()
        if dtype.kind != "f" or len(shape) != 2:
            raise ValueError(f"an array of {dtype} {list(shape)}, expected floating point and [D, N]")
        if offset - span.offset + dtype.itemsize * shape[0] * shape[1] != span.size:
            raise ValueError("it is truncated")
        order = "F" if fortran_order else "C"
        array = np.memmap(span.path, dtype, "r", offset, shape, order)  # type: ignore[call-overload]
        return torch.from_numpy(array[:, start:end].astype(np.float32))
    except (OSError, ValueError) as error:
        raise _damaged(where, error) from error


def _described(values: Any, where: str) -> dict[str, Any]:
    """Returns the attributes of an item from its JSON.

    Raises:
        EarVAEError: It is damaged, or of another program.
    """
    own = values.get(OWN_FACTS) if isinstance(values, dict) else None
    if not isinstance(own, dict):
        raise EarVAEError(f"{where}: was not written by ear-vae encode-dataset: it has no {OWN_FACTS!r}")
    names = ["num_frames", "latent_dim", "downsampling_ratio", "start_sample", "source_num_samples"]
    numbers = {name: integer(own.get(name)) for name in names}
    lowest = {"start_sample": 0}
    bad = [name for name, number in numbers.items() if number is None or number < lowest.get(name, 1)]
    bad += [name for name in ("key", "weights_sha256") if not isinstance(own.get(name), str)]
    # Columns whose names were taken.
    renamed = own.get("columns", {})
    bad += [] if isinstance(renamed, dict) else ["columns"]
    if bad:
        raise EarVAEError(f"{where}: damaged: its {bad[0]} is {shown(own.get(bad[0]))}")
    sample_rate = sample_rate_of(values.get("sample_rate"), f"{where}: sample_rate")
    source_rate = sample_rate_of(own.get("source_sample_rate"), f"{where}: source_sample_rate")
    return {
        "where": where,
        "key": own["key"],
        "metadata": {name: value for name, value in values.items() if name not in _PLACE} | renamed,
        "num_frames": numbers["num_frames"],
        "latent_dim": numbers["latent_dim"],
        "sample_rate": sample_rate,
        "downsampling_ratio": numbers["downsampling_ratio"],
        "seconds_start": (numbers["start_sample"] or 0) / sample_rate,
        "seconds_total": (numbers["source_num_samples"] or 0) / source_rate,
        "weights_sha256": own["weights_sha256"],
    }


def _json(content: bytes, where: str) -> dict[str, Any]:
    try:
        values = parse_json(content)
    except ValueError as error:
        raise _damaged(where, error) from error
    if not isinstance(values, dict):
        raise EarVAEError(f"{where}: damaged: expected an object, got {shown(values)}")
    return values


def _damaged(where: str, error: Exception) -> EarVAEError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return EarVAEError(f"{where}: cannot be read: {reason}; run ear-vae encode-dataset again")
