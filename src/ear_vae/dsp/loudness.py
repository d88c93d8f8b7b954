"""Loudness, loudness range and true peak of audio."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ear_vae._dtype import upcast
from ear_vae.dsp.weighting import k_weight
from ear_vae.errors import EarVAEError
from ear_vae.limits import sample_rate_of

# BS.1770-4: the mean square of a full-scale 1 kHz sine after K-weighting is -3.01 + 0.691 dB.
_OFFSET_DB = -0.691
_ABSOLUTE_GATE_LUFS, _RELATIVE_GATE_LU, _RANGE_GATE_LU = -70.0, -10.0, -20.0
_RANGE_QUANTILES = (0.10, 0.95)
# Everything is measured on steps of 100 ms: the overlap of the gating blocks, and how often a short-term
# loudness is taken.
_STEPS_PER_SECOND, _GATING_STEPS, _SHORT_TERM_STEPS = 10, 4, 30
SHORTEST_SECONDS = _GATING_STEPS / _STEPS_PER_SECOND
_BLOCK_STEPS, _WARM_UP_STEPS = 20, 2

# BS.1770-4, annex 2, in 1/8192: two of the four phases of the interpolation filter, the others are these
# reversed.
_PHASE_0 = (14, 90, -161, 272, -487, 1125, 7964, -838, 390, -218, 122, -68)
_PHASE_1 = (-239, 240, -424, 730, -1364, 3810, 6388, -1641, 832, -477, 271, -155)
_PEAK_BLOCK_SAMPLES = 2**16


def integrated_loudness(audio: Tensor, sample_rate: int) -> Tensor:
    """Gated loudness of a whole programme in LUFS.

    Args:
        audio: [C, T] or [B, C, T] with C of 1 or 2, at least 0.4 s.
        sample_rate: Sample rate of the audio in Hz.

    Returns:
        A scalar or [B] in float64; -infinite where nothing is louder than -70 LUFS.

    Raises:
        EarVAEError: Shorter than one gating block, more than two channels, NaN or infinity in it, or an
            unusable rate.

    Reference: ITU-R BS.1770-4, annex 1.
    """
    return Loudness(audio, sample_rate).integrated


def loudness_range(audio: Tensor, sample_rate: int) -> Tensor:
    """Loudness range in LU: from the 10th to the 95th percentile of the gated loudness over 3 s.

    The short-term loudness is taken ten times a second, from 3 s on.

    Args:
        audio: [C, T] or [B, C, T] with C of 1 or 2, at least 0.4 s.
        sample_rate: Sample rate of the audio in Hz.

    Returns:
        A scalar or [B] in float64; 0 where no 3 s are louder than -70 LUFS, as for all audio under 3 s.

    Raises:
        EarVAEError: As `integrated_loudness`.

    Reference: EBU Tech 3342.
    """
    return Loudness(audio, sample_rate).range


class Loudness:
    """What is measured on the K-weighted powers of audio, filtered once.

    Attributes:
        powers: Mean squares over steps of 100 ms, summed over channels, [steps] or [B, steps] in float64.

    Args:
        audio: [C, T] or [B, C, T] with C of 1 or 2, at least 0.4 s.
        sample_rate: Sample rate of the audio in Hz.

    Raises:
        EarVAEError: As `integrated_loudness`.
    """

    def __init__(self, audio: Tensor, sample_rate: int) -> None:
        self.powers = _step_powers(audio, sample_rate)

    @property
    def integrated(self) -> Tensor:
        """As `integrated_loudness`."""
        blocks = _sliding_mean(self.powers, _GATING_STEPS)
        gated = _gate(blocks, blocks >= _power(_ABSOLUTE_GATE_LUFS), _RELATIVE_GATE_LU)
        return _loudness(_mean_where(blocks, gated))

    @property
    def range(self) -> Tensor:
        """As `loudness_range`."""
        short_term = _sliding_mean(self.powers, _SHORT_TERM_STEPS)
        gated = _gate(short_term, short_term >= _power(_ABSOLUTE_GATE_LUFS), _RANGE_GATE_LU)
        if gated.ndim == 1:
            return _percentile_range(short_term[gated])
        items = zip(short_term, gated, strict=True)
        return torch.stack([_percentile_range(powers[kept]) for powers, kept in items])


def true_peak_dbtp(audio: Tensor) -> Tensor:
    """The highest peak of audio between its samples too, in dB relative to full scale.

    Four times as many points are interpolated with the standard's own 48-tap filter, which reads up to
    0.2 dB lower than ideal interpolation near the Nyquist frequency. The result is never below the highest
    sample.

    Args:
        audio: [C, T] or [B, C, T]; the highest of all channels counts.

    Returns:
        A scalar or [B] in float64; -infinite for silence.

    Raises:
        EarVAEError: No samples, or NaN or infinity in the audio.

    Reference: ITU-R BS.1770-4, annex 2.
    """
    _require_finite(audio)
    # On a GPU single-precision convolutions may be rounded to 10 bits, as a setting that is the user's.
    dtype = torch.float32 if audio.device.type == "cpu" else torch.float64
    taps = _interpolation_taps().to(audio.device, dtype)
    reach = taps.shape[-1]
    rows = audio.reshape(-1, 1, audio.shape[-1]).to(dtype)
    peaks = rows.abs().amax(dim=(1, 2))
    for start in range(0, rows.shape[-1] + reach, _PEAK_BLOCK_SAMPLES):
        before = max(0, reach - 1 - start)
        piece = rows[..., max(0, start - reach + 1) : start + _PEAK_BLOCK_SAMPLES]
        after = max(0, min(start + _PEAK_BLOCK_SAMPLES, rows.shape[-1] + reach) - rows.shape[-1])
        piece = torch.nn.functional.pad(piece, (before, after))
        between = torch.nn.functional.conv1d(piece, taps)
        peaks = torch.maximum(peaks, between.abs().amax(dim=(1, 2)))
    highest = peaks.reshape(audio.shape[:-1]).amax(dim=-1)
    return 20 * highest.double().log10()


def _step_powers(audio: Tensor, sample_rate: int) -> Tensor:
    """Mean squares of K-weighted audio over steps of 100 ms, summed over channels: [..., steps], float64."""
    if audio.ndim not in (2, 3) or audio.shape[-2] not in (1, 2):
        raise EarVAEError(
            f"loudness needs audio [C, T] or [B, C, T] with 1 or 2 channels, got shape {list(audio.shape)}"
        )
    _require_finite(audio)
    sample_rate = sample_rate_of(sample_rate)
    step = sample_rate // _STEPS_PER_SECOND
    num_steps = audio.shape[-1] // step
    if num_steps < _GATING_STEPS:
        raise EarVAEError(
            f"loudness needs at least {SHORTEST_SECONDS} s of audio, {_GATING_STEPS * step} samples at "
            f"{sample_rate} Hz, got {audio.shape[-1]}"
        )
    powers = audio.new_empty(*audio.shape[:-2], num_steps, dtype=torch.float64)
    for first in range(0, num_steps, _BLOCK_STEPS):
        stop = min(num_steps, first + _BLOCK_STEPS)
        # The filter forgets what lies this far back.
        warm_up = min(first, _WARM_UP_STEPS)
        piece = k_weight(upcast(audio[..., (first - warm_up) * step : stop * step]), sample_rate)
        steps = piece[..., warm_up * step :].unflatten(-1, (stop - first, step))
        powers[..., first:stop] = (steps.square().mean(dim=-1)).double().sum(dim=-2)
    return powers


def _sliding_mean(powers: Tensor, length: int) -> Tensor:
    if powers.shape[-1] < length:
        return powers[..., :0]
    return powers.unfold(-1, length, 1).mean(dim=-1)


def _gate(powers: Tensor, loud: Tensor, relative_lu: float) -> Tensor:
    """Which powers are `loud` and not far below the mean of those that are."""
    threshold = _mean_where(powers, loud) * 10 ** (relative_lu / 10)
    return loud & (powers >= threshold.unsqueeze(-1))


def _mean_where(powers: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, powers, 0).sum(dim=-1) / kept.sum(dim=-1).clamp(min=1)


def _percentile_range(powers: Tensor) -> Tensor:
    if powers.numel() == 0:
        return powers.new_zeros(())
    ordered = powers.sort().values
    # The ranks that ffmpeg takes; on a short and steep programme another rule makes tenths of a LU.
    ranks = (int(quantile * ordered.numel() + 0.5) for quantile in _RANGE_QUANTILES)
    low, high = (ordered[max(rank, 1) - 1] for rank in ranks)
    return _loudness(high) - _loudness(low)


def _loudness(power: Tensor) -> Tensor:
    return _OFFSET_DB + 10 * power.log10()


def _power(loudness: float) -> float:
    return float(10 ** ((loudness - _OFFSET_DB) / 10))


@lru_cache(maxsize=1)
def _interpolation_taps() -> Tensor:
    """[4, 1, 12], as a correlation needs it."""
    phases = (_PHASE_0, _PHASE_1, _PHASE_1[::-1], _PHASE_0[::-1])
    return torch.tensor(phases, dtype=torch.float64).flip(-1).unsqueeze(1) / 8192


def _require_finite(audio: Tensor) -> None:
    if audio.numel() == 0:
        raise EarVAEError(f"audio has shape {list(audio.shape)}: there are no samples to measure")
    if not audio.is_floating_point():
        raise EarVAEError(
            f"audio to measure must be floating point, got {audio.dtype}; divide 16-bit samples by 32768"
        )
    if not bool(torch.isfinite(audio).all()):
        raise EarVAEError("audio to measure holds NaN or infinite samples; repair it first")
