"""The command `ear-vae info`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ear_vae.audio import AUDIO_EXTENSIONS, audio_info
from ear_vae.cli.files import LATENT_EXTENSION
from ear_vae.cli.models import pretrained
from ear_vae.cli.terminal import put_facts
from ear_vae.errors import EarVAEError
from ear_vae.latents import is_latent_file, load_latents

_LONGEST_FACT = 120


def run(options: argparse.Namespace) -> int:
    """Facts about a model, a latent file or an audio file, on standard output."""
    path = Path(options.thing)
    given = [name for name in ("variant", "revision", "force_download") if getattr(options, name)]
    if path.is_file() and given:
        options.refuse(f"--{given[0].replace('_', '-')} is for models; {options.thing} is a file")
    facts = _file_facts(path) if path.is_file() else _model_facts(path, options)
    put_facts(facts, as_json=options.json, longest=_LONGEST_FACT)
    return 0


def _file_facts(path: Path) -> dict[str, Any]:
    if not is_latent_file(path) and path.suffix.lower() != f".{LATENT_EXTENSION}":
        audio = audio_info(path)
        return {"kind": "audio", **vars(audio), "duration_seconds": audio.duration_seconds}
    latents = load_latents(path)
    names = ["model_name", "weights_sha256", "sample_rate", "downsampling_ratio", "num_samples"]
    names += ["audio_channels", "source_sample_rate", "source_num_samples", "sampled"]
    return {
        "kind": "latents",
        "shape": list(latents.mean.shape),
        "std": latents.std is not None,
        **{name: getattr(latents, name) for name in names},
        "latent_rate": latents.latent_rate,
        "duration_seconds": latents.duration_seconds,
    }


def _model_facts(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    if not path.exists() and path.suffix.lower() in {*AUDIO_EXTENSIONS, f".{LATENT_EXTENSION}"}:
        raise EarVAEError(f"{path}: no such file")
    vae = pretrained(options.thing, options)
    return {
        "kind": "model",
        "name": vae.name,
        "weights_sha256": vae.weights_sha256,
        "parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "latent_rate": vae.latent_rate,
        "downsampling_ratio": vae.downsampling_ratio,
        **vae.config.to_dict(),
    }
