"""The training objective: named reconstruction terms, and the weighted sum with the adversarial ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ear_vae.dsp.spectral import MultiResolutionSTFT, mel_bands
from ear_vae.dsp.stereo import mid_side_left_right
from ear_vae.dsp.weighting import k_weight
from ear_vae.errors import EarVAEError
from ear_vae.losses import phase, spectral
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

# Magnitudes are compared on mid, side, left and right, phase on left and right only: the phase of
# mid and side follows from theirs, while its bins can be silent where those of the channels are not.
_MAGNITUDE_TERMS = {
    "spectral_convergence": spectral.spectral_convergence,
    "log_magnitude": spectral.log_magnitude,
}
_PHASE_TERMS = {
    "correlation": phase.correlation,
    "instantaneous_frequency": phase.instantaneous_frequency,
    "group_delay": phase.group_delay,
}


class ReconstructionObjective(nn.Module):
    """The paper's reconstruction losses between K-weighted signals, and the KL divergence.

    Both signals are K-weighted and transformed once for each window size; every spectral term reads the
    same spectra, mid and side being sums and differences of the left and right ones.

    Args:
        sample_rate: Of the audio, in Hz.
        weights: Weight of each term by name, over the defaults of `DEFAULT_LOSS_WEIGHTS`. A term with
            weight 0 is not computed.
        window_sizes: Of the STFTs, in samples.

    Raises:
        EarVAEError: An unknown term or a negative weight.
    """

    def __init__(
        self,
        sample_rate: int,
        *,
        weights: Mapping[str, float] | None = None,
        window_sizes: Sequence[int] = DEFAULT_WINDOW_SIZES,
    ) -> None:
        super().__init__()
        unknown = sorted(set(weights or {}) - set(DEFAULT_LOSS_WEIGHTS))
        if unknown:
            raise EarVAEError(f"unknown loss terms {unknown}; the terms are {list(DEFAULT_LOSS_WEIGHTS)}")
        self.weights = {**DEFAULT_LOSS_WEIGHTS, **(weights or {})}
        negative = [name for name, weight in self.weights.items() if not weight >= 0]
        if negative:
            raise EarVAEError(
                f"loss weights must be 0 or more, got {[(n, self.weights[n]) for n in negative]}"
            )
        self.sample_rate = sample_rate
        self.stft = MultiResolutionSTFT(window_sizes)
        self._bands = [f"bands_{size}" for size in window_sizes]
        for name, size in zip(self._bands, window_sizes, strict=True):
            num_bins = size // 2 + 1
            bands = mel_bands(num_bins, max(1, num_bins // _BINS_PER_BAND), sample_rate)
            self.register_buffer(name, bands / bands.sum(dim=0), persistent=False)

    def terms(self, estimate: Tensor, target: Tensor, posterior: Posterior) -> dict[str, Tensor]:
        """Every term with a weight above 0, unweighted, by name, without the adversarial ones.

        Args:
            estimate: Rebuilt audio, [B, 2, T].
            target: Original audio, [B, 2, T].
            posterior: What the encoder gave for the original.

        Returns:
            Scalars in float32; spectral ones are averaged over window sizes.

        Raises:
            EarVAEError: The signals differ in shape, are not stereo, or are shorter than half a window.
        """
        if estimate.shape != target.shape or estimate.ndim != 3:
            raise EarVAEError(
                f"estimate {list(estimate.shape)} and target {list(target.shape)} must both be [B, 2, T]"
            )
        # Under autocast too, spectra and logarithms of magnitudes need single precision.
        with torch.autocast(device_type=estimate.device.type, enabled=False):
            x = k_weight(estimate.float(), self.sample_rate)
            with torch.no_grad():
                y = k_weight(target.float(), self.sample_rate)
            terms = self._spectral_terms(x, y)
            if self.weights["waveform"]:
                terms["waveform"] = spectral.waveform(x, y)
            if self.weights["kl"]:
                terms["kl"] = Posterior(posterior.mean.float(), posterior.std.float()).kl().mean()
        return terms

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of what `terms` returned."""
        return torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()

    def forward(self, estimate: Tensor, target: Tensor, posterior: Posterior) -> Tensor:
        """The weighted sum of all terms; arguments as `terms`."""
        return self.total(self.terms(estimate, target, posterior))

    def _spectral_terms(self, estimate: Tensor, target: Tensor) -> dict[str, Tensor]:
        magnitude_terms = {n: term for n, term in _MAGNITUDE_TERMS.items() if self.weights[n]}
        phase_terms = {n: term for n, term in _PHASE_TERMS.items() if self.weights[n]}
        level_terms = ["band_level"] if self.weights["band_level"] else []
        sums: dict[str, list[Tensor]] = {n: [] for n in (*magnitude_terms, *phase_terms, *level_terms)}
        if not sums:
            return {}
        with torch.no_grad():
            targets = self.stft(target)
        for x, y, bands in zip(self.stft(estimate), targets, self._bands, strict=True):
            x_four, y_four = mid_side_left_right(x, dim=1), mid_side_left_right(y, dim=1)
            for name, term in magnitude_terms.items():
                sums[name].append(term(x_four, y_four))
            for name, term in phase_terms.items():
                sums[name].append(term(x, y))
            for name in level_terms:
                sums[name].append(spectral.band_level(x_four, y_four, self.get_buffer(bands)))
        return {name: torch.stack(values).mean() for name, values in sums.items()}
