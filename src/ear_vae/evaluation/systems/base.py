"""Systems that rebuild audio, behind one small interface."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ear_vae.dsp.resampling import resample
from ear_vae.errors import EarVAEError
from ear_vae.vae import EarVAE


class System(Protocol):
    """Anything with these attributes and this method can be evaluated."""

    @property
    def name(self) -> str:
        """Name of the system in tables."""

    @property
    def identity(self) -> str:
        """Text that is different for other weights."""

    @property
    def sample_rate(self) -> int:
        """Sample rate in Hz of the audio it takes and returns."""

    @property
    def channels(self) -> int:
        """Number of channels of that audio, 1 or 2."""

    def reconstruct(self, audio: Tensor) -> Tensor:
        """Rebuilds audio.

        Args:
            audio: [channels, T] at `sample_rate`.

        Returns:
            [channels, T'] at the same rate, with T' about T.
        """


class EarVAESystem:
    """An `EarVAE` as a system.

    Args:
        vae: Model to evaluate.
        name: Name of the system in tables; the model's own by default.
    """

    def __init__(self, vae: EarVAE, *, name: str | None = None) -> None:
        self._vae = vae
        self.name = name or vae.name
        self.identity = vae.weights_sha256
        self.sample_rate = vae.sample_rate
        self.channels = vae.audio_channels

    def reconstruct(self, audio: Tensor) -> Tensor:
        """Rebuilds audio [channels, T] from the posterior's mean."""
        return self._vae.reconstruct(audio)


def rebuild(system: System, audio: Tensor, sample_rate: int) -> Tensor:
    """Rebuilds audio at any rate, with one or two channels.

    Args:
        system: System that rebuilds it.
        audio: Audio to rebuild, [C, T] with C of 1 or 2. For a stereo system mono is duplicated, and the mean
            of what comes back is taken; a mono system rebuilds the channels one by one.
        sample_rate: Sample rate of `audio` in Hz; it is resampled to the system's rate and back.

    Returns:
        [C, T] at `sample_rate`, padded with zeros where the system returns less.

    Raises:
        EarVAEError: The system returned NaN, infinity or a wrong shape.
    """
    channels, num_samples = audio.shape
    given = resample(audio, sample_rate, system.sample_rate)
    with torch.inference_mode():
        if system.channels == 1:
            rebuilt = torch.cat([system.reconstruct(channel[None]) for channel in given])
        else:
            rebuilt = system.reconstruct(given.expand(system.channels, -1))
    if rebuilt.ndim != 2 or rebuilt.shape[0] != max(channels, system.channels):
        raise EarVAEError(f"{system.name} returned shape {list(rebuilt.shape)} for {list(given.shape)}")
    if not bool(torch.isfinite(rebuilt).all()):
        raise EarVAEError(f"{system.name} returned NaN or infinite samples")
    if channels < rebuilt.shape[0]:
        rebuilt = rebuilt.mean(dim=0, keepdim=True)
    rebuilt = resample(rebuilt, system.sample_rate, sample_rate)[:, :num_samples]
    return torch.nn.functional.pad(rebuilt, (0, num_samples - rebuilt.shape[1]))
