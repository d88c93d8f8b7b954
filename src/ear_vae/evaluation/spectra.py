"""Spectral comparison of a rebuilt signal with its original, in one pass over blocks of frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ear_vae.dsp.spectral import mel_filters
from ear_vae.dsp.weighting import a_weight
from ear_vae.errors import EarVAEError

SPECTRAL_RATE = 44_100
MEL_SIZES = (4096, 2048, 1024, 512)
STFT_SIZES = (4096, 2048, 1024, 512, 256, 128)
COHERENCE_SIZES = (4096, 2048, 1024, 512)
_MEL_BANDS = 64
# Below these a magnitude counts as this magnitude, and a bin has no phase.
_MAGNITUDE_FLOOR, _PHASE_FLOOR = 1e-4, 1e-6
_SILENT_PEAK = 1e-7
_REACH = max(STFT_SIZES) // 2
# Blocks are whole hops of every size. On a CPU what a block needs stays in its cache; a GPU wants more work
# at once.
_CPU_BLOCK, _GPU_BLOCK = 2**15, 2**19
SHORTEST_SAMPLES = _REACH + 1


class SpectralFigures(NamedTuple):
    """One figure per item, [B] in float64.

    Attributes:
        mel_distance: 0 for equal signals; NaN where just the target is silent.
        stft_distance: 0 for equal signals; NaN where just the target is silent.
        icpc: From 0 to 1 (equal); NaN where no channel has a bin that both signals fill.
        ccpc: From 0 to 1 (equal); NaN for one channel, and where the estimate's channels share no bin
            or just the target is silent.
    """

    mel_distance: Tensor
    stft_distance: Tensor
    icpc: Tensor
    ccpc: Tensor


def compare_spectra(
    estimate: Tensor, target: Tensor, *, distances: bool = True, coherences: bool = True
) -> SpectralFigures:
    """Computes all spectral figures of pairs at 44.1 kHz, in memory that does not grow with their length.

    Args:
        estimate: Rebuilt audio, [B, C, T] in float32 with T of at least 2049.
        target: Original audio, same shape.
        distances: Compute the mel and STFT distance; they are NaN otherwise.
        coherences: Compute ICPC and CCPC; they are NaN otherwise.

    Raises:
        EarVAEError: Too few samples for the largest window.
    """
    if target.shape[-1] < SHORTEST_SAMPLES:
        raise EarVAEError(
            f"{target.shape[-1]} samples at {SPECTRAL_RATE} Hz are too few for the largest window: spectral "
            f"metrics need at least {SHORTEST_SAMPLES} ({1000 * SHORTEST_SAMPLES / SPECTRAL_RATE:.0f} ms)"
        )
    mel = _Distances(MEL_SIZES, target) if distances else None
    stft = _Distances(STFT_SIZES, target) if distances else None
    phase = _Coherences(target) if coherences else None
    for first, stop in _blocks(target):
        if mel and stft:
            pair = _segment(estimate, target, first, stop, weighted=True)
            for size in STFT_SIZES:
                magnitudes = _spectra(pair, size, first, stop).abs().clamp_(min=_MAGNITUDE_FLOOR)
                stft.add(size, magnitudes)
                if size in MEL_SIZES:
                    mel.add(size, _mel(magnitudes, size))
        if phase:
            pair = _segment(estimate, target, first, stop, weighted=False)
            for size in COHERENCE_SIZES:
                phase.add(size, _spectra(pair, size, first, stop))
    none = torch.full(target.shape[:1], torch.nan, dtype=torch.float64, device=target.device)
    # With a silent target there is nothing to relate an error to, and no phase to compare with.
    hopeless = _silent(target) & ~_silent(estimate)
    return SpectralFigures(
        mel.value().masked_fill_(hopeless, torch.nan) if mel else none,
        stft.value().masked_fill_(hopeless, torch.nan) if stft else none,
        phase.per_channel() if phase else none,
        phase.cross_channel().masked_fill_(hopeless, torch.nan) if phase and target.shape[1] == 2 else none,
    )


def _silent(audio: Tensor) -> Tensor:
    return audio.abs().amax(dim=(1, 2)) < _SILENT_PEAK


class _Distances:
    """Adds up spectral convergence and L1 distance of log magnitudes over blocks, per window size."""

    def __init__(self, sizes: Sequence[int], target: Tensor) -> None:
        empty = torch.zeros(4, target.shape[0], dtype=torch.float64, device=target.device)
        self._sums = {size: empty.clone() for size in sizes}

    def add(self, size: int, magnitudes: Tensor) -> None:
        """Adds magnitudes [2 (estimate, target), B, C, frames, bins]."""
        estimate, target = magnitudes
        difference = (estimate - target).square_().sum(dim=(1, 2, 3))
        norm = target.square().sum(dim=(1, 2, 3))
        logarithm = (estimate / target).log_().abs_().sum(dim=(1, 2, 3))
        count = torch.full_like(norm, estimate[0].numel())
        self._sums[size] += torch.stack((difference, norm, logarithm, count))

    def value(self) -> Tensor:
        """Returns the mean over sizes, [B]."""
        each = [
            (difference / norm).sqrt() + logarithm / count
            for difference, norm, logarithm, count in self._sums.values()
        ]
        return torch.stack(each).mean(dim=0)


class _Coherences:
    """Adds up how far phase differences agree over the bins of each frame, over blocks, per size."""

    def __init__(self, target: Tensor) -> None:
        batch, channels, _ = target.shape
        empty = torch.zeros(2, batch, channels + 1, dtype=torch.float64, device=target.device)
        # For each channel, then for the pair of left and right.
        self._sums = {size: empty.clone() for size in COHERENCE_SIZES}

    def add(self, size: int, spectra: Tensor) -> None:
        """Adds spectra [2 (estimate, target), B, C, frames, bins]."""
        estimate, target = spectra
        self._sums[size][..., :-1] += _coherence(estimate * target.conj())
        if target.shape[1] == 2:
            between, expected = (x[:, 0] * x[:, 1].conj() for x in spectra)
            direction = torch.sgn(expected)
            direction.real.add_(direction == 0)
            self._sums[size][..., -1] += _coherence(between * direction.conj())

    def per_channel(self) -> Tensor:
        """Returns ICPC [B]: the mean over sizes, then over the channels that have a value."""
        return self._over_sizes()[:, :-1].nanmean(dim=1)

    def cross_channel(self) -> Tensor:
        """Returns CCPC [B]: the mean over sizes."""
        return self._over_sizes()[:, -1]

    def _over_sizes(self) -> Tensor:
        aligned, total = torch.stack(list(self._sums.values())).unbind(dim=1)
        return (aligned / total).clamp(max=1).mean(dim=0)  # but for rounding it is never above


def _coherence(products: Tensor) -> Tensor:
    """Σ_frames |Σ_bins product| and Σ |product| over the products that have a phase: [2, ...]."""
    weights = products.abs()
    no_phase = weights <= _PHASE_FLOOR
    aligned = products.masked_fill_(no_phase, 0).sum(dim=-1).abs().sum(dim=-1)
    return torch.stack((aligned, weights.masked_fill_(no_phase, 0).sum(dim=(-2, -1)))).double()


def _blocks(target: Tensor) -> Iterator[tuple[int, int]]:
    """Spans of frame centres, [first, stop) in samples; the last one includes the end of the signal."""
    block = _CPU_BLOCK if target.device.type == "cpu" else _GPU_BLOCK
    end = target.shape[-1] + 1
    for first in range(0, end, block):
        yield first, min(end, first + block)


def _segment(estimate: Tensor, target: Tensor, first: int, stop: int, *, weighted: bool) -> Tensor:
    """Cuts both signals around the frames of a block, reflected at their ends: [2, B, C, samples].

    The segment begins `_REACH` before `first` and ends where the last frame does, or later.
    """
    num_samples = target.shape[-1]
    margin = 64 if weighted else 0  # more than the weighting filter reaches
    begin, end = max(0, first - _REACH), min(num_samples, stop - 1 + _REACH)
    if end == num_samples:
        # What the reflection at the end mirrors.
        begin = max(0, min(begin, num_samples - _REACH - 1))
    outer = max(0, begin - margin)
    pair = torch.stack((estimate[..., outer : end + margin], target[..., outer : end + margin]))
    if weighted:
        pair = a_weight(pair, SPECTRAL_RATE)
    pair = pair[..., begin - outer :][..., : end - begin]
    before, after = max(0, _REACH - first), max(0, stop - 1 + _REACH - num_samples)
    if before or after:
        shape = pair.shape
        pair = torch.nn.functional.pad(pair.flatten(0, 2), (before, after), "reflect")
        pair = pair.reshape(*shape[:-1], -1)
    return pair[..., max(0, first - _REACH) - begin if first > _REACH else 0 :]


def _spectra(pair: Tensor, size: int, first: int, stop: int) -> Tensor:
    """Computes the spectra of the frames centred in the block: [2, B, C, frames, bins]."""
    hop = size // 4
    num_frames = -(-(stop - first) // hop)
    start = _REACH - size // 2
    frames = pair[..., start : start + (num_frames - 1) * hop + size].unfold(-1, size, hop)
    return torch.fft.rfft(frames * _window(size, pair.device), dim=-1)


def _mel(magnitudes: Tensor, size: int) -> Tensor:
    filters = _mel_filters(size, magnitudes.device)
    # On a GPU single-precision products may be rounded to 10 bits, as a setting that is the user's; double
    # ones never are.
    if magnitudes.device.type == "cpu":
        return magnitudes @ filters
    return (magnitudes.double() @ filters.double()).to(magnitudes.dtype)


@lru_cache(maxsize=32)
def _window(size: int, device: torch.device) -> Tensor:
    return torch.hann_window(size, device=device)


@lru_cache(maxsize=32)
def _mel_filters(size: int, device: torch.device) -> Tensor:
    return mel_filters(size, SPECTRAL_RATE, _MEL_BANDS).to(device)
