"""How rebuilt audio degrades when its latents are not perfect."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ear_vae.dsp.resampling import resample
from ear_vae.errors import EarVAEError
from ear_vae.evaluation.metrics import measure
from ear_vae.vae import EarVAE

NOISE_LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_NAMES = ("si_sdr_db", "mel_distance", "stft_distance", "icpc", "ccpc")
_STEPS_OF_8_BITS = 255


@dataclass(frozen=True)
class RobustnessPoint:
    """One point of the robustness curve.

    Attributes:
        perturbation: Kind of perturbation: `none`, `noise`, `float16` or `int8`.
        level: Standard deviation of the noise, relative to that of each latent channel; 0 for the others.
        latent_error: Root mean square of the change, relative to that of the latents around their mean, over
            all channels.
        against_original: Metrics of the decoded audio against the original.
        against_clean: Metrics of the decoded audio against that of the untouched latents; empty for those
            themselves.
    """

    perturbation: str
    level: float
    latent_error: float
    against_original: dict[str, float]
    against_clean: dict[str, float]


def latent_robustness(
    vae: EarVAE,
    audio: Tensor,
    *,
    sample_rate: int,
    noise_levels: Sequence[float] = NOISE_LEVELS,
    names: Collection[str] = _NAMES,
    generator: torch.Generator | None = None,
) -> list[RobustnessPoint]:
    """Measures audio decoded from latents that are untouched, in float16, in 8 bits, and noisy.

    The latents are the posterior's mean. Noise is Gaussian, with a standard deviation of `level` times that
    of each channel over the frames of this audio: what a generator of latents with that error would produce.
    8 bits are 256 even steps from the lowest to the highest value of each channel.

    Args:
        vae: Model to measure.
        audio: Audio to encode, [C, T] with 1 or 2 channels.
        sample_rate: Sample rate of `audio` in Hz, at which signals are compared.
        noise_levels: Levels of the noise, 0 or more.
        names: Names of metrics, out of `ear_vae.evaluation.METRICS`.
        generator: Source of the noise, on the CPU.

    Raises:
        EarVAEError: A negative or infinite level, more than one piece, or as `EarVAE.encode` and `measure`.
    """
    if not all(0 <= level < math.inf for level in noise_levels):
        raise EarVAEError(f"noise levels must be finite and 0 or more, got {list(noise_levels)}")
    if audio.ndim != 2:
        raise EarVAEError(f"audio has shape {list(audio.shape)}; expected one piece, [C, T]")
    with torch.no_grad():
        latents = vae.encode(audio, sample_rate=sample_rate).mean
        spread = (latents - latents.mean(dim=-1, keepdim=True)).square().mean().sqrt()
        points, clean = [], None
        for perturbation, level, changed in _perturbed(latents, noise_levels, generator):
            decoded = _decode(vae, changed, audio, sample_rate)
            clean = decoded if clean is None else clean
            error = (changed - latents).square().mean().sqrt() / spread.clamp(min=1e-12)
            points.append(
                RobustnessPoint(
                    perturbation,
                    level,
                    float(error),
                    _figures(decoded, audio, sample_rate, names),
                    {} if decoded is clean else _figures(decoded, clean, sample_rate, names),
                )
            )
    return points


def quantize_8_bits(latents: Tensor) -> Tensor:
    """Rounds latents [..., D, N] to 256 even steps from the lowest to the highest value of each channel."""
    low = latents.amin(dim=-1, keepdim=True)
    step = (latents.amax(dim=-1, keepdim=True) - low) / _STEPS_OF_8_BITS
    return torch.where(step > 0, low + ((latents - low) / step).round() * step, latents)


def _perturbed(
    latents: Tensor, noise_levels: Sequence[float], generator: torch.Generator | None
) -> Iterator[tuple[str, float, Tensor]]:
    yield "none", 0.0, latents
    yield "float16", 0.0, latents.half().to(latents.dtype)
    yield "int8", 0.0, quantize_8_bits(latents)
    # The same noise at every level, so that the curve shows the level and not the draw.
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    noise = noise * latents.std(dim=-1, keepdim=True, correction=0)
    for level in noise_levels:
        yield "noise", level, latents + level * noise


def _decode(vae: EarVAE, latents: Tensor, audio: Tensor, sample_rate: int) -> Tensor:
    decoded = vae.decode(latents, num_samples=-(-audio.shape[-1] * vae.sample_rate // sample_rate))
    if audio.shape[0] < decoded.shape[0]:
        decoded = decoded.mean(dim=0, keepdim=True)
    return resample(decoded, vae.sample_rate, sample_rate)[..., : audio.shape[-1]]


def _figures(estimate: Tensor, target: Tensor, sample_rate: int, names: Collection[str]) -> dict[str, float]:
    wanted = [name for name in names if name != "ccpc" or target.shape[0] == 2]
    found = measure(estimate, target, sample_rate=sample_rate, names=wanted)
    return {name: float(found[name]) for name in wanted}
