"""Reading and writing latent files: safetensors files with all it takes to decode them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from ear_vae._atomic import atomic_path, name_of, write_all
from ear_vae._dtype import STORED_DTYPES
from ear_vae.errors import EarVAEError, in_one_line
from ear_vae.latents.raw import matrix
from ear_vae.limits import (
    HIGHEST_DOWNSAMPLING_RATIO,
    integer,
    name_in_a_line,
    pack_facts,
    parse_json,
    sample_rate_of,
    shown,
    unpack_facts,
)

FORMAT = "ear-vae-latents"
FORMAT_VERSION = 1
_INTEGERS = (
    "sample_rate",
    "downsampling_ratio",
    "num_samples",
    "audio_channels",
    "source_sample_rate",
    "source_num_samples",
)


class LatentModel(Protocol):
    """What latents need to know about the model that they belong to."""

    name: str

    @property
    def sample_rate(self) -> int:
        """Rate of the audio in Hz."""
        ...

    @property
    def downsampling_ratio(self) -> int:
        """Samples per latent frame."""
        ...

    @property
    def latent_dim(self) -> int:
        """Channels D of the latents."""
        ...

    @property
    def audio_channels(self) -> int:
        """Channels C of the audio."""
        ...

    @property
    def weights_sha256(self) -> str:
        """Fingerprint of the weights."""
        ...


@dataclass(frozen=True)
class Latents:
    """Latents of one piece of audio, with all it takes to decode them.

    Attributes:
        mean: Means of the posterior, or one draw from it where `sampled` is true; [D, N], floating point.
        std: Standard deviations of the posterior, [D, N], or None.
        sample_rate: Sample rate of the model that made them, 1 000 to 768 000 Hz.
        downsampling_ratio: Samples per latent frame, at most 65 536.
        num_samples: Length at `sample_rate` in samples, without padding; N is this over `downsampling_ratio`,
            rounded up.
        audio_channels: Channels of the source, 1 or 2.
        source_sample_rate: Sample rate of the source, 1 000 to 768 000 Hz.
        source_num_samples: Length of the source in samples at its own rate.
        model_name: Name of the model that made them; a file keeps one line of 100 characters of it.
        weights_sha256: Fingerprint of its weights.
        sampled: Whether `mean` holds a draw from the posterior.
        metadata: Whatever else is to be kept of it, such as a title, JSON-ready; None for nothing.
    """

    mean: Tensor
    std: Tensor | None
    sample_rate: int
    downsampling_ratio: int
    num_samples: int
    audio_channels: int
    source_sample_rate: int
    source_num_samples: int
    model_name: str
    weights_sha256: str
    sampled: bool = False
    metadata: Mapping[str, Any] | None = None

    @classmethod
    def from_mean(
        cls, mean: Tensor | np.ndarray, vae: LatentModel, *, num_samples: int | None = None
    ) -> Latents:
        """Wraps latents that another program computed with this model, to be saved, or decoded with it.

        Args:
            mean: [D, N] or [1, D, N], floating point.
            vae: The model whose latents they are, an `EarVAE` or an `EarVAEOnnx`.
            num_samples: Length of the audio in samples at the model's rate, without padding; by default that
                of all frames.

        Raises:
            EarVAEError: They are no array of that shape, have another number of channels than the model, or
                a number of frames that does not fit `num_samples`.
        """
        tensor = matrix(mean if isinstance(mean, Tensor) else torch.as_tensor(np.asarray(mean)), "latents")
        channels, frames = tensor.shape
        if channels != vae.latent_dim:
            cure = "; they have time first: give them transposed" if frames == vae.latent_dim else ""
            raise EarVAEError(
                f"latents have shape {list(tensor.shape)}; '{vae.name}' has [{vae.latent_dim}, N]{cure}"
            )
        length = frames * vae.downsampling_ratio if num_samples is None else num_samples
        latents = cls(
            mean=tensor,
            std=None,
            sample_rate=vae.sample_rate,
            downsampling_ratio=vae.downsampling_ratio,
            num_samples=length,
            audio_channels=vae.audio_channels,
            source_sample_rate=vae.sample_rate,
            source_num_samples=length,
            model_name=vae.name,
            weights_sha256=vae.weights_sha256,
        )
        _require_valid(latents, "latents")
        return latents

    @property
    def latent_rate(self) -> float:
        """Latent frames per second."""
        return self.sample_rate / self.downsampling_ratio

    @property
    def duration_seconds(self) -> float:
        """Length of the audio in seconds."""
        return self.num_samples / self.sample_rate


def save_latents(
    destination: str | os.PathLike[str] | IO[bytes], latents: Latents, *, overwrite: bool = False
) -> None:
    """Writes a latent file; it appears complete or not at all.

    Args:
        destination: Path or open binary file.
        latents: Latents to write; the tensors keep their dtype.
        overwrite: Replace an existing file.

    Raises:
        EarVAEError: The latents are inconsistent, or the destination exists or cannot be written.
    """
    name = name_of(destination)
    _require_valid(latents, name)
    facts: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **{key: integer(getattr(latents, key)) for key in _INTEGERS},
        "model_name": name_in_a_line(latents.model_name),
        "weights_sha256": latents.weights_sha256,
        "sampled": bool(latents.sampled),
    }
    if latents.metadata is not None:
        facts["metadata"] = dict(latents.metadata)
    tensors = {"mean": latents.mean.detach().cpu().contiguous()}
    if latents.std is not None:
        tensors["std"] = latents.std.detach().cpu().contiguous()
    metadata = pack_facts(facts)
    try:
        if isinstance(destination, (str, os.PathLike)):
            with atomic_path(destination, overwrite) as temporary:
                # Straight from the tensors: hours of latents are not copied to be written.
                save_file(tensors, temporary, metadata)
        else:
            write_all(destination, save(tensors, metadata))
    except SafetensorError as error:
        raise EarVAEError(f"{name}: could not be written: {in_one_line(error)}") from error
    except OSError as error:
        raise EarVAEError(f"{name}: could not be written: {error.strerror or error}") from error


def load_latents(source: str | os.PathLike[str] | IO[bytes]) -> Latents:
    """Reads a latent file.

    Args:
        source: Path or open binary file.

    Raises:
        EarVAEError: The file is missing, a folder, empty, truncated, no latent file, of another format
            version, or its content is inconsistent or not finite.
    """
    name = name_of(source)
    tensors, facts = _read(source, name)
    if facts.get("format") != FORMAT:
        raise EarVAEError(f"{name}: is a safetensors file, but not a latent file of ear-vae")
    version = facts.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise EarVAEError(
            f"{name}: latent format version {shown(version)}, this ear-vae reads {FORMAT_VERSION}; "
            "update ear-vae"
        )
    missing = [k for k in (*_INTEGERS, "model_name", "weights_sha256", "sampled") if k not in facts]
    if missing or "mean" not in tensors or set(tensors) - {"mean", "std"}:
        raise EarVAEError(
            f"{name}: damaged latent file: missing metadata {missing}, tensors {shown(sorted(tensors))} "
            "(expected mean, std)"
        )
    kinds = {**dict.fromkeys(_INTEGERS, int), "model_name": str, "weights_sha256": str, "sampled": bool}
    for key, kind in kinds.items():
        if type(facts[key]) is not kind:
            raise EarVAEError(
                f"{name}: damaged latent file: unreadable metadata ({key} is {shown(facts[key])})"
            )
    if not isinstance(facts.get("metadata", {}), dict):
        raise EarVAEError(f"{name}: damaged latent file: metadata is {shown(facts['metadata'])}")
    latents = Latents(
        mean=tensors["mean"],
        std=tensors.get("std"),
        **{key: facts[key] for key in (*_INTEGERS, "weights_sha256", "sampled")},
        model_name=name_in_a_line(facts["model_name"]),
        metadata=facts.get("metadata"),
    )
    _require_valid(latents, name)
    return latents


def is_latent_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a safetensors file that is marked as a latent file."""
    try:
        with safe_open(Path(path), framework="pt") as file:
            return unpack_facts(file.metadata()).get("format") == FORMAT
    except (OSError, SafetensorError, ValueError):
        return False


def _read(source: str | os.PathLike[str] | IO[bytes], name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        if isinstance(source, (str, os.PathLike)):
            path = Path(source)
            if path.is_dir():
                raise EarVAEError(f"{name}: is a folder, expected a latent file")
            if path.stat().st_size == 0:
                raise EarVAEError(f"{name}: is empty (0 bytes)")
            with safe_open(path, framework="pt") as file:
                facts = unpack_facts(file.metadata())
                return {key: file.get_tensor(key) for key in file.keys()}, facts  # noqa: SIM118 - not a mapping
        data = source.read()
        return load(data), unpack_facts(_header_metadata(data))
    except FileNotFoundError:
        raise EarVAEError(f"{name}: no such file") from None
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        # The last two from dtypes that this torch has not.
        raise EarVAEError(f"{name}: not a readable latent file, perhaps truncated: {error}") from error


def _header_metadata(data: bytes) -> dict[str, str]:
    """Returns the metadata of safetensors bytes, which `safetensors.torch.load` has accepted but drops."""
    length = int.from_bytes(data[:8], "little")
    return dict(parse_json(data[8 : 8 + length]).get("__metadata__") or {})


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite in float32, which they are decoded in."""
    # Row by row: of all at once the check would need three times the memory of the tensor.
    return all(bool(torch.isfinite(row.float()).all()) for row in tensor)


def _require_valid(latents: Latents, name: str) -> None:
    mean, std = latents.mean, latents.std
    for key in ("model_name", "weights_sha256"):
        if not isinstance(getattr(latents, key), str):
            raise EarVAEError(f"{name}: {key} must be text, got {shown(getattr(latents, key))}")
    if latents.metadata is not None:
        try:
            json.dumps(dict(latents.metadata))
        except (TypeError, ValueError) as error:
            raise EarVAEError(f"{name}: metadata must be JSON-ready: {error}") from error
    for key, tensor in (("mean", mean), ("std", std)):
        if tensor is not None and (
            not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta
        ):
            raise EarVAEError(f"{name}: {key} must be a dense tensor that holds values")
        if tensor is not None and tensor.dtype not in STORED_DTYPES:
            raise EarVAEError(
                f"{name}: {key} is {tensor.dtype}; expected float32, float64, float16 or bfloat16"
            )
    if mean.ndim != 2:
        raise EarVAEError(f"{name}: mean must be [D, N], got {list(mean.shape)}")
    if std is not None and std.shape != mean.shape:
        raise EarVAEError(f"{name}: std must be {list(mean.shape)} as the mean is, got {list(std.shape)}")
    for key in ("sample_rate", "source_sample_rate"):
        sample_rate_of(getattr(latents, key), f"{name}: {key}")
    highest = {"downsampling_ratio": HIGHEST_DOWNSAMPLING_RATIO, "audio_channels": 2}
    for key in ("downsampling_ratio", "audio_channels", "num_samples", "source_num_samples"):
        number = integer(getattr(latents, key))
        if number is None or not 1 <= number <= highest.get(key, 2**63):
            raise EarVAEError(f"{name}: {key} is out of range: {shown(getattr(latents, key))}")
    if not re.fullmatch("[0-9a-f]{64}", latents.weights_sha256):
        raise EarVAEError(f"{name}: weights_sha256 is no fingerprint: {shown(latents.weights_sha256)}")
    num_frames = -(-latents.num_samples // latents.downsampling_ratio)
    if num_frames != mean.shape[1]:
        raise EarVAEError(
            f"{name}: {latents.num_samples} samples at {latents.downsampling_ratio} per frame are "
            f"{num_frames} frames, the file holds {mean.shape[1]}"
        )
    longest = -(-latents.num_samples * latents.source_sample_rate // latents.sample_rate)
    if latents.source_num_samples > longest:
        raise EarVAEError(
            f"{name}: damaged latent file: {latents.source_num_samples} samples at "
            f"{latents.source_sample_rate} Hz promised, {longest} there"
        )
    for key, tensor in (("mean", mean), ("std", std)):
        if tensor is not None and not _is_finite(tensor):
            raise EarVAEError(f"{name}: {key} holds NaN or infinity, or more than float32 does")
    if std is not None and bool((std < 0).any()):
        raise EarVAEError(f"{name}: std holds negative values")
