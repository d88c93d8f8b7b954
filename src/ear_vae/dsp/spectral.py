"""Short-time Fourier transforms at several resolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ear_vae.dsp._torchaudio import functional
from ear_vae.errors import EarVAEError
from ear_vae.limits import integer


class MultiResolutionSTFT(nn.Module):
    """Complex spectrograms of one signal at several window sizes.

    Hann windows, a hop of a quarter window, frames centred on their time with reflected edges. Scaled by
    1/√(Σ window²): white noise of standard deviation σ has root-mean-square magnitude σ at every resolution,
    so that one floor fits them all.

    Args:
        window_sizes: Window sizes in samples, each a multiple of 4.

    Raises:
        EarVAEError: No sizes, or one that is not a positive multiple of 4.
    """

    def __init__(self, window_sizes: Sequence[int]) -> None:
        super().__init__()
        sizes = [integer(size) or 0 for size in window_sizes]
        if not sizes or any(size < 4 or size % 4 for size in sizes):
            raise EarVAEError(f"window sizes must be positive multiples of 4, got {list(window_sizes)}")
        self.window_sizes = tuple(sizes)
        for size in self.window_sizes:
            window = torch.hann_window(size, dtype=torch.float64)
            self.register_buffer(
                _name(size), (window / window.square().sum().sqrt()).float(), persistent=False
            )

    def forward(self, audio: Tensor) -> list[Tensor]:
        """Transforms audio [..., T] to one complex spectrogram [..., F, frames] per window size.

        F = size / 2 + 1; frames = 1 + T // (size / 4).

        Raises:
            EarVAEError: T is not longer than half the largest window.
        """
        num_samples = audio.shape[-1]
        if num_samples <= max(self.window_sizes) // 2:
            raise EarVAEError(
                f"{num_samples} samples are too few for windows of {max(self.window_sizes)}: "
                f"at least {max(self.window_sizes) // 2 + 1} are needed"
            )
        flat = audio.reshape(-1, num_samples)
        spectra = []
        for size in self.window_sizes:
            window = self.get_buffer(_name(size)).to(flat.dtype)
            spectrum = torch.stft(flat, size, size // 4, window=window, return_complex=True)
            spectra.append(spectrum.reshape(*audio.shape[:-1], *spectrum.shape[-2:]))
        return spectra


def mel_filters(window_size: int, sample_rate: int, num_bands: int) -> Tensor:
    """Triangular filters on the Slaney mel scale, each of unit area, from 0 Hz to the Nyquist frequency.

    Args:
        window_size: Window size of the spectra in samples.
        sample_rate: Sample rate in Hz.
        num_bands: Number of filters.

    Returns:
        [F, num_bands] with F = window_size / 2 + 1; magnitudes [..., F] @ filters are mel magnitudes.

    Reference: Slaney, "Auditory Toolbox" (1998); librosa's default.
    """
    filters: Tensor = functional().melscale_fbanks(
        window_size // 2 + 1, 0.0, sample_rate / 2, num_bands, sample_rate, norm="slaney", mel_scale="slaney"
    )
    return filters


def _name(size: int) -> str:
    return f"window_{size}"
