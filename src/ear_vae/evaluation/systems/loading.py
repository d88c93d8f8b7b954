"""From a name to a system that rebuilds audio."""

from __future__ import annotations

import torch

from ear_vae.evaluation.systems.base import EarVAESystem, System
from ear_vae.evaluation.systems.codecs import load_codec
from ear_vae.vae import EarVAE


def load_system(
    name: str, *, device: torch.device, variant: str | None = None, force_download: bool = False
) -> System:
    """A codec of `systems.codecs`, else the EarVAE of that folder, bundled name or Hub repository.

    Args:
        name: As the user gave it, which is what tables call it: `dac`, `encodec`, `sao` or `agc`, one of
            these with `=` and where to load it from, or what `EarVAE.from_pretrained` takes. A folder of
            such a name is `./dac`.
        device: Where it computes.
        variant: Of a repository that holds several EarVAE models.
        force_download: Fetch an EarVAE from the Hub again even if cached.

    Raises:
        EarVAEError: As `EarVAE.from_pretrained`, or `ear_vae.evaluation.systems.codecs.CodecSystem`.
    """
    if (codec := load_codec(name, device=device)) is not None:
        return codec
    vae = EarVAE.from_pretrained(name, variant=variant, device=device, force_download=force_download)
    return EarVAESystem(vae, name=name)
