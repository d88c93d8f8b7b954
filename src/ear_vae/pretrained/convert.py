"""Writing a model out of the Hub's or the official layout, and into it."""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ear_vae._atomic import atomic_path, temporary_folder
from ear_vae.errors import EarVAEError
from ear_vae.pretrained.folder import CONFIG_FILE, save_pretrained
from ear_vae.pretrained.official import to_official, to_official_config
from ear_vae.pretrained.official_repository import VARIANTS_KEY
from ear_vae.vae import EarVAE

OFFICIAL_WEIGHTS_SUFFIX = ".pyt"


def convert_to_folder(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes any model that `resolve` finds as a folder in our layout, named after the folder.

    Args:
        source: As for `resolve`.
        destination: The folder; its parents are made.
        variant: As for `resolve`.
        revision: As for `resolve`.
        cache_dir: As for `resolve`.
        dtype: Dtype to store the weights in, float32 by default; float16 halves the file, and loads as
            float32.
        overwrite: Replace the model in a folder that exists; its other files, and its README.md, stay.

    Returns:
        The folder.

    Raises:
        EarVAEError: As for `resolve`, or the destination exists or cannot be written to.
    """
    destination = Path(destination)
    _require_free(destination, overwrite)
    vae = EarVAE.from_pretrained(source, variant=variant, revision=revision, cache_dir=cache_dir)
    vae.name = destination.resolve().name
    with _folder(destination) as folder:
        save_pretrained(vae, folder, dtype=dtype)
    return destination


def convert_to_official(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes any model that `resolve` finds in the official layout, for tools that read that one.

    Args:
        source: As for `resolve`.
        destination: A path that ends in `.pyt`, for the pickled state dict alone, or a folder, for
            `config.json`, `config/NAME.json` and `pretrained_weight/NAME.pyt`, which
            `from_pretrained` reads too.
        variant: As for `resolve`.
        revision: As for `resolve`.
        cache_dir: As for `resolve`.
        overwrite: Replace an existing file, or those files of an existing folder.

    Returns:
        The destination.

    Raises:
        EarVAEError: As for `resolve`, or the destination exists or cannot be written to.
    """
    destination = Path(destination)
    single_file = destination.suffix.lower() == OFFICIAL_WEIGHTS_SUFFIX
    if not single_file:
        _require_free(destination, overwrite)
    vae = EarVAE.from_pretrained(source, variant=variant, revision=revision, cache_dir=cache_dir)
    if single_file:
        _write_official_weights(vae, destination, overwrite)
        return destination
    name = re.sub(r"[^\w.-]", "_", re.split("[:/]", vae.name)[-1]).strip(".") or "model"
    config_name, weights_name = f"config/{name}.json", f"pretrained_weight/{name}{OFFICIAL_WEIGHTS_SUFFIX}"
    entry = {
        "config": config_name,
        "weights": weights_name,
        "sample_rate": vae.sample_rate,
        "downsampling_ratio": vae.downsampling_ratio,
    }
    with _folder(destination) as folder:
        for relative in (config_name, weights_name):
            (folder / relative).parent.mkdir(exist_ok=True)
        _write_official_weights(vae, folder / weights_name, overwrite=True)
        _write_json(to_official_config(vae.config), folder / config_name)
        _write_json({VARIANTS_KEY: {name: entry}}, folder / CONFIG_FILE)
    return destination


def _write_official_weights(vae: EarVAE, path: Path, overwrite: bool) -> None:
    state = OrderedDict(
        (
            name,
            tensor.detach().to("cpu", torch.float32).clone(),
        )  # cloned: a view would save its whole storage
        for name, tensor in to_official(vae.state_dict(), vae.config).items()
    )
    with atomic_path(path, overwrite) as temporary:
        try:
            torch.save(state, temporary)
        except (OSError, RuntimeError) as error:
            raise EarVAEError(f"{path}: cannot write the weights: {error}") from error


def _write_json(values: Any, path: Path) -> None:

    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _require_free(destination: Path, overwrite: bool) -> None:
    """Before any work: the destination is new, an empty folder, or a folder to overwrite."""
    if destination.exists() and not destination.is_dir():
        raise EarVAEError(f"{destination}: is a file, expected the path of a folder to write")
    if destination.is_dir() and not overwrite and any(destination.iterdir()):
        raise EarVAEError(f"{destination}: exists already; remove it, or overwrite it (overwrite=True)")


@contextmanager
def _folder(destination: Path) -> Iterator[Path]:
    """A folder to fill: `destination` itself if it exists, else one that becomes it when all went well."""
    try:
        if destination.is_dir():
            yield destination
            return
        destination.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(destination.parent) as temporary:
            folder = temporary / "new"  # of ordinary permissions, unlike the temporary one
            folder.mkdir()
            yield folder
            folder.rename(destination)
    except OSError as error:
        raise EarVAEError(f"{destination}: cannot be written: {error}") from error
