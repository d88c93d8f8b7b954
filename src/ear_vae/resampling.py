"""Changing the sample rate, differentiably and in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ear_vae._torchaudio import functional
from ear_vae.errors import EarVAEError

# A Kaiser window of 64 zero crossings with its transition band just below the lower Nyquist frequency:
# over 120 dB of rejection, flat to 0.946 of it.
_ZERO_CROSSINGS = 64
_ROLLOFF = 0.9475937167399596
_KAISER_BETA = 14.769656459379492
# torchaudio's defaults.
_BRIEF_ZERO_CROSSINGS, _BRIEF_ROLLOFF = 6, 0.99
# Rates with no common factor need one filter per output phase; past this many taps that is too much
# memory, and the exact method in the frequency domain takes over.
_MOST_TAPS = 2**23
_BLOCK_SECONDS = 20


def resample(audio: Tensor, original_rate: int, target_rate: int) -> Tensor:
    """Audio at another sample rate, aligned in time with the original.

    Long audio is filtered in blocks with the neighbours that the filter needs, so that memory does not
    grow beyond input and output.

    Args:
        audio: [..., T], floating point.
        original_rate: Rate of `audio` in Hz.
        target_rate: Rate wanted in Hz.

    Returns:
        [..., ceil(T * target_rate / original_rate)]; `audio` itself when the rates are equal.

    Raises:
        EarVAEError: A rate is not a positive integer.
    """
    old, new = _ratio(original_rate, target_rate)
    if old == new or audio.shape[-1] == 0:
        return audio
    width = math.ceil(_ZERO_CROSSINGS * old / (min(old, new) * _ROLLOFF))
    if new * (2 * width + old) <= _MOST_TAPS:
        return _in_blocks(_by_filter, audio, old, new, original_rate, context=width)
    # The filter has an end; the ideal low-pass of the spectrum dies away like 1 / t.
    return _in_blocks(_by_spectrum, audio, old, new, original_rate, context=original_rate)


def resample_briefly(audio: Tensor, original_rate: int, target_rate: int) -> Tensor:
    """Audio at another sample rate by torchaudio's default filter, which rings for 6 zero crossings only.

    Published figures were taken with it, and the top octave of spectral metrics shows which filter it was.
    For listening and for models `resample` is better.

    Args:
        audio: [..., T], floating point.
        original_rate: Rate of `audio` in Hz.
        target_rate: Rate wanted in Hz.

    Returns:
        [..., ceil(T * target_rate / original_rate)]; `audio` itself when the rates are equal.

    Raises:
        EarVAEError: A rate is not a positive integer.
    """
    old, new = _ratio(original_rate, target_rate)
    if old == new or audio.shape[-1] == 0:
        return audio
    context = math.ceil(_BRIEF_ZERO_CROSSINGS * old / (min(old, new) * _BRIEF_ROLLOFF))
    if new * (2 * context + old) > _MOST_TAPS:
        return resample(audio, original_rate, target_rate)
    return _in_blocks(_by_brief_filter, audio, old, new, original_rate, context=context)


def _ratio(original_rate: int, target_rate: int) -> tuple[int, int]:
    """The two rates without their common factor."""
    for rate in (original_rate, target_rate):
        if isinstance(rate, bool) or not isinstance(rate, int) or rate < 1:
            raise EarVAEError(f"sample rates must be positive integers in Hz, got {rate!r}")
    divisor = math.gcd(original_rate, target_rate)
    return original_rate // divisor, target_rate // divisor


def _in_blocks(
    convert: Callable[[Tensor, int, int], Tensor],
    audio: Tensor,
    old: int,
    new: int,
    original_rate: int,
    *,
    context: int,
) -> Tensor:
    """What `convert` makes of the whole, block by block with `context` samples on either side."""
    length = -(-audio.shape[-1] * new // old)
    # Whole periods, so that every block starts on a sample of both rates.
    block = max(1, _BLOCK_SECONDS * original_rate // old) * old
    context = -(-context // old) * old
    if audio.shape[-1] <= block + 2 * context:
        return convert(audio, old, new)[..., :length]
    resampled = audio.new_empty(*audio.shape[:-1], length)
    for start in range(0, audio.shape[-1], block):
        first = max(0, start - context)
        piece = convert(audio[..., first : start + block + context], old, new)
        skipped = (start - first) // old * new
        target = resampled[..., start // old * new :][..., : block // old * new]
        target.copy_(piece[..., skipped : skipped + target.shape[-1]])
    return resampled


def _by_filter(audio: Tensor, old: int, new: int) -> Tensor:
    return functional().resample(
        audio,
        old,
        new,
        lowpass_filter_width=_ZERO_CROSSINGS,
        rolloff=_ROLLOFF,
        resampling_method="sinc_interp_kaiser",
        beta=_KAISER_BETA,
    )


def _by_brief_filter(audio: Tensor, old: int, new: int) -> Tensor:
    return functional().resample(
        audio, old, new, lowpass_filter_width=_BRIEF_ZERO_CROSSINGS, rolloff=_BRIEF_ROLLOFF
    )


def _by_spectrum(audio: Tensor, old: int, new: int) -> Tensor:
    """Cuts or extends the spectrum; zero padding to whole periods keeps the ratio of lengths exact."""
    periods = -(-audio.shape[-1] // old) + 1
    spectrum = torch.fft.rfft(audio, periods * old)
    num_bins = periods * new // 2 + 1
    kept = spectrum[..., :num_bins]
    kept = kept * _taper(kept.shape[-1], periods * min(old, new)).to(audio.device, audio.dtype)
    padded = torch.nn.functional.pad(kept, (0, num_bins - kept.shape[-1]))
    return torch.fft.irfft(padded, periods * new) * (new / old)


@lru_cache(maxsize=4)
def _taper(num_bins: int, num_points: int) -> Tensor:
    """1 up to the roll-off of the filter method, then a raised cosine to 0, which rings less than a cliff."""
    position = torch.arange(num_bins, dtype=torch.float64) / (num_points / 2)
    ramp = ((position - _ROLLOFF) / (1 - _ROLLOFF)).clamp(0, 1)
    return 0.5 * (1 + torch.cos(math.pi * ramp))
