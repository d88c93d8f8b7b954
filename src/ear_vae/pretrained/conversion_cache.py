"""Models of other layouts in ours, converted once and kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ear_vae._atomic import atomic_path
from ear_vae.config import EarVAEConfig
from ear_vae.errors import EarVAEError
from ear_vae.pretrained.folder import CONFIG_FILE, WEIGHTS_FILE, write_folder

# Part of every key of the cache: raised when the conversion gives other tensors or another config.
_CONVERSION_VERSION = 2
_SUMS_FILE = "sha256.json"


def conversions_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    """Returns where conversions are kept: under `cache_dir`, else beside the Hub's own caches."""
    if cache_dir is None:
        # Imported here because it takes a second, which local folders do not need.
        from huggingface_hub import constants

        cache_dir = constants.HF_HOME
    return Path(os.path.expanduser(cache_dir)) / "ear-vae" / "conversions"


def converted_once(
    key: str, make: Callable[[], tuple[EarVAEConfig, dict[str, Tensor]]], *, name: str, cache: Path
) -> Path:
    """Makes a folder in our layout, unless it was made before.

    The folder's name is a digest of the key, so it never goes stale. Each file is put in place atomically and
    their checksums come last: several processes may convert the same model at once, and a folder that is
    incomplete or damaged is made again.

    Args:
        key: Text that differs for other files and for other ways to read them.
        make: Reads the model, as config and state dict.
        name: Name of the model in its card.
        cache: Where such folders are kept.

    Raises:
        EarVAEError: As `make`, or the cache cannot be written to.
    """
    folder = cache / hashlib.sha256(f"{_CONVERSION_VERSION} {key}".encode()).hexdigest()
    if _is_intact(folder):
        return folder
    config, state = make()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_folder(folder, config, state, name=name)
        sums = {name: file_sha256(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
        with atomic_path(folder / _SUMS_FILE, overwrite=True) as temporary:
            temporary.write_text(json.dumps(sums), encoding="utf-8")
    except (OSError, EarVAEError) as error:
        raise EarVAEError(
            f"{error}; converted weights are kept there: name a writable place in HF_HOME",
            argument="cache_dir",
            value=...,
        ) from error
    return folder


def file_sha256(path: Path) -> str:
    """Computes the sha256 of a file, in hexadecimal.

    Raises:
        EarVAEError: The file is missing or cannot be read.
    """
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    try:
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(buffer):
                digest.update(memoryview(buffer)[:size])
    except FileNotFoundError:
        raise EarVAEError(f"{path}: the file is missing") from None
    except OSError as error:
        raise EarVAEError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _is_intact(folder: Path) -> bool:
    try:
        sums = json.loads((folder / _SUMS_FILE).read_text(encoding="utf-8"))
        return bool(sums == {name: file_sha256(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)})
    except (OSError, ValueError, EarVAEError):
        return False
