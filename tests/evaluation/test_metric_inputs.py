"""Rates, dtypes and signals at the edge of what can be measured."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ear_vae import EarVAE, EarVAEConfig, EarVAEError
from ear_vae.evaluation import (
    integrated_loudness,
    latent_robustness,
    measure,
    tone_distortion,
)
from ear_vae.latents.file import Latents, save_latents

RATE = 44_100


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return 0.1 * torch.randn(2, RATE // 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rate", [0, -1, 44_100.0, "44100", None, True, math.nan, 10**9])
@pytest.mark.parametrize("name", ["si_sdr_db", "true_peak_distance_db", "loudness_distance_lu"])
def test_every_metric_refuses_what_is_no_rate(noise: Tensor, rate: Any, name: str) -> None:
    with pytest.raises(EarVAEError, match="sample_rate must be"):
        measure(noise, noise, sample_rate=rate, names=(name,))
    if rate is not None:
        with pytest.raises(EarVAEError, match="estimate_sample_rate must be"):
            measure(noise, noise, sample_rate=RATE, estimate_sample_rate=rate, names=(name,))


@pytest.mark.parametrize("rate", [0, 5, -RATE, 44_100.0])
def test_loudness_refuses_what_is_no_rate(noise: Tensor, rate: Any) -> None:
    with pytest.raises(EarVAEError, match="sample_rate must be"):
        integrated_loudness(noise, rate)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_dtypes_are_measured_as_float32(noise: Tensor, dtype: torch.dtype) -> None:
    estimate, target = (0.5 * noise).to(dtype), noise.to(dtype)
    short = measure(estimate, target, sample_rate=RATE)
    exact = measure(estimate.float(), target.float(), sample_rate=RATE)
    assert short.keys() == exact.keys()
    assert all(torch.equal(short[name], value) for name, value in exact.items())
    assert short["loudness_distance_lu"].item() == pytest.approx(20 * math.log10(2), abs=0.01)


def test_silence_is_not_free_of_distortion() -> None:
    silent = tone_distortion(lambda audio: 0 * audio, RATE)
    assert silent.gain_db == -math.inf
    assert math.isnan(silent.thd_n_db)
    assert math.isnan(silent.thd_db)
    half = tone_distortion(lambda audio: audio * torch.tensor([[1.0], [0.0]]), RATE)
    assert math.isnan(half.thd_n_db)
    assert tone_distortion(lambda audio: audio, RATE).thd_n_db < -120


def test_arrays_are_refused_in_words(noise: Tensor) -> None:
    with pytest.raises(EarVAEError, match="the estimate is a ndarray; expected a tensor"):
        measure(noise.numpy(), noise, sample_rate=RATE)  # type: ignore[arg-type]


def test_robustness_is_of_one_piece_and_of_finite_noise(noise: Tensor) -> None:
    config = EarVAEConfig(
        channels=2,
        channel_multipliers=(1,),
        strides=(4,),
        latent_dim=4,
        transformer_depth=0,
        transformer_head_dim=2,
    )
    vae = EarVAE(config).requires_grad_(False)
    for level in (math.nan, math.inf, -1.0):
        with pytest.raises(EarVAEError, match="noise levels must be finite and 0 or more"):
            latent_robustness(vae, noise, sample_rate=RATE, noise_levels=(level,), names=("si_sdr_db",))
    with pytest.raises(EarVAEError, match="expected one piece"):
        latent_robustness(vae, noise[None], sample_rate=RATE, noise_levels=(), names=("si_sdr_db",))


@pytest.mark.parametrize(
    "change",
    [
        {"model_name": None},
        {"weights_sha256": None},
        {"mean": torch.zeros(4, 5).to_sparse()},
        {"mean": torch.zeros(4, 5, device="meta")},
    ],
)
def test_inconsistent_latents_are_refused_in_words(change: dict[str, Any]) -> None:
    latents = Latents(torch.zeros(4, 5), None, RATE, 4, 20, 2, RATE, 20, "model", "0" * 64)
    with pytest.raises(EarVAEError, match=r"must be text|must be a dense tensor that holds values"):
        save_latents(io.BytesIO(), replace(latents, **change))
