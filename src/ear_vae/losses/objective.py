"""The training objective: named reconstruction terms, and the weighted sum with the adversarial ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ear_vae._dtype import upcast
from ear_vae.dsp.spectral import MultiResolutionSTFT, mel_filters
from ear_vae.dsp.stereo import mid_side_left_right
from ear_vae.dsp.weighting import a_weight, a_weighting_taps, k_weight, k_weighting_coefficients
from ear_vae.errors import EarVAEError
from ear_vae.limits import finite_number, sample_rate_of
from ear_vae.losses import spectral
from ear_vae.losses.phase import PhaseComparison
from ear_vae.losses.spectral import Planar
from ear_vae.posterior import Posterior

DEFAULT_WINDOW_SIZES = (2048, 1024, 512, 256, 128)
DEFAULT_LOSS_WEIGHTS = {
    "spectral_convergence": 1.0,
    "log_magnitude": 1.0,
    "correlation": 1.0,
    "instantaneous_frequency": 0.1,
    "group_delay": 0.1,
    "band_level": 0.0,
    "waveform": 0.0,
    "kl": 1e-4,
    "adversarial": 0.1,
    "feature_matching": 5.0,
}
# Computed with the discriminator, by the training module.
ADVERSARIAL_TERMS = ("adversarial", "feature_matching")

# Of the bins of an STFT to a band: wide enough that a band's level hardly fluctuates.
_BINS_PER_BAND = 16

# The filter ahead of every term, and the signals whose magnitudes are compared.
Weighting = Literal["k", "a", "none"]
MagnitudeChannels = Literal["mslr", "lr"]

_WEIGHTINGS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "k": k_weight,
    "a": a_weight,
    "none": lambda audio, sample_rate: audio,
}
_MAGNITUDE_TERMS = {
    "spectral_convergence": spectral.spectral_convergence,
    "log_magnitude": spectral.log_magnitude,
}
# Phase is compared on left and right only: the phase of mid and side follows from theirs, while its bins
# can be silent where those of the channels are not.
_PHASE_TERMS = {
    "correlation": PhaseComparison.correlation,
    "instantaneous_frequency": PhaseComparison.instantaneous_frequency,
    "group_delay": PhaseComparison.group_delay,
}
_SPECTRAL_TERMS = (*_MAGNITUDE_TERMS, *_PHASE_TERMS, "band_level")


class ReconstructionObjective(nn.Module):
    """The paper's reconstruction losses between weighted signals, and the KL divergence.

    Both signals are filtered and transformed once for each window size; every spectral term reads the
    same spectra and magnitudes, mid and side being sums and differences of the left and right spectra.

    Args:
        sample_rate: Sample rate of the audio in Hz.
        weights: Weight of each term by name, over the defaults of `DEFAULT_LOSS_WEIGHTS`. A term with
            weight 0 is not computed.
        window_sizes: Window sizes of the STFTs in samples.
        weighting: Filter ahead of all terms but the KL divergence: `k` and `a` as in `ear_vae.dsp.weighting`,
            or `none`.
        magnitude_channels: Compare magnitudes on mid, side, left and right (`mslr`) or on left and right
            only (`lr`).

    Raises:
        EarVAEError: An unknown term, weighting or choice of channels, a weight below 0 or not finite, a
            window size that is no multiple of 4, or a sample rate without that weighting (see
            `ear_vae.dsp.weighting`).
    """

    def __init__(
        self,
        sample_rate: int,
        *,
        weights: Mapping[str, float] | None = None,
        window_sizes: Sequence[int] = DEFAULT_WINDOW_SIZES,
        weighting: Weighting = "k",
        magnitude_channels: MagnitudeChannels = "mslr",
    ) -> None:
        super().__init__()
        if weighting not in _WEIGHTINGS:
            raise EarVAEError(f"weighting must be one of {', '.join(_WEIGHTINGS)}, got {weighting!r}")
        if magnitude_channels not in get_args(MagnitudeChannels):
            raise EarVAEError(
                f"magnitude_channels must be one of {', '.join(get_args(MagnitudeChannels))}, "
                f"got {magnitude_channels!r}"
            )
        unknown = sorted(set(weights or {}) - set(DEFAULT_LOSS_WEIGHTS))
        if unknown:
            raise EarVAEError(f"unknown loss terms {unknown}; the terms are {list(DEFAULT_LOSS_WEIGHTS)}")
        self.weights = {**DEFAULT_LOSS_WEIGHTS, **(weights or {})}
        refused = {n: weight for n, weight in self.weights.items() if not finite_number(weight) or weight < 0}
        if refused:
            raise EarVAEError(f"loss weights must be finite numbers of 0 or more, got {refused}")
        sample_rate = sample_rate_of(sample_rate)
        # These refuse a rate that they have no filter for.
        if weighting == "a":
            a_weighting_taps(sample_rate)
        elif weighting == "k":
            k_weighting_coefficients(sample_rate)
        self.sample_rate = sample_rate
        self.weighting = weighting
        self.magnitude_channels = magnitude_channels
        self._compiled = False
        self.stft = MultiResolutionSTFT(window_sizes)
        self._bands = [f"bands_{size}" for size in window_sizes]
        for name, size in zip(self._bands, window_sizes, strict=True):
            num_bins = size // 2 + 1
            bands = mel_filters(size, sample_rate, max(1, num_bins // _BINS_PER_BAND))
            # At very high rates the lowest bands lie between two bins.
            bands = bands[:, bands.sum(dim=0) > 0]
            self.register_buffer(name, bands / bands.sum(dim=0), persistent=False)

    def terms(self, estimate: Tensor, target: Tensor, posterior: Posterior) -> dict[str, Tensor]:
        """Every term with a weight above 0, unweighted, by name, without the adversarial ones.

        Args:
            estimate: Rebuilt audio, [B, 2, T].
            target: Original audio, [B, 2, T].
            posterior: Posterior of the original.

        Returns:
            Scalars in float32, or float64 for such audio; spectral ones are averaged over window sizes.

        Raises:
            EarVAEError: The signals differ in shape, are empty, not stereo or not floating point, or are
                shorter than half a window.
        """
        if estimate.shape != target.shape or estimate.shape[1:2] != (2,) or estimate.ndim != 3:
            raise EarVAEError(
                f"estimate {list(estimate.shape)} and target {list(target.shape)} must both be [B, 2, T]"
            )
        if not estimate.numel() or not (estimate.is_floating_point() and target.is_floating_point()):
            raise EarVAEError(
                f"estimate ({estimate.dtype}) and target ({target.dtype}) must be floating point, with "
                f"samples; got {list(estimate.shape)}"
            )
        # Under autocast too, spectra and logarithms of magnitudes need single precision.
        with torch.autocast(device_type=estimate.device.type, enabled=False):
            weight = _WEIGHTINGS[self.weighting]
            x = weight(upcast(estimate), self.sample_rate)
            with torch.no_grad():
                y = weight(upcast(target), self.sample_rate)
            terms = self._spectral_terms(x, y)
            if self.weights["waveform"]:
                terms["waveform"] = spectral.waveform(x, y)
            if self.weights["kl"]:
                terms["kl"] = Posterior(upcast(posterior.mean), upcast(posterior.std)).kl().mean()
        return terms

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of what `terms` returned; 0 of nothing."""
        if not terms:
            return torch.zeros(())
        return torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()

    def forward(self, estimate: Tensor, target: Tensor, posterior: Posterior) -> Tensor:
        """The weighted sum of all terms; arguments as `terms`."""
        return self.total(self.terms(estimate, target, posterior))

    def compile_terms(self) -> None:
        """Compiles what follows the transforms, forward and backward, which takes some tens of seconds.

        The terms are the same but for the rounding. Their gradients can then be computed together only, once
        (no `retain_graph`).

        Raises:
            RuntimeError, OSError: torch cannot compile here; most often there is no C++ compiler.
        """
        device = self.get_buffer(self._bands[0]).device
        # A batch of as many items as channels would be compiled for no other, a short one for one thread.
        audio = torch.zeros(3, 2, max(2**15, 2 * max(self.stft.window_sizes)), device=device)
        self._compiled = True
        try:
            terms = self._spectral_terms(audio.clone().requires_grad_(True), audio)
            if terms:
                torch.stack(list(terms.values())).sum().backward()
        except (RuntimeError, OSError):
            self._compiled = False
            raise

    def _spectral_terms(self, estimate: Tensor, target: Tensor) -> dict[str, Tensor]:
        names = tuple(name for name in _SPECTRAL_TERMS if self.weights[name])
        if not names:
            return {}
        with torch.no_grad():
            targets = self.stft(target)
        terms = _compiled_terms() if self._compiled else _terms_of_window
        of_windows = [
            terms(Planar.of(x), Planar.of(y), self.get_buffer(bands), names, self.magnitude_channels)
            for x, y, bands in zip(self.stft(estimate), targets, self._bands, strict=True)
        ]
        means = torch.stack(of_windows).mean(dim=0)
        return dict(zip(names, means.unbind(), strict=True))


def _terms_of_window(
    x: Planar, y: Planar, bands: Tensor, names: tuple[str, ...], magnitude_channels: MagnitudeChannels
) -> Tensor:
    """The named terms between spectra [B, 2, F, frames] of one window size, [terms]."""
    x_size, y_size = _magnitudes(x, magnitude_channels), _magnitudes(y, magnitude_channels)
    terms = {name: term(x_size, y_size) for name, term in _MAGNITUDE_TERMS.items() if name in names}
    if "band_level" in names:
        terms["band_level"] = spectral.band_level(x_size, y_size, bands)
    if any(name in names for name in _PHASE_TERMS):
        phases = PhaseComparison(x, y, x_size[:, -2:], y_size[:, -2:])
        terms |= {name: term(phases) for name, term in _PHASE_TERMS.items() if name in names}
    return torch.stack([terms[name] for name in names])


def _magnitudes(stereo: Planar, magnitude_channels: MagnitudeChannels) -> Tensor:
    """Magnitudes of the compared signals, left and right last, [B, 4 or 2, F, frames]."""
    if magnitude_channels == "lr":
        return stereo.magnitude()
    return Planar(*(mid_side_left_right(part, dim=1) for part in stereo)).magnitude()


@functools.cache
def _compiled_terms() -> Callable[..., Tensor]:
    return torch.compile(_terms_of_window, dynamic=True)
