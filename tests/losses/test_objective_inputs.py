"""Signals, rates and settings at the edge of what the objective compares."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ear_vae import EarVAEError, Posterior
from ear_vae.losses import ReconstructionObjective
from ear_vae.losses.objective import DEFAULT_LOSS_WEIGHTS

NOTHING = dict.fromkeys(DEFAULT_LOSS_WEIGHTS, 0.0)
POSTERIOR = Posterior(torch.zeros(1, 4, 8), torch.ones(1, 4, 8))


def noise(channels: int = 2) -> Tensor:
    return 0.1 * torch.randn(1, channels, 4096, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "settings", [{"magnitude_channels": "lr"}, {"weights": {**NOTHING, "waveform": 1.0}}]
)
def test_signals_that_are_not_stereo_are_refused(channels: int, settings: dict[str, Any]) -> None:
    objective = ReconstructionObjective(44_100, window_sizes=(256,), **settings)
    with pytest.raises(EarVAEError, match=r"must both be \[B, 2, T\]"):
        objective.terms(noise(channels), noise(channels), POSTERIOR)


def test_empty_and_integer_signals_are_refused() -> None:
    objective = ReconstructionObjective(44_100, window_sizes=(256,))
    for signal in (noise()[:0], (1000 * noise()).int()):
        with pytest.raises(EarVAEError, match="must be floating point, with samples"):
            objective.terms(signal, signal, POSTERIOR)


@pytest.mark.parametrize("rate", [8_000, 44_100, 384_000, 768_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:At least one mel filterbank")
def test_the_level_of_bands_is_that_of_the_signal_at_every_rate(rate: int, dtype: torch.dtype) -> None:
    objective = ReconstructionObjective(rate, weights={**NOTHING, "band_level": 1.0}, weighting="none")
    signal = noise().to(dtype)
    estimate = (0.5 * signal).requires_grad_()
    level = objective.terms(estimate, signal, POSTERIOR)["band_level"]
    assert level.dtype == dtype
    assert level.item() == pytest.approx(math.log(2), rel=1e-3)
    (gradient,) = torch.autograd.grad(level, estimate)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("rate", [1_000, 3_000, 0, -5, 44_100.5, "x"])
def test_a_rate_that_cannot_be_weighted_is_refused_at_once(rate: Any) -> None:
    with pytest.raises(EarVAEError, match=r"sample.rate"):
        ReconstructionObjective(rate)


@pytest.mark.parametrize(
    "settings",
    [
        {"weights": {"kl": "1"}},
        {"weights": {"kl": None}},
        {"window_sizes": (2048.0,)},
        {"window_sizes": ("2048",)},
    ],
)
def test_settings_of_other_types_are_refused_in_words(settings: dict[str, Any]) -> None:
    with pytest.raises(EarVAEError, match="must be"):
        ReconstructionObjective(44_100, **settings)
