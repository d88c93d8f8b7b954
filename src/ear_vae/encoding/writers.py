"""The three formats of an output: what the files of a shard are called, and what is in them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ear_vae.encoding.plan import EncodingSettings
from ear_vae.encoding.reading import OWN_FACTS
from ear_vae.latents import Latents, save_latents

_HASHED_AT_ONCE = 2**20
# From this number of files on, one call that writes everything to disk is faster than one for each.
_MANY_FILES = 8


@dataclass(frozen=True)
class EncodedItem:
    """Latents to store, of a recording or of a part of it.

    Attributes:
        key: Its name in a webdataset, without dots and slashes.
        name: Its name among files, without an extension.
        mean: Means of the posterior, [D, N], in the dtype they are stored in.
        std: Standard deviations, likewise.
        values: What is said of it in JSON.
    """

    key: str
    name: str
    mean: Tensor
    std: Tensor
    values: Mapping[str, Any]

    @property
    def num_frames(self) -> int:
        """Frames without padding."""
        frames: int = self.values[OWN_FACTS]["num_frames"]
        return frames


class ShardWriter(ABC):
    """Writes the files of one shard into a folder of its own, from which they are moved into place.

    Args:
        folder: Folder for unfinished files.
        number: Number of the shard.
        settings: How the output is encoded.
    """

    def __init__(self, folder: Path, number: int, settings: EncodingSettings) -> None:
        self.folder, self.number, self.settings = folder, number, settings
        self.files: dict[str, Path] = {}

    @abstractmethod
    def add(self, item: EncodedItem) -> None:
        """Writes an item.

        Raises:
            OSError: It cannot be written.
        """

    def finish(self, output: Path) -> dict[str, dict[str, Any]]:
        """Moves all files into place.

        Args:
            output: Folder of the output.

        Returns:
            Size and hash of each file by its path in the output.

        Raises:
            OSError: They cannot be written.
        """
        self.close()
        facts = {name: _facts(path) for name, path in self.files.items()}
        write_to_disk(list(self.files.values()))
        for name, path in self.files.items():
            destination = output / name
            destination.parent.mkdir(parents=True, exist_ok=True)
            path.replace(destination)
        return facts

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """Ends what is open."""

    def put(self, name: str, content: bytes) -> None:
        """Writes a file that will be called so in the output."""
        path = self.folder / str(len(self.files))
        path.write_bytes(content)
        self.files[name] = path


class WebdatasetWriter(ShardWriter):
    """One tar, `000000.tar`, with the members KEY.json, KEY.npy (means) and KEY.std.npy of each item."""

    def __init__(self, folder: Path, number: int, settings: EncodingSettings) -> None:
        super().__init__(folder, number, settings)
        path = folder / "shard.tar"
        self.files[f"{number:06d}.tar"] = path
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, item: EncodedItem) -> None:
        """Adds the members of an item."""
        for ending, content in (
            ("json", _json(item.values)),
            ("npy", npy_bytes(item.mean)),
            ("std.npy", npy_bytes(item.std)),
        ):
            # No time, no owner: the same items are the same bytes.
            member = tarfile.TarInfo(f"{item.key}.{ending}")
            member.size, member.mode = len(content), 0o644
            self._tar.addfile(member, io.BytesIO(content))

    def close(self) -> None:
        """Ends the tar."""
        self._tar.close()


class StableAudioWriter(ShardWriter):
    """Files X.npy (means), X.std.npy and X.json, as stable-audio-tools and Stable Audio 3 read them."""

    def add(self, item: EncodedItem) -> None:
        """Writes the files of an item."""
        self.put(f"{item.name}.json", _json(item.values))
        self.put(f"{item.name}.npy", npy_bytes(item.mean))
        self.put(f"{item.name}.std.npy", npy_bytes(item.std))


class SafetensorsWriter(ShardWriter):
    """Latent files X.safetensors, as `ear-vae encode` writes them."""

    def add(self, item: EncodedItem) -> None:
        """Writes the file of an item."""
        own, settings = item.values[OWN_FACTS], self.settings
        longest = -(-own["num_samples"] * own["source_sample_rate"] // settings.sample_rate)
        start = own["start_sample"] * own["source_sample_rate"] // settings.sample_rate
        latents = Latents(
            mean=item.mean,
            std=item.std,
            sample_rate=settings.sample_rate,
            downsampling_ratio=settings.downsampling_ratio,
            num_samples=own["num_samples"],
            audio_channels=own["source_channels"],
            source_sample_rate=own["source_sample_rate"],
            # Of this item, which may be a part of the source.
            source_num_samples=max(1, min(longest, own["source_num_samples"] - start)),
            model_name=settings.model,
            weights_sha256=settings.weights_sha256,
            metadata=item.values,
        )
        content = io.BytesIO()
        save_latents(content, latents)
        self.put(f"{item.name}.safetensors", content.getvalue())


WRITERS: dict[str, type[ShardWriter]] = {
    "webdataset": WebdatasetWriter,
    "stable-audio": StableAudioWriter,
    "safetensors": SafetensorsWriter,
}


def write_to_disk(paths: list[Path]) -> None:
    """Has what was written to files survive a loss of power."""
    if len(paths) >= _MANY_FILES and hasattr(os, "sync"):
        os.sync()
        return
    for path in paths:
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _facts(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASHED_AT_ONCE):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _json(values: Mapping[str, Any]) -> bytes:
    # In ASCII, which takes names that are no UTF-8 too.
    return json.dumps(values).encode("ascii")


def npy_bytes(tensor: Tensor) -> bytes:
    """Returns the content of a `.npy` file."""
    content = io.BytesIO()
    np.save(content, tensor.contiguous().numpy())
    return content.getvalue()
