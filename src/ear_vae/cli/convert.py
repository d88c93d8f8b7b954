"""The command `ear-vae convert`."""

from __future__ import annotations

import argparse

import torch

from ear_vae.pretrained import convert


def run(options: argparse.Namespace) -> int:
    """A model from one layout to another."""
    convert(
        options.source,
        options.destination,
        to=options.to,
        variant=options.variant,
        revision=options.revision,
        dtype=getattr(torch, options.dtype),
        overwrite=options.force,
    )
    return 0
