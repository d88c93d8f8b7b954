"""Raw latents: arrays without a word about the model that made them, as other programs store them."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from ear_vae._atomic import name_of
from ear_vae._dtype import STORED_DTYPES
from ear_vae._torch_files import load_tensors
from ear_vae.errors import EarVAEError, first_line
from ear_vae.limits import parse_json, shortened, shown, unpack_facts

RAW_EXTENSIONS = (".npy", ".npz", ".pt")
"""What files of raw latents are called, in lower case; safetensors files may hold them too."""
# What the latents are called where a file holds several arrays.
_NAMES = ("latents", "latent", "mean", "z")
_NPY, _ZIP = b"\x93NUMPY", b"PK"
_LONGEST_REASON = 200


def load_raw_latents(source: str | os.PathLike[str] | IO[bytes], *, time_first: bool = False) -> Tensor:
    """Reads latents from a `.npy`, `.npz`, `.pt` or safetensors file, told apart by their content.

    Of several arrays in a file, the one called `latents`, `latent`, `mean` or `z` is taken.

    Args:
        source: Path or open binary file.
        time_first: Whether the array is [N, D] instead of [D, N].

    Returns:
        [D, N], in the file's dtype.

    Raises:
        EarVAEError: The file is missing, damaged, holds anything but numbers, several arrays of other names,
            a batch of more than one, or an array of another rank or dtype.
    """
    name = name_of(source)
    content = _read(source, name)
    array = _only_array(_parsed(content, name), name)
    if array.dtype not in STORED_DTYPES:
        raise EarVAEError(f"{name}: holds {array.dtype}; latents are float32, float64, float16 or bfloat16")
    return matrix(array.mT if time_first and array.ndim > 1 else array, name)


def is_raw(source: str | os.PathLike[str] | IO[bytes]) -> bool:
    """Whether a source is meant to hold raw latents: not a latent file of this package, nor a damaged one.

    Args:
        source: Path or open binary file, which is left at its start.
    """
    try:
        if isinstance(source, (str, os.PathLike)):
            if Path(source).suffix.lower() in RAW_EXTENSIONS:
                return True
            with open(source, "rb") as file:
                return _holds_raw(file)
        return _holds_raw(source)
    except (OSError, ValueError, AttributeError):
        return False


def _holds_raw(file: IO[bytes]) -> bool:
    start = file.read(9)
    file.seek(0)
    if start.startswith((_NPY, _ZIP)):
        return True
    if start[8:] != b"{":
        return False
    length = int.from_bytes(start[:8], "little")
    header = parse_json(file.read(8 + length)[8:])
    file.seek(0)
    return not unpack_facts(header.get("__metadata__"))


def matrix(latents: Tensor, name: str) -> Tensor:
    """Latents [D, N] or [1, D, N] as [D, N].

    Args:
        latents: The latents.
        name: What messages call them.

    Raises:
        EarVAEError: They are of another rank, a batch of several, or empty.
    """
    shape = list(latents.shape)
    if latents.ndim == 3 and shape[0] > 1:
        raise EarVAEError(f"{name}: holds a batch of {shape[0]}, shape {shape}; give each by itself, [D, N]")
    if latents.ndim not in (2, 3) or not latents.numel():
        raise EarVAEError(f"{name}: has shape {shape}; expected latents [D, N] or [1, D, N]")
    return latents.reshape(shape[-2:])


def _read(source: str | os.PathLike[str] | IO[bytes], name: str) -> bytes:
    try:
        if isinstance(source, (str, os.PathLike)):
            return Path(source).read_bytes()
        return source.read()
    except OSError as error:
        raise EarVAEError(f"{name}: cannot be read: {error.strerror or error}") from error


def _parsed(content: bytes, name: str) -> Any:
    """An array, or several by their names."""
    if not content:
        raise EarVAEError(f"{name}: is empty (0 bytes)")
    try:
        if content.startswith(_NPY):
            return np.load(io.BytesIO(content), allow_pickle=False)
        if content.startswith(_ZIP) and _is_npz(content):
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                return {key: arrays[key] for key in _called_latents(arrays.files)}
        if content[8:9] == b"{":
            return load(content)
        return load_tensors(io.BytesIO(content), name)
    except EarVAEError:
        raise
    # The libraries raise many kinds for what is damaged, and none executes anything.
    except Exception as error:
        reason = shortened(first_line(error), _LONGEST_REASON)
        raise EarVAEError(
            f"{name}: not a readable latent file, perhaps truncated or with more than numbers: {reason}"
        ) from error


def _called_latents(names: Sequence[str]) -> list[str]:
    """The name under which the latents are, or all names where none tells."""
    return next(([name] for name in _NAMES if name in names), list(names))


def _is_npz(content: bytes) -> bool:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return all(entry.endswith(".npy") for entry in archive.namelist())


def _only_array(found: Any, name: str) -> Tensor:
    if isinstance(found, Mapping):
        names = _called_latents([str(key) for key in found])
        if len(names) != 1:
            raise EarVAEError(
                f"{name}: holds {shown(sorted(names)) if names else 'nothing'}; expected latents alone, or "
                f"under one of {', '.join(_NAMES)}"
            )
        found = found.get(names[0])
    if isinstance(found, np.ndarray):
        try:
            found = torch.from_numpy(np.ascontiguousarray(found, found.dtype.newbyteorder("=")))
        except TypeError as error:
            raise EarVAEError(f"{name}: holds {found.dtype}, which are no numbers for latents") from error
    if not isinstance(found, Tensor) or found.layout != torch.strided:
        raise EarVAEError(f"{name}: holds a {type(found).__name__}; expected an array of numbers")
    return found
