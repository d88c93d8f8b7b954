"""Magnitude losses on complex spectrograms, and the same ratio in the time domain."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Full scale is 1. Below these levels a difference is not worth a gradient, and ratios to it explode.
MAGNITUDE_FLOOR = 3e-5
ENERGY_FLOOR_RMS = 1e-3
# Lost beside any power that counts; it keeps the derivative of the root finite where there is none.
_POWER_EPSILON = 1e-30


class Planar(NamedTuple):
    """A complex tensor as two contiguous real ones, over which a pass takes half the time.

    Attributes:
        real: Real parts.
        imag: Imaginary parts, same shape.
    """

    real: Tensor
    imag: Tensor

    @classmethod
    def of(cls, spectrum: Tensor) -> Planar:
        """The parts of a complex tensor."""
        real, imag = torch.view_as_real(spectrum).unbind(-1)
        return cls(real.contiguous(), imag.contiguous())

    def magnitude(self) -> Tensor:
        """|X|, with a gradient of 0 instead of NaN where X is 0."""
        return torch.addcmul(self.real.square(), self.imag, self.imag).add_(_POWER_EPSILON).sqrt()


def spectral_convergence(estimate: Tensor, target: Tensor) -> Tensor:
    """‖|X| − |Y|‖ / ‖Y‖ per item, over all its channels, bins and frames, then averaged over the batch.

    Not symmetric: the target's norm is the unit. Channels are pooled, because the side of a mono
    recording has no norm to divide by; the norm of a silent item is taken as that of noise at −60 dBFS.

    Args:
        estimate: Spectra X, [B, C, F, frames], complex or their magnitudes.
        target: Spectra Y, same shape, likewise.

    Returns:
        Scalar, 0 for equal magnitudes.

    Reference: Arık et al., "Fast Spectrogram Inversion using Multi-head CNNs" (2018), equation 4.
    """
    unit = magnitude(target)
    return _relative_norm(magnitude(estimate) - unit, unit)


def log_magnitude(estimate: Tensor, target: Tensor) -> Tensor:
    """Mean over everything of |ln |X| − ln |Y||, with magnitudes below −90 dBFS raised to it.

    Args:
        estimate: Spectra X, any shape, complex or their magnitudes.
        target: Spectra Y, same shape, likewise.

    Returns:
        Scalar, 0 for equal magnitudes; 0.115 for a gain of 1 dB.
    """
    estimate_log = magnitude(estimate).clamp(min=MAGNITUDE_FLOOR).log()
    target_log = magnitude(target).clamp(min=MAGNITUDE_FLOOR).log()
    return (estimate_log - target_log).abs().mean()


def band_level(estimate: Tensor, target: Tensor, bands: Tensor) -> Tensor:
    """Mean over everything of |ln a − ln b|, with a and b the root-mean-square magnitudes in bands.

    `log_magnitude` is smallest where an estimate that cannot follow every bin is too quiet: the mean
    logarithm of noise lies below the logarithm of its mean. Over a band of many bins the two meet. Not
    among the paper's terms.

    Args:
        estimate: Spectra X, [..., F, frames], complex or their magnitudes.
        target: Spectra Y, same shape, likewise.
        bands: Weight of each bin in each band, [F, bands], each band's sum 1.

    Returns:
        Scalar, 0 for equal levels; 0.115 for a gain of 1 dB. Levels below -90 dBFS are raised to it.
    """
    estimate_log, target_log = (_band_log_level(spectrum, bands) for spectrum in (estimate, target))
    return (estimate_log - target_log).abs().mean()


def waveform(estimate: Tensor, target: Tensor) -> Tensor:
    """‖x − y‖ / ‖y‖ per item over channels and samples, averaged over the batch.

    The square root of the noise-to-signal ratio: 0.447 at a signal-to-distortion ratio of 7 dB. Not
    among the paper's terms.

    Args:
        estimate: Signals x, [B, C, T].
        target: Signals y, same shape.

    Returns:
        Scalar, 0 for equal signals.
    """
    return _relative_norm(estimate - target, target)


def magnitude(spectrum: Tensor) -> Tensor:
    """|X| of complex spectra; what is real is taken for magnitudes already."""
    return Planar.of(spectrum).magnitude() if spectrum.is_complex() else spectrum


def safe_sqrt(power: Tensor) -> Tensor:
    """√x for x ≥ 0, with a gradient of 0 at 0."""
    silent = power == 0
    return power.masked_fill(silent, 1).sqrt().masked_fill(silent, 0)


def _band_log_level(spectrum: Tensor, bands: Tensor) -> Tensor:
    power = magnitude(spectrum).square()
    return (bands.T.to(power.dtype) @ power).clamp(min=MAGNITUDE_FLOOR**2).log() / 2


def _relative_norm(difference: Tensor, target: Tensor) -> Tensor:
    axes = tuple(range(1, target.ndim))
    floor = ENERGY_FLOOR_RMS * target[0].numel() ** 0.5
    return (
        safe_sqrt(difference.square().sum(axes)) / torch.linalg.vector_norm(target, dim=axes).clamp(min=floor)
    ).mean()
