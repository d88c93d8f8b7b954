"""The command `ear-vae convert`."""

from __future__ import annotations

import argparse
import shlex

import torch

from ear_vae.cli.terminal import say
from ear_vae.pretrained import convert


def run(options: argparse.Namespace) -> int:
    """A model from one layout to another."""
    written = convert(
        options.source,
        options.destination,
        to=options.to,
        variant=options.variant,
        revision=options.revision,
        dtype=getattr(torch, options.dtype),
        overwrite=options.force,
    )
    size = sum(path.stat().st_size for path in ([written] if written.is_file() else written.rglob("*")))
    use = f"; use it with --model {shlex.quote(str(written))}" if written.is_dir() else ""
    say(f"{written}: written, {size / 1e6:.1f} MB{use}")
    return 0
