"""Losses on phase in its observable forms: coherence, and derivatives in time and frequency."""

from __future__ import annotations

import torch
from torch import Tensor

from ear_vae.losses.spectral import MAGNITUDE_FLOOR, magnitude

_PRODUCT_EPSILON = 1e-8


def correlation(estimate: Tensor, target: Tensor) -> Tensor:
    """1 − mean over bins and frames of Re(X Y*) / (|X| |Y| + 1e-8).

    Args:
        estimate: Complex spectra X of left and right, [..., F, frames].
        target: Complex spectra Y, same shape.

    Returns:
        Scalar from 0 (same phase in every audible bin) over 1 (unrelated, or silence) to 2 (opposite).

    Reference: the correlation loss of arXiv 2509.14912.
    """
    product = magnitude(estimate) * magnitude(target)
    aligned = estimate.real * target.real + estimate.imag * target.imag
    return 1 - (aligned / (product + _PRODUCT_EPSILON)).mean()


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
    return _phase_step_distance(estimate, target, dim=-1)


def group_delay(estimate: Tensor, target: Tensor) -> Tensor:
    """L1 distance of the phase steps between neighbouring bins, wrapped to (−π, π].

    Args and returns as `instantaneous_frequency`.
    """
    return _phase_step_distance(estimate, target, dim=-2)


def _phase_step_distance(estimate: Tensor, target: Tensor, dim: int) -> Tensor:
    """Mean |angle of (X₁ X₀*) (Y₁ Y₀*)*| over neighbours 0 and 1 along `dim`."""
    estimate_step = _neighbour_product(estimate, dim)
    target_step = _neighbour_product(target, dim)
    floor = MAGNITUDE_FLOOR**2
    audible = (estimate_step.detach().abs() > floor) & (target_step.abs() > floor)
    # The target's step only turns: at unit length it keeps the product, and the square of it that the
    # gradient of the angle divides by, within single precision. A silent bin has no phase; it is
    # replaced before the angle is taken, so that no NaN reaches the gradient.
    turned = estimate_step * target_step.conj() / target_step.abs().clamp(min=floor)
    turned = torch.where(audible, turned, torch.ones_like(turned))
    axes = tuple(range(1, turned.ndim))
    return (torch.angle(turned).abs().sum(axes) / audible.sum(axes).clamp(min=1)).mean()


def _neighbour_product(spectrum: Tensor, dim: int) -> Tensor:
    length = spectrum.shape[dim] - 1
    return spectrum.narrow(dim, 1, length) * spectrum.narrow(dim, 0, length).conj()
