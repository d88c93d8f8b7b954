"""A model as programs of torch.export, which run without this package."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ear_vae._atomic import atomic_folder
from ear_vae.integrations.export.graphs import (
    exportable,
    exported,
    parts_of,
    quiet_exporters,
    require_equal,
)
from ear_vae.vae import EarVAE


def export_programs(vae: EarVAE, destination: str | os.PathLike[str], *, overwrite: bool = False) -> float:
    """Writes `encoder.pt2` and `decoder.pt2`, which `torch.export.load` reads.

    They take and give what the ONNX files of the same names do: audio [B, C, N * downsampling_ratio] to
    moments [B, 2 D, N] (mean ‖ scale before the softplus), and latents [B, D, N] to audio, for any batch and
    two or more frames, in float32.

    Args:
        vae: The model.
        destination: The folder; its parents are made.
        overwrite: Replace these files in a folder that exists.

    Returns:
        The largest difference from the model, relative to the largest value, of a run of each on noise.

    Raises:
        EarVAEError: The destination exists or cannot be written to, or a program does not give what the model
            does.
    """
    differences = []
    with atomic_folder(Path(destination), overwrite=overwrite) as written:
        for part in parts_of(exportable(vae)):
            if part.name not in ("encoder", "decoder"):
                continue
            path = written / f"{part.name}.pt2"
            with quiet_exporters():
                torch.export.save(exported(part), path)
                program = torch.export.load(path).module()
            differences.append(require_equal(part, program))
    return max(differences)
