"""Writing a model out of the Hub's or the official layout, and into it."""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ear_vae._atomic import atomic_path, same_file, temporary_folder
from ear_vae.config import EarVAEConfig
from ear_vae.errors import EarVAEError
from ear_vae.pretrained.folder import CONFIG_FILE, read_folder, write_folder
from ear_vae.pretrained.official_repository import VARIANTS_KEY
from ear_vae.pretrained.official_state_dict import to_official, to_official_config
from ear_vae.pretrained.resolve import resolve

OFFICIAL_WEIGHTS_SUFFIX = ".pyt"


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: Literal["folder", "official"] | None = None,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes any model that `resolve` finds in another layout.

    Args:
        source: A folder in our layout or in the official one, the name of a bundled checkpoint, or a Hub
            repository id `owner/name`.
        destination: The folder, or a path that ends in `.pyt` for official weights alone.
        to: `folder` for our layout, `official` for that of the published weights; by default our own, unless
            the destination ends in `.pyt`.
        variant: Which model of a repository that holds several.
        revision: Branch, tag or commit on the Hub.
        cache_dir: Where downloads and conversions are kept instead of the Hub's usual folder.
        dtype: Dtype to store the weights in, of our layout only; float32 by default.
        overwrite: Replace what exists at the destination.

    Returns:
        The destination.

    Raises:
        EarVAEError: There is no such model, the destination exists, cannot be written to or would replace
            the source, or a dtype is given for the official layout, which is float32.
    """
    _require_elsewhere(Path(source), Path(destination))
    is_official_file = Path(destination).suffix.lower() == OFFICIAL_WEIGHTS_SUFFIX
    origin: dict[str, Any] = {"variant": variant, "revision": revision, "cache_dir": cache_dir}
    if (to or ("official" if is_official_file else "folder")) == "folder":
        return convert_to_folder(source, destination, dtype=dtype, overwrite=overwrite, **origin)
    if dtype not in (None, torch.float32):
        raise EarVAEError(f"official weights are float32: {dtype} is for our own folders only; leave it out")
    return convert_to_official(source, destination, overwrite=overwrite, **origin)


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
    checkpoint = resolve(source, variant=variant, revision=revision, cache_dir=cache_dir)
    config, state = read_folder(checkpoint.folder)
    with _folder(destination) as folder:
        write_folder(folder, config, state, name=destination.resolve().name, dtype=dtype)
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
    checkpoint = resolve(source, variant=variant, revision=revision, cache_dir=cache_dir)
    config, state = read_folder(checkpoint.folder)
    if single_file:
        _write_official_weights(state, config, destination, overwrite)
        return destination
    name = re.sub(r"[^\w.-]", "_", re.split("[:/]", checkpoint.name)[-1]).strip(".") or "model"
    config_name, weights_name = f"config/{name}.json", f"pretrained_weight/{name}{OFFICIAL_WEIGHTS_SUFFIX}"
    entry = {
        "config": config_name,
        "weights": weights_name,
        "sample_rate": config.sample_rate,
        "downsampling_ratio": config.downsampling_ratio,
    }
    with _folder(destination) as folder:
        for relative in (config_name, weights_name):
            (folder / relative).parent.mkdir(exist_ok=True)
        _write_official_weights(state, config, folder / weights_name, overwrite=True)
        _write_json(to_official_config(config), folder / config_name)
        _write_json({VARIANTS_KEY: {name: entry}}, folder / CONFIG_FILE)
    return destination


def _write_official_weights(
    state: Mapping[str, Tensor], config: EarVAEConfig, path: Path, overwrite: bool
) -> None:
    official = OrderedDict(
        # Cloned: a view would save its whole storage.
        (name, tensor.detach().to("cpu", torch.float32).clone())
        for name, tensor in to_official(state, config).items()
    )
    with atomic_path(path, overwrite) as temporary:
        try:
            torch.save(official, temporary)
        except (OSError, RuntimeError) as error:
            raise EarVAEError(f"{path}: cannot write the weights: {error}") from error


def _write_json(values: Any, path: Path) -> None:
    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _require_elsewhere(source: Path, destination: Path) -> None:
    """Refuses to convert a model over itself."""
    inside = source.is_dir() and destination.resolve().is_relative_to(source.resolve())
    if same_file(source, destination) or (inside and destination.exists()):
        raise EarVAEError(f"{destination}: would replace the model that is to be converted; choose another")


def _require_free(destination: Path, overwrite: bool) -> None:
    """Before any work: the destination is new, an empty folder, or a folder to overwrite."""
    if destination.exists() and not destination.is_dir():
        raise EarVAEError(f"{destination}: is a file, expected the path of a folder to write")
    if destination.is_dir() and not overwrite and any(destination.iterdir()):
        raise EarVAEError(f"{destination}: exists already; remove it, or overwrite it", argument="overwrite")


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
