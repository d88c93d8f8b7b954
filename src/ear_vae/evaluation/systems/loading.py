"""Loading a system that rebuilds audio by its name."""

from __future__ import annotations

import torch

from ear_vae._dtype import available_device
from ear_vae.evaluation.systems.base import EarVAESystem, System
from ear_vae.evaluation.systems.codecs import load_codec
from ear_vae.vae import EarVAE

Model = str | EarVAE | System


def load_system(
    name: str,
    *,
    device: str | torch.device | None = None,
    variant: str | None = None,
    force_download: bool = False,
) -> System:
    """Loads a codec of `systems.codecs`, else the EarVAE of that folder, bundled name or Hub repository.

    Args:
        name: Name of the system, which tables show as it is given: `dac`, `encodec`, `sao` or `agc`, one of
            these with `=` and where to load it from, or what `EarVAE.from_pretrained` takes. A folder of
            such a name is `./dac`.
        device: Device to compute on; the CPU by default.
        variant: Variant of an EarVAE whose repository holds several.
        force_download: Fetch an EarVAE from the Hub again even if cached.

    Raises:
        EarVAEError: As `EarVAE.from_pretrained`, or `ear_vae.evaluation.systems.codecs.CodecSystem`.
    """
    place = available_device(device) or torch.device("cpu")
    if (codec := load_codec(name, device=place)) is not None:
        return codec
    vae = EarVAE.from_pretrained(name, variant=variant, device=place, force_download=force_download)
    return EarVAESystem(vae, name=name)


def as_system(
    model: Model,
    *,
    device: str | torch.device | None = None,
    variant: str | None = None,
    force_download: bool = False,
) -> System:
    """Makes a system of a name or a model; a system is returned as it is.

    Args:
        model: Name for `load_system`, an `EarVAE`, or a system, which is returned as it is.
        device: Device for a model that is loaded by name, see `load_system`.
        variant: Variant of a model that is loaded by name.
        force_download: Fetch a model that is loaded by name from the Hub again.

    Raises:
        EarVAEError: As `load_system`.
    """
    if isinstance(model, str):
        return load_system(model, device=device, variant=variant, force_download=force_download)
    return EarVAESystem(model) if isinstance(model, EarVAE) else model
