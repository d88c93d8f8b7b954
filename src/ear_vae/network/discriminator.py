"""The multi-resolution STFT discriminator that judges stereo audio in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from ear_vae._dtype import upcast
from ear_vae.dsp.spectral import MultiResolutionSTFT
from ear_vae.errors import EarVAEError
from ear_vae.limits import finite_number, integer, shown

_KERNEL = (3, 9)
_LAST_KERNEL = (3, 3)


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Everything that fixes the shapes of the discriminator's tensors.

    The defaults are those of the discriminator of stable-audio-tools, EnCodec's with both channels in one
    input and no striding over frequency.

    Args:
        window_sizes: Window sizes of the STFTs in samples; each has a discriminator of its own.
        channels: Channels of every hidden layer.
        dilations: Dilation in time of each dilated hidden layer, in frames.
        frequency_stride: Stride of the dilated layers over frequency, in bins.
        negative_slope: Negative slope of the leaky ReLUs, from 0 to below 1.

    Raises:
        EarVAEError: A value is out of range.
    """

    window_sizes: tuple[int, ...] = (2048, 1024, 512, 256, 128)
    channels: int = 64
    dilations: tuple[int, ...] = (1, 2, 4)
    frequency_stride: int = 1
    negative_slope: float = 0.2

    def __post_init__(self) -> None:
        if not self.window_sizes or not self.dilations:
            raise EarVAEError("discriminator: window_sizes and dilations must not be empty")
        if any((integer(n) or 0) < 1 for n in (self.channels, self.frequency_stride, *self.dilations)):
            raise EarVAEError(
                "discriminator: channels, frequency_stride and dilations must be integers of at least 1, got "
                f"{shown(self.channels)}, {shown(self.frequency_stride)} and {shown(list(self.dilations))}"
            )
        if not finite_number(self.negative_slope) or not 0 <= self.negative_slope < 1:
            raise EarVAEError(f"discriminator: negative_slope must be in [0, 1), got {self.negative_slope}")


class DiscriminatorOutput(NamedTuple):
    """Output of the discriminator at one resolution.

    Attributes:
        scores: [B, 1, frames, F'], near 1 where the audio is taken for an original, near 0 where it is taken
            for a reconstruction.
        features: Activations of the hidden layers, each [B, channels, frames, F'].
    """

    scores: Tensor
    features: tuple[Tensor, ...]


class Discriminator(nn.Module):
    """Convolutions over complex spectrograms of left and right together, one stack per resolution.

    Args:
        config: The architecture.

    Reference: Défossez et al., "High Fidelity Neural Audio Compression" (2022), section 3.4; in stereo as
    in Evans et al., "Stable Audio Open" (2024).
    """

    def __init__(self, config: DiscriminatorConfig | None = None) -> None:
        super().__init__()
        self.config = config or DiscriminatorConfig()
        self.stft = MultiResolutionSTFT(self.config.window_sizes)
        self.resolutions = nn.ModuleList(_Resolution(self.config) for _ in self.config.window_sizes)

    def forward(self, audio: Tensor) -> list[DiscriminatorOutput]:
        """Judges audio at every resolution.

        Args:
            audio: [B, 2, T] at the sample rate the discriminator is trained at.

        Returns:
            One output for each window size.

        Raises:
            EarVAEError: The audio is not stereo, or shorter than half a window.
        """
        if audio.ndim != 3 or audio.shape[1] != 2:
            raise EarVAEError(f"the discriminator needs audio [B, 2, T], got {list(audio.shape)}")
        # Under autocast the convolutions run in lower precision, the transforms do not.
        with torch.autocast(device_type=audio.device.type, enabled=False):
            spectra = self.stft(upcast(audio))
        return [judge(spectrum) for judge, spectrum in zip(self.resolutions, spectra, strict=True)]


class _Resolution(nn.Module):
    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        stride, width = (1, config.frequency_stride), config.channels
        layers = [_convolution(4, width, _KERNEL)]
        layers += [_convolution(width, width, _KERNEL, stride, dilation) for dilation in config.dilations]
        layers.append(_convolution(width, width, _LAST_KERNEL))
        self.layers = nn.ModuleList(layers)
        self.out = _convolution(width, 1, _LAST_KERNEL)
        self.activation = nn.LeakyReLU(config.negative_slope)

    def forward(self, spectrum: Tensor) -> DiscriminatorOutput:
        x = torch.cat((spectrum.real, spectrum.imag), dim=1).transpose(-1, -2)
        # With channels last in memory the gradients of narrow layers cost up to 40 % less on a CPU, and the
        # tensor cores of a GPU take their input as it is.
        x = x.contiguous(memory_format=torch.channels_last)
        features = []
        for layer in self.layers:
            x = self.activation(layer(x))
            features.append(x)
        return DiscriminatorOutput(self.out(x), tuple(features))


def _convolution(
    inputs: int, outputs: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1), dilation: int = 1
) -> nn.Module:
    """Over [B, C, frames, bins], dilated in time, its output as long as its input at a stride of 1."""
    padding = (dilation * (kernel[0] // 2), kernel[1] // 2)
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, (dilation, 1))
    return weight_norm(convolution)
