"""Loading models as the options say: from where, on which device, in which dtype."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ear_vae.cli.terminal import say
from ear_vae.errors import EarVAEError, in_one_line
from ear_vae.inference.precision import cast_if_better
from ear_vae.pretrained.bundled import bundled_checkpoints
from ear_vae.vae import EarVAE

AUTO = "auto"


def load_model(options: argparse.Namespace) -> EarVAE:
    """Loads the model of `--model`, and prepares it as the options say.

    Raises:
        EarVAEError: There is no such model or device, or too little memory.
    """
    device = device_of(options.device)
    vae = pretrained(options.model, options)
    try:
        if options.dtype != AUTO:
            vae.cast(getattr(torch, options.dtype))
        vae.to(device)
        if options.dtype == AUTO:
            chosen = cast_if_better(vae)
            if not options.quiet:
                name = str(chosen.dtype).removeprefix("torch.")
                say(f"ear-vae: {vae.name} computes in {name}: {chosen.reason}")
    except RuntimeError as error:  # a full or broken device
        raise EarVAEError(f"cannot put {vae.name} on {device}: {in_one_line(error)}") from error
    if options.optimize:
        # In the mode in which it will run.
        with torch.inference_mode():
            vae.optimize_for_inference()
    return vae


def pretrained(name: str, options: argparse.Namespace) -> EarVAE:
    """Calls `EarVAE.from_pretrained` with the options about where a model comes from."""
    require_downloadable([name], options)
    return EarVAE.from_pretrained(
        name,
        config=options.config,
        variant=options.variant,
        revision=options.revision,
        force_download=options.force_download,
    )


def require_downloadable(names: Sequence[str], options: argparse.Namespace) -> None:
    """Refuses `--force-download` where no model comes from the Hub."""
    if options.force_download and all(
        Path(name).expanduser().exists() or name in bundled_checkpoints() for name in names
    ):
        options.refuse(f"--force-download is for models on the Hub; {', '.join(names)} is local")


def device_of(name: str) -> torch.device:
    """Returns the device with a name.

    Raises:
        EarVAEError: There is no such device.
    """
    kind, _, index = name.partition(":")
    available = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if kind not in available or not (index.isdecimal() or name == kind):
        meant = "; for an NVIDIA or AMD GPU write cuda" if kind == "gpu" else ""
        raise EarVAEError(f"no device {name!r}; choose cpu, cuda, cuda:N or mps{meant}")
    if int(index or 0) >= available[kind]:
        here = ", ".join(kind for kind, count in available.items() if count)
        raise EarVAEError(
            f"device {name!r} is not available here; this machine and this torch have: {here} "
            "(ear-vae env shows why)"
        )
    return torch.device(name)


def fingerprints() -> Callable[[EarVAE], str]:
    """Returns `EarVAE.weights_sha256` with a cache: nothing changes the weights while a command runs."""
    return functools.cache(lambda vae: vae.weights_sha256)
