"""The command `ear-vae info`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open

from ear_vae.audio import AUDIO_EXTENSIONS, audio_info
from ear_vae.cli.jobs import LATENT_EXTENSION, LATENTS
from ear_vae.cli.models import pretrained
from ear_vae.cli.streams import content_of_pipe, is_pipe
from ear_vae.cli.terminal import put_facts
from ear_vae.errors import EarVAEError
from ear_vae.latents import is_latent_file, is_raw, load_latents, load_raw_latents
from ear_vae.pretrained.layouts.bare import WEIGHTS_SUFFIXES

_LONGEST_FACT = 120
_UNITS = {
    "sample_rate": "Hz",
    "source_sample_rate": "Hz",
    "num_samples": "samples per channel",
    "source_num_samples": "samples per channel",
    "duration_seconds": "s",
    "latent_rate": "frames per second",
    "downsampling_ratio": "samples per frame",
    "shape": "(channels, frames)",
    "latent_dim": "channels",
    "parameters": "weights",
    "transformer_depth": "layers",
}


def run_info(options: argparse.Namespace) -> int:
    """Prints facts about a model, latents or an audio file."""
    path = Path(options.subject)
    is_file = path.is_file() or is_pipe(options.subject)
    if not is_file or _holds_weights(path):
        facts = _model_facts(path, options)
    else:
        given = [n for n in ("config", "variant", "revision", "force_download") if getattr(options, n)]
        if given:
            options.refuse(f"--{given[0].replace('_', '-')} is for models; {options.subject} is a file")
        facts = _file_facts(options.subject)
    if not options.json:
        facts = {name: _with_unit(name, value) for name, value in facts.items()}
    put_facts(facts, as_json=options.json, longest=_LONGEST_FACT)
    return 0


def _holds_weights(path: Path) -> bool:
    """Whether a file is one of weights; some are called like files of latents, which are tried first."""
    if not path.is_file() or path.suffix.lower() not in WEIGHTS_SUFFIXES:
        return False
    if path.suffix.lower() not in LATENTS.extensions:
        return True
    try:
        load_raw_latents(path)
    except EarVAEError:
        return not is_latent_file(path) and _names_an_encoder(path)
    return False


def _names_an_encoder(path: Path) -> bool:
    """Whether a safetensors file has tensors of a network; of a pickle it is not told without unpickling."""
    if path.suffix.lower() != LATENT_EXTENSION:
        return True
    try:
        with safe_open(path, framework="pt") as file:
            return any("encoder." in name for name in file.keys())  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError):
        return False


def _with_unit(name: str, value: Any) -> Any:
    if value is None or name not in _UNITS:
        return value
    return f"{value:.6g} {_UNITS[name]}" if isinstance(value, float) else f"{value} {_UNITS[name]}"


def _file_facts(name: str) -> dict[str, Any]:
    source = content_of_pipe(name) if is_pipe(name) else name
    if is_raw(source):
        return _raw_facts(source)
    if not isinstance(source, str):
        return _latent_facts(source) if _is_safetensors(source.getvalue()) else _audio_facts(source)
    if is_latent_file(source) or Path(source).suffix.lower() == LATENT_EXTENSION:
        return _latent_facts(source)
    return _audio_facts(source)


def _is_safetensors(content: bytes) -> bool:
    """Whether bytes begin like a safetensors file: with the length of a header, and the header."""
    return content[8:9] == b"{" and int.from_bytes(content[:8], "little") <= len(content) - 8


def _audio_facts(source: str | IO[bytes]) -> dict[str, Any]:
    audio = audio_info(source)
    return {"kind": "audio", **vars(audio), "duration_seconds": audio.duration_seconds}


def _raw_facts(source: str | IO[bytes]) -> dict[str, Any]:
    latents = load_raw_latents(source)
    return {
        "kind": "raw latents",
        "shape": list(latents.shape),
        "dtype": str(latents.dtype).removeprefix("torch."),
    }


def _latent_facts(source: str | IO[bytes]) -> dict[str, Any]:
    latents = load_latents(source)
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
    if not path.exists() and path.suffix.lower() in {*AUDIO_EXTENSIONS, LATENT_EXTENSION}:
        raise EarVAEError(f"{path}: no such file")
    vae = pretrained(options.subject, options)
    return {
        "kind": "model",
        "name": vae.name,
        "weights_sha256": vae.weights_sha256,
        "parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "latent_rate": vae.latent_rate,
        "downsampling_ratio": vae.downsampling_ratio,
        **vae.config.to_dict(),
    }
