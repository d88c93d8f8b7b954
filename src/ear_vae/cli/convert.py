"""The command `ear-vae convert`."""

from __future__ import annotations

import argparse
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ear_vae.cli.terminal import say
from ear_vae.errors import EarVAEError
from ear_vae.pretrained import convert
from ear_vae.pretrained.conversion import OFFICIAL_WEIGHTS_SUFFIX
from ear_vae.vae import EarVAE

# What writes a model for a neighbour: module, which needs libraries of its own, and function.
_EXPORTS = {
    "onnx": ("ear_vae.integrations.export.onnx_export", "export_onnx"),
    "torch-export": ("ear_vae.integrations.export.torch_export", "export_programs"),
    "diffusers": ("ear_vae.integrations.diffusers", "export_diffusers"),
}
_DTYPES = {
    "folder": ("float32", "float16", "bfloat16"),
    "onnx": ("float32", "float16"),
}


def run_convert(options: argparse.Namespace) -> int:
    """Converts a model from one layout to another."""
    is_file = options.destination.lower().endswith(OFFICIAL_WEIGHTS_SUFFIX)
    layout: str = options.to or ("official" if is_file else "folder")
    if layout not in _DTYPES and options.dtype != "float32":
        raise EarVAEError(
            "--dtype is for --to folder and, float16 only, --to onnx; "
            f"in the {layout} layout weights are always float32"
        )
    if layout in _DTYPES and options.dtype not in _DTYPES[layout]:
        allowed = " or ".join(_DTYPES[layout])
        raise EarVAEError(f"--dtype {options.dtype} is not for --to {layout}; choose {allowed}")
    if layout in _EXPORTS:
        return _export(layout, options)
    written = convert(
        options.source,
        options.destination,
        to="official" if layout == "official" else "folder",
        config=options.config,
        variant=options.variant,
        revision=options.revision,
        dtype=getattr(torch, options.dtype),
        overwrite=options.force,
    )
    use = f"; use it with --model {shlex.quote(str(written))}" if written.is_dir() else ""
    say(f"{written}: {options.source} in the {layout} layout, {_megabytes(written)}{use}")
    return 0


def _export(layout: str, options: argparse.Namespace) -> int:
    module, function = _EXPORTS[layout]
    # Before a model is loaded: the libraries may be missing.
    export: Any = getattr(import_module(module), function)
    destination = Path(options.destination)
    vae = EarVAE.from_pretrained(
        options.source, config=options.config, variant=options.variant, revision=options.revision
    )
    dtype = {"dtype": getattr(torch, options.dtype)} if layout in _DTYPES else {}
    difference = export(vae, destination, overwrite=options.force, **dtype)
    checked = (
        "" if difference is None else f"; differs from the model by {difference:.1e} of the largest value"
    )
    say(f"{destination}: {options.source} for {layout}, {_megabytes(destination)}{checked}")
    return 0


def _megabytes(written: Path) -> str:
    size = sum(path.stat().st_size for path in ([written] if written.is_file() else written.rglob("*")))
    return f"{size / 1e6:.1f} MB"
