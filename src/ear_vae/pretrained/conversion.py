"""Converting models between this package's layout and the official one."""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ear_vae._atomic import atomic_folder, atomic_path, require_free_folder, same_file
from ear_vae.config import ConfigSource, EarVAEConfig
from ear_vae.errors import EarVAEError
from ear_vae.limits import shown
from ear_vae.pretrained.folder import CARD_FILE, CONFIG_FILE, read_folder, write_folder
from ear_vae.pretrained.layouts.official_repository import VARIANTS_KEY
from ear_vae.pretrained.layouts.official_state_dict import to_official, to_official_config
from ear_vae.pretrained.resolve import resolve

OFFICIAL_WEIGHTS_SUFFIX = ".pyt"


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: Literal["folder", "official"] | None = None,
    config: ConfigSource | None = None,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a model in this package's layout or in the official one.

    Args:
        source: Model to convert: whatever `EarVAE.from_pretrained` loads.
        destination: Folder to write, whose parents are made; or a path that ends in `.pyt`, for the pickled
            state dict of the official layout alone.
        to: Layout to write. `folder` is this package's, with the model named after the folder; `official` is
            that of the published weights: `config.json`, `config/NAME.json` and `pretrained_weight/NAME.pyt`,
            which `EarVAE.from_pretrained` reads too. By default `official` for a path that ends in `.pyt`,
            else `folder`.
        config: Config of a bare file of weights, as for `EarVAE.from_pretrained`.
        variant: Which model of a repository that holds several.
        revision: Branch, tag or commit on the Hub.
        cache_dir: Folder for downloads and conversions instead of the Hub's usual one.
        dtype: Dtype to store the weights in, for the layout `folder` only; float32 by default. With float16
            the file is half as large, and loads as float32.
        overwrite: Replace what exists at the destination; in a folder that exists, its other files and its
            README.md stay.

    Returns:
        The destination.

    Raises:
        EarVAEError: There is no such model, the destination exists, cannot be written to or would replace
            the source; an unknown layout; a dtype that cannot hold the weights, or any for the official
            layout, which is float32.
    """
    if to not in (None, "folder", "official"):
        raise EarVAEError(f"to must be 'folder' or 'official', got {shown(to)}")
    destination = Path(destination)
    _require_elsewhere(Path(source), destination)
    is_official_file = destination.suffix.lower() == OFFICIAL_WEIGHTS_SUFFIX
    official = (to or ("official" if is_official_file else "folder")) == "official"
    if official and dtype not in (None, torch.float32):
        raise EarVAEError(f"official weights are float32: {dtype} is for our own folders only; leave it out")
    if not (official and is_official_file):
        require_free_folder(destination, overwrite=overwrite)
    checkpoint = resolve(source, config=config, variant=variant, revision=revision, cache_dir=cache_dir)
    architecture, state = read_folder(checkpoint.folder)
    if not official:
        with atomic_folder(destination, overwrite=overwrite, keep=(CARD_FILE,)) as folder:
            write_folder(folder, architecture, state, name=destination.resolve().name, dtype=dtype)
    elif is_official_file:
        _write_official_weights(state, architecture, destination, overwrite)
    else:
        _write_official_folder(state, architecture, destination, checkpoint.name, overwrite)
    return destination


def _write_official_folder(
    state: Mapping[str, Tensor], config: EarVAEConfig, destination: Path, model_name: str, overwrite: bool
) -> None:
    name = re.sub(r"[^\w.-]", "_", re.split("[:/]", model_name)[-1]).strip(".") or "model"
    config_name, weights_name = f"config/{name}.json", f"pretrained_weight/{name}{OFFICIAL_WEIGHTS_SUFFIX}"
    entry = {
        "config": config_name,
        "weights": weights_name,
        "sample_rate": config.sample_rate,
        "downsampling_ratio": config.downsampling_ratio,
    }
    with atomic_folder(destination, overwrite=overwrite) as folder:
        for relative in (config_name, weights_name):
            (folder / relative).parent.mkdir(exist_ok=True)
        _write_official_weights(state, config, folder / weights_name, overwrite=True)
        _write_json(to_official_config(config), folder / config_name)
        _write_json({VARIANTS_KEY: {name: entry}}, folder / CONFIG_FILE)


def _write_official_weights(
    state: Mapping[str, Tensor], config: EarVAEConfig, path: Path, overwrite: bool
) -> None:
    official = OrderedDict(
        # Cloned, because a view would be saved with its whole storage.
        (name, tensor.detach().to("cpu", torch.float32).clone())
        for name, tensor in to_official(state, config).items()
    )
    with atomic_path(path, overwrite) as temporary:
        try:
            # To an open file: of one that it opens itself, torch does not say what was wrong with it.
            with temporary.open("xb") as file:
                torch.save(official, file)
        except (OSError, RuntimeError) as error:
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            reason = getattr(cause, "strerror", None) or cause
            raise EarVAEError(f"{path}: cannot write the weights: {reason}") from error


def _write_json(values: Any, path: Path) -> None:
    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _require_elsewhere(source: Path, destination: Path) -> None:
    """Refuses to convert a model over itself."""
    inside = source.is_dir() and destination.resolve().is_relative_to(source.resolve())
    if same_file(source, destination) or (inside and destination.exists()):
        raise EarVAEError(f"{destination}: would replace the model that is to be converted; choose another")
