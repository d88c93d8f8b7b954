"""Official repositories: choosing one of their models, and converting it once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from torch import Tensor

from ear_vae.config import EarVAEConfig
from ear_vae.errors import EarVAEError
from ear_vae.limits import read_json, sample_rate_of, shown
from ear_vae.pretrained.conversion_cache import converted_once, file_sha256
from ear_vae.pretrained.folder import CONFIG_FILE, expected_shapes, require_fit
from ear_vae.pretrained.layouts.official_state_dict import (
    from_official,
    official_config,
    read_official,
    transformer_fields,
)

VARIANTS_KEY = "variants"
_ENTRY_TYPES = {"config": str, "weights": str, "sample_rate": int, "downsampling_ratio": int}


@dataclass(frozen=True)
class VariantEntry:
    """Entry of one model in an official `config.json`.

    Attributes:
        name: Name of the variant.
        config: Path of its network config, relative to the repository and inside it.
        weights: Path of its weights, relative to the repository and inside it.
        sample_rate: Sample rate of its audio in Hz.
        downsampling_ratio: Samples per latent frame.
    """

    name: str
    config: str
    weights: str
    sample_rate: int
    downsampling_ratio: int


def choose_variant(values: Mapping[str, Any], variant: str | None, *, where: str) -> VariantEntry:
    """Returns the entry of a variant in an official `config.json`; a single variant needs no name.

    Args:
        values: Content of the parsed file.
        variant: Name of the variant; None for a single one.
        where: Name of the file in messages.

    Raises:
        EarVAEError: The variant is not named though there are several, or unknown, or its entry is
            incomplete, of wrong types, or leads out of the repository.
    """
    variants = values[VARIANTS_KEY]
    if not isinstance(variants, dict) or not variants:
        raise EarVAEError(
            f"{where}: {VARIANTS_KEY!r} must be an object with one entry per model, got {shown(variants)}"
        )
    choices = ", ".join(shown(name) for name in list(variants)[:20])
    if variant is None and len(variants) > 1:
        raise EarVAEError(
            f"{where}: holds several models; choose one of {choices}", argument="variant", value=...
        )
    name = next(iter(variants)) if variant is None else variant
    if name not in variants:
        raise EarVAEError(f"{where}: has no variant {shown(name)}; it has {choices}")
    entry = variants[name]
    if not isinstance(entry, dict):
        raise EarVAEError(
            f"{where}: variant {name!r} must be an object with {list(_ENTRY_TYPES)}, got {shown(entry)}"
        )
    for field, expected in _ENTRY_TYPES.items():
        if field not in entry:
            raise EarVAEError(f"{where}: variant {name!r} has no {field!r}; it needs {list(_ENTRY_TYPES)}")
        if not isinstance(entry[field], expected) or isinstance(entry[field], bool):
            kind = "a path" if expected is str else "an integer"
            raise EarVAEError(
                f"{where}: {field!r} of variant {name!r} must be {kind}, got {shown(entry[field])}"
            )
    sample_rate_of(entry["sample_rate"], f"{where}: 'sample_rate' of variant {name!r}")
    for field in ("config", "weights"):
        _require_inner_path(entry[field], where=f"{where}: {field!r} of variant {name!r}")
    return VariantEntry(name, **{field: entry[field] for field in _ENTRY_TYPES})


def _require_inner_path(path: str, *, where: str) -> None:
    """Refuses a path that could lead out of its folder on any operating system."""
    windows = PureWindowsPath(path)  # splits at both kinds of slashes and knows drives
    if not path or "\0" in path or "\\" in path or windows.drive or windows.root or ".." in windows.parts:
        raise EarVAEError(f"{where} must be a relative path inside the folder, with '/', got {shown(path)}")


def convert_variant(
    entry: VariantEntry, config_path: Path, weights_path: Path, *, weights_sha256: str, cache: Path
) -> tuple[Path, EarVAEConfig]:
    """Converts the model in official files to a folder in our layout, unless it was converted before.

    Args:
        entry: Entry of the variant in `config.json`.
        config_path: Path of the variant's network config.
        weights_path: Path of the variant's pickled state dict.
        weights_sha256: sha256 of the pickled state dict.
        cache: Folder in which converted folders are kept.

    Returns:
        The folder and its config.

    Raises:
        EarVAEError: A file is damaged, the parts contradict each other, or the cache is not writable.
    """
    folder = converted_once(
        f"{weights_sha256} {file_sha256(config_path)} {entry.sample_rate}",
        lambda: _read(entry, config_path, weights_path),
        name=entry.name,
        cache=cache,
    )
    config = EarVAEConfig.from_json(folder / CONFIG_FILE)
    if config.downsampling_ratio != entry.downsampling_ratio:
        raise EarVAEError(
            f"{config_path}: variant {entry.name!r} has a downsampling_ratio of {config.downsampling_ratio}, "
            f"config.json says {entry.downsampling_ratio}"
        )
    return folder, config


def _read(
    entry: VariantEntry, config_path: Path, weights_path: Path
) -> tuple[EarVAEConfig, dict[str, Tensor]]:
    values = read_json(config_path)
    state = read_official(weights_path)
    try:
        config = official_config(values, sample_rate=entry.sample_rate, **transformer_fields(state))
        if values.get("sample_rate", entry.sample_rate) != entry.sample_rate:
            raise EarVAEError(
                f"official config: sample_rate is {shown(values['sample_rate'])}, "
                f"config.json says {entry.sample_rate}"
            )
    except EarVAEError as error:
        raise EarVAEError(f"{config_path}: {error}") from error
    ours = from_official(weights_path, state, config)
    require_fit(weights_path, ours, expected_shapes(config, path=weights_path))
    return config, ours
