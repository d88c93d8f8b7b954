"""Losses on phase in its observable forms: coherence, and derivatives in time and frequency."""

from __future__ import annotations

import torch
from torch import Tensor

from ear_vae.losses.spectral import MAGNITUDE_FLOOR, Planar

_FRAMES, _BINS = -1, -2


def correlation(estimate: Tensor, target: Tensor) -> Tensor:
    """1 − mean over the audible bins and frames of Re(X Y*) / (|X| |Y|).

    A bin is audible where the target, and the target alone, is above −90 dBFS: if the estimate had a say,
    it would be rewarded for silence. Below that level |X| is taken as −90 dBFS, so that an estimate that
    misses an audible bin is at 1 there and has a finite gradient out of it.

    Args:
        estimate: Complex spectra X of left and right, [B, 2, F, frames].
        target: Complex spectra Y, same shape.

    Returns:
        Scalar from 0 (same phase in every audible bin, at whatever level) over 1 (unrelated, or a silent
        estimate) to 2 (opposite); 0 for an item whose target is silent. The mean of each item, then over the
        items of the batch, so that a batch may be split over processes.

    Reference: the correlation loss of arXiv 2509.14912, without the ε that its published helper adds.
    """
    return PhaseComparison.of(estimate, target).correlation()


def instantaneous_frequency(estimate: Tensor, target: Tensor) -> Tensor:
    """L1 distance of the phase steps between neighbouring frames, wrapped to (−π, π].

    Args:
        estimate: Complex spectra X of left and right, [B, 2, F, frames].
        target: Complex spectra Y, same shape.

    Returns:
        Scalar in radians, from 0 to π; the mean over the bins in which both signals are above −90 dBFS, of
        each item, then over the items of the batch, so that a batch may be split over processes.

    Reference: the phase-derivative losses of arXiv 2509.14912.
    """
    return PhaseComparison.of(estimate, target).instantaneous_frequency()


def group_delay(estimate: Tensor, target: Tensor) -> Tensor:
    """L1 distance of the phase steps between neighbouring bins, wrapped to (−π, π].

    Args and returns as `instantaneous_frequency`.
    """
    return PhaseComparison.of(estimate, target).group_delay()


class PhaseComparison:
    """An estimate's spectrum turned back by its target's phase, X Y* / |Y|, which all terms here read.

    Args:
        estimate: Spectra X, [B, C, F, frames].
        target: Spectra Y, same shape; no gradient flows to it.
        estimate_magnitude: |X|.
        target_magnitude: |Y|.
    """

    def __init__(
        self, estimate: Planar, target: Planar, estimate_magnitude: Tensor, target_magnitude: Tensor
    ) -> None:
        self.estimate_magnitude, self.target_magnitude = estimate_magnitude, target_magnitude
        # The target only turns: at unit length it keeps products of neighbours, and the square of them
        # that the gradient of the angle divides by, within single precision.
        cosine, sine = (part / target_magnitude for part in target)
        self.turned = Planar(
            torch.addcmul(estimate.real * cosine, estimate.imag, sine),
            torch.addcmul(estimate.imag * cosine, estimate.real, sine, value=-1),
        )

    @classmethod
    def of(cls, estimate: Tensor, target: Tensor) -> PhaseComparison:
        """Of complex spectra [..., F, frames]."""
        x, y = Planar.of(estimate), Planar.of(target)
        return cls(x, y, x.magnitude(), y.magnitude())

    def correlation(self) -> Tensor:
        """See the function of this name."""
        cosine = self.turned.real / self.estimate_magnitude.clamp(min=MAGNITUDE_FLOOR)
        silent = self.target_magnitude <= MAGNITUDE_FLOOR
        return _mean_of_items((1 - cosine).masked_fill(silent, 0), silent)

    def instantaneous_frequency(self) -> Tensor:
        """See the function of this name."""
        return self._step_distance(_FRAMES)

    def group_delay(self) -> Tensor:
        """See the function of this name."""
        return self._step_distance(_BINS)

    def _step_distance(self, dim: int) -> Tensor:
        """Mean |angle of (X₁ X₀*) (Y₁ Y₀*)*| over neighbours 0 and 1 along `dim`."""
        floor = MAGNITUDE_FLOOR**2
        estimate_before, estimate_after = _neighbours(self.estimate_magnitude.detach(), dim)
        target_before, target_after = _neighbours(self.target_magnitude, dim)
        silent = (estimate_before * estimate_after <= floor) | (target_before * target_after <= floor)
        real_before, real_after = _neighbours(self.turned.real, dim)
        imag_before, imag_after = _neighbours(self.turned.imag, dim)
        # A silent bin has no phase; it is replaced before the angle is taken, so that no NaN reaches
        # the gradient.
        real = torch.addcmul(real_after * real_before, imag_after, imag_before).masked_fill(silent, 1)
        imag = torch.addcmul(imag_after * real_before, real_after, imag_before, value=-1).masked_fill(
            silent, 0
        )
        return _mean_of_items(torch.atan2(imag, real).abs(), silent)


def _mean_of_items(distance: Tensor, silent: Tensor) -> Tensor:
    """Mean over the bins of each item that are not silent, where `distance` is 0, then over the items."""
    axes = tuple(range(1, silent.ndim))
    return (distance.sum(axes) / (~silent).sum(axes).clamp(min=1)).mean()


def _neighbours(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """All but the last and all but the first along `dim`."""
    length = x.shape[dim] - 1
    return x.narrow(dim, 0, length), x.narrow(dim, 1, length)
