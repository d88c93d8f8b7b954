"""Systems that rebuild audio, behind one small interface."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ear_vae.dsp.resampling import resample
from ear_vae.errors import EarVAEError
from ear_vae.vae import EarVAE


class System(Protocol):
    """What can be evaluated.

    Attributes:
        name: What tables call it.
        identity: Differs for other weights; results are reused for the same one only.
        sample_rate: Of the audio it takes and returns, in Hz.
        channels: Of that audio, 1 or 2.
    """

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str: ...
    @property
    def sample_rate(self) -> int: ...
    @property
    def channels(self) -> int: ...

    def reconstruct(self, audio: Tensor) -> Tensor:
        """Audio [channels, T] at `sample_rate`, rebuilt; about as long."""


class EarVAESystem:
    """An `EarVAE` as a system.

    Args:
        vae: The model.
        name: What tables call it; the model's own name by default.
    """

    def __init__(self, vae: EarVAE, *, name: str | None = None) -> None:
        self._vae = vae
        self.name = name or vae.name
        self.identity = vae.weights_sha256
        self.sample_rate = vae.sample_rate
        self.channels = vae.audio_channels

    def reconstruct(self, audio: Tensor) -> Tensor:
        """Audio [channels, T], through the posterior's mean."""
        return self._vae.reconstruct(audio)


def rebuild(system: System, audio: Tensor, sample_rate: int) -> Tensor:
    """What a system makes of audio of any rate and one or two channels.

    Args:
        system: Which.
        audio: [C, T] with C of 1 or 2. For a stereo system mono is duplicated and the mean of what comes
            back is taken; a mono system rebuilds the channels one by one.
        sample_rate: Of `audio`, in Hz; it is resampled to the system's rate and back.

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
