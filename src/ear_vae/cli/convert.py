"""The command `ear-vae convert`."""

from __future__ import annotations

import argparse
import shlex
from typing import Literal

import torch

from ear_vae.cli.terminal import say
from ear_vae.errors import EarVAEError
from ear_vae.pretrained import convert
from ear_vae.pretrained.conversion import OFFICIAL_WEIGHTS_SUFFIX


def run_convert(options: argparse.Namespace) -> int:
    """Converts a model from one layout to another."""
    is_file = options.destination.lower().endswith(OFFICIAL_WEIGHTS_SUFFIX)
    layout: Literal["folder", "official"] = options.to or ("official" if is_file else "folder")
    if layout == "official" and options.dtype != "float32":
        raise EarVAEError("--dtype is for --to folder; in the official layout weights are always float32")
    written = convert(
        options.source,
        options.destination,
        to=layout,
        variant=options.variant,
        revision=options.revision,
        dtype=getattr(torch, options.dtype),
        overwrite=options.force,
    )
    size = sum(path.stat().st_size for path in ([written] if written.is_file() else written.rglob("*")))
    use = f"; use it with --model {shlex.quote(str(written))}" if written.is_dir() else ""
    say(f"{written}: {options.source} in the {layout} layout, {size / 1e6:.1f} MB{use}")
    return 0
