"""Spectrograms as pictures for logs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ear_vae.dsp.spectral import MultiResolutionSTFT

_WINDOW = 2048
_HEIGHT, _WIDEST = 256, 1024
_LOWEST_HZ = 40.0
_RANGE_DB = 90.0
# From silence to full scale: black, blue, magenta, orange, white; each lighter than the one before.
_COLOURS = ((0, 0, 0), (36, 20, 110), (180, 40, 120), (250, 160, 50), (255, 255, 255))


def spectrogram_picture(audio: Tensor, sample_rate: int) -> Tensor:
    """Draws the spectrogram of audio over a logarithmic frequency axis.

    Args:
        audio: One channel of audio, [T].
        sample_rate: Sample rate in Hz.

    Returns:
        Colours [3, 256, W] from 0 to 1, low frequencies at the bottom; the range is the 90 dB below a
        full-scale sine.
    """
    audio = functional.pad(audio, (0, max(0, _WINDOW - audio.shape[-1])))
    (spectrum,) = MultiResolutionSTFT([_WINDOW])(audio.float().cpu())
    # A full-scale sine reaches Σw / (2 √Σw²) at its bin: 16.8 for this window of 2048.
    window = torch.hann_window(_WINDOW)
    reference = window.sum() / (2 * window.square().sum().sqrt())
    level_db = 20 * (spectrum.abs() / reference).clamp(min=1e-10).log10()
    ratio = (sample_rate / 2 / _LOWEST_HZ) ** (torch.arange(_HEIGHT) / (_HEIGHT - 1))
    bins = (_LOWEST_HZ * ratio * _WINDOW / sample_rate).round().long().clamp(max=_WINDOW // 2)
    rows = level_db[bins.flip(0)]
    if rows.shape[1] > _WIDEST:
        rows = functional.adaptive_max_pool1d(rows, _WIDEST)
    position = (1 + rows / _RANGE_DB).clamp(0, 1) * (len(_COLOURS) - 1)
    lower = position.floor().long().clamp(max=len(_COLOURS) - 2)
    colours = torch.tensor(_COLOURS) / 255
    mixed = torch.lerp(colours[lower], colours[lower + 1], (position - lower).unsqueeze(-1))
    return mixed.permute(2, 0, 1)
