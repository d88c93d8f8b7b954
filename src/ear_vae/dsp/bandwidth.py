"""Up to which frequency audio reaches."""

from __future__ import annotations

import torch
from torch import Tensor

_WINDOW_SAMPLES = 4096
_BAND_HZ = 250.0
# A lossy coder's low-pass is no lower; what ends below is taken for the music's own end.
_LOWEST_CUT_HZ = 4_000.0
_BANDS_BELOW = 4
_CLIFF_DB = 20.0
# Under full scale and in one band; there is only rounding noise here.
_FLOOR_DB = -130.0


def bandwidth_hz(audio: Tensor, sample_rate: int) -> float:
    """The frequency at which the spectrum breaks off, as a lossy coder's low-pass makes it do.

    Music fades towards high frequencies; a coder cuts. A cut is where the level falls by 20 dB or more
    from the mean of 1 kHz below to the highest band of 250 Hz above.

    Args:
        audio: [C, T], at least 4096 samples; a few seconds from several places of a file do well.
        sample_rate: Sample rate of the audio in Hz.

    Returns:
        In Hz, up to two bands too high; half the sample rate where no cut shows, as for silence and for music
        that fades out below it.
    """
    window = torch.hann_window(_WINDOW_SAMPLES, dtype=audio.dtype, device=audio.device)
    frames = audio.unfold(-1, _WINDOW_SAMPLES, _WINDOW_SAMPLES // 2) * (window / window.square().sum().sqrt())
    powers = torch.fft.rfft(frames).abs().square().mean(dim=(0, 1)) / _WINDOW_SAMPLES
    bins = max(1, round(_BAND_HZ * _WINDOW_SAMPLES / sample_rate))
    # The highest bin of a band, so that a coder's holes between partials do not count.
    bands = powers[1 : 1 + (len(powers) - 1) // bins * bins].unflatten(0, (-1, bins)).amax(dim=1)
    levels = (10 * bands.log10()).clamp(min=_FLOOR_DB)
    above = levels.flip(0).cummax(dim=0).values.flip(0)
    below = levels.unfold(0, _BANDS_BELOW, 1).mean(dim=1)
    # Between the bands that `below` ends with and all above them; one band may hold the slope itself.
    drops = below[: -(_BANDS_BELOW + 1)] - above[_BANDS_BELOW + 1 :][: len(below) - _BANDS_BELOW - 1]
    band_hz = bins * sample_rate / _WINDOW_SAMPLES
    first = int(_LOWEST_CUT_HZ / band_hz)
    drops[:first] = 0
    best = int(drops.argmax())
    if float(drops[best]) < _CLIFF_DB:
        return sample_rate / 2
    return float((best + _BANDS_BELOW) * band_hz)
