"""The command `ear-vae convert`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import torch

from ear_vae._atomic import same_file
from ear_vae.cli.terminal import say
from ear_vae.errors import EarVAEError
from ear_vae.pretrained.convert import OFFICIAL_WEIGHTS_SUFFIX, convert_to_folder, convert_to_official


def run(options: argparse.Namespace) -> int:
    """A model from one layout to another."""
    common = {"variant": options.variant, "revision": options.revision, "overwrite": options.force}
    _require_elsewhere(options.source, options.destination)
    is_official_file = Path(options.destination).suffix.lower() == OFFICIAL_WEIGHTS_SUFFIX
    layout = options.to or ("official" if is_official_file else "folder")
    written = Path(options.destination)
    if layout == "folder":
        dtype = getattr(torch, options.dtype)
        convert_to_folder(options.source, options.destination, dtype=dtype, **common)
    elif options.dtype == "float32":
        convert_to_official(options.source, options.destination, **common)
    else:
        raise EarVAEError("--dtype is for --to folder; in the official layout weights are always float32")
    size = sum(path.stat().st_size for path in ([written] if written.is_file() else written.rglob("*")))
    use = f"; use it with --model {shlex.quote(str(written))}" if written.is_dir() else ""
    say(f"{written}: {options.source} in the {layout} layout, {size / 1e6:.1f} MB{use}")
    return 0


def _require_elsewhere(source: str, destination: str) -> None:
    """Refuses to convert a model over itself."""
    inside = Path(source).is_dir() and Path(destination).resolve().is_relative_to(Path(source).resolve())
    if same_file(source, destination) or (inside and Path(destination).exists()):
        raise EarVAEError(
            f"{destination}: would replace the model that is to be converted; choose another place"
        )
