"""Distortion of tones in closed form, spectra by their sums, and latents made worse on purpose."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ear_vae import EarVAE, EarVAEError
from ear_vae.evaluation import (
    distortion_sweep,
    latent_robustness,
    residual_spectrum,
    si_sdr_db,
    tone_distortion,
)
from ear_vae.evaluation.robustness import quantize_8_bits

RATE = 48_000


def noise(*shape: int, level: float = 1.0, seed: int = 0) -> torch.Tensor:
    return level * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_second_harmonic_of_one_percent() -> None:
    """x + a (2 x² - 1) adds a second harmonic of amplitude a to a sine of amplitude 1."""
    found = tone_distortion(lambda x: x + 0.01 * (2 * x * x - 1), RATE, level_dbfs=0)
    assert found.thd_db == pytest.approx(-40, abs=0.01)
    # Relative to all that came out: 0.01 / √(1 + 0.01²); the constant lies below the band.
    assert found.thd_n_db == pytest.approx(-40 - 10 * math.log10(1.0001), abs=0.01)
    assert found.gain_db == pytest.approx(0, abs=0.001)


@pytest.mark.parametrize("level", [-1, -40])
def test_noise_counts_in_its_band_and_not_as_harmonics(level: float) -> None:
    """White noise of σ has σ² · 19980 / 24000 from 20 Hz to 20 kHz."""
    sigma = 1e-3
    found = tone_distortion(lambda x: x + noise(*x.shape, level=sigma), RATE, level_dbfs=level)
    power, signal = sigma**2 * 19_980 / 24_000, 10 ** (level / 10) / 2
    assert found.thd_n_db == pytest.approx(10 * math.log10(power / (power + signal)), abs=0.1)
    assert found.thd_db < found.thd_n_db - 25


def test_a_wavering_level_is_distortion() -> None:
    """Modulation by m at 3 Hz has sidebands of m / 2 each: m² / 2 of the tone's power."""

    def waver(x: torch.Tensor) -> torch.Tensor:
        return x * (1 + 0.02 * torch.cos(2 * math.pi * 4 * torch.arange(x.shape[1]) / RATE))

    found = tone_distortion(waver, RATE)
    assert found.thd_n_db == pytest.approx(10 * math.log10(0.02**2 / 2), abs=0.05)


def test_the_worst_channel_counts_and_gain_is_measured() -> None:
    found = tone_distortion(lambda x: 0.5 * torch.stack((x[0], x[1] + 0.1 * x[1] ** 3)), RATE, level_dbfs=0)
    # 0.1 sin³ = 0.075 sin − 0.025 sin 3.
    assert found.thd_db == pytest.approx(20 * math.log10(0.025 / 1.075), abs=0.01)
    assert found.gain_db == pytest.approx(20 * math.log10(0.5 * (1 + 1.075) / 2), abs=0.01)


def test_a_clean_system_has_none() -> None:
    assert tone_distortion(lambda x: x, RATE).thd_n_db < -130


def test_sweep_goes_through_levels_and_frequencies_that_fit() -> None:
    points = distortion_sweep(
        lambda x: x.clamp(-0.5, 0.5), 16_000, frequencies_hz=(100, 997, 9000), levels_dbfs=(-20, -1)
    )
    assert [(p.level_dbfs, p.frequency_hz) for p in points] == [
        (-20, 100),
        (-20, 997),
        (-1, 100),
        (-1, 997),
    ]
    assert all(p.thd_n_db < -120 for p in points[:2])
    assert all(-20 < p.thd_n_db < -10 for p in points[2:])
    # A tone above the third of the band has no harmonic in it.
    assert tone_distortion(lambda x: x, 16_000, frequency_hz=7000).thd_db == -math.inf


@pytest.mark.parametrize(
    ("system", "frequency", "message"),
    [
        (lambda x: x, 30_000.0, "tone must lie"),
        (lambda x: x[:, :1000], 997.0, "at least 1 s"),
        (lambda x: x * math.nan, 997.0, "finite"),
        (lambda x: x[0], 997.0, r"\[C, T\]"),
    ],
)
def test_what_cannot_be_measured(system, frequency: float, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(EarVAEError, match=message):
        tone_distortion(system, RATE, frequency_hz=frequency)


def test_residual_spectrum_adds_up_and_lies_where_the_error_is() -> None:
    target = noise(2, 10 * RATE, level=0.1)
    error = 0.01 * torch.sin(2 * math.pi * 6000 * torch.arange(10 * RATE) / RATE)
    frequencies, residual_db, target_db = residual_spectrum(target + error, target, RATE)
    assert float(frequencies[residual_db.argmax()]) == pytest.approx(6000, abs=RATE / 8192)
    assert float((10 ** (residual_db / 10)).sum()) == pytest.approx(0.01**2 / 2, rel=0.001)
    assert float((10 ** (target_db / 10)).sum()) == pytest.approx(0.01, rel=0.01)
    # White: every bin has the same share.
    assert float(target_db[10:-10].std()) < 1
    with pytest.raises(EarVAEError, match="at least 8192"):
        residual_spectrum(target[:, :8000], target[:, :8000], RATE)


def test_latents_that_are_not_perfect(small_model: Path) -> None:
    vae = EarVAE.from_pretrained(small_model)
    audio = noise(2, 44_100, level=0.1)
    points = latent_robustness(
        vae, audio, sample_rate=48_000, noise_levels=(0.1, 1.0), generator=torch.Generator().manual_seed(0)
    )
    assert [(p.perturbation, p.level) for p in points] == [
        ("none", 0),
        ("float16", 0),
        ("int8", 0),
        ("noise", 0.1),
        ("noise", 1.0),
    ]
    assert points[0].latent_error == 0
    assert points[0].against_clean == {}
    assert [p.latent_error for p in points[3:]] == pytest.approx([0.1, 1.0], rel=0.05)
    # 8 bits: 1/√12 of 1/255 of a range of some 8 standard deviations; float16 has three digits more.
    assert 1e-6 < points[1].latent_error < points[2].latent_error
    assert points[2].latent_error == pytest.approx(8 / 255 / math.sqrt(12), rel=0.3)
    against_clean = [p.against_clean["si_sdr_db"] for p in points[1:]]
    assert against_clean == sorted(against_clean, reverse=True)
    # Ten times the noise is 20 dB, as far as the network is linear.
    assert against_clean[2] - against_clean[3] == pytest.approx(20, abs=4)
    clean = vae.reconstruct(audio, sample_rate=48_000)
    assert points[0].against_original["si_sdr_db"] == pytest.approx(
        float(si_sdr_db(clean, audio, sample_rate=48_000)), abs=1e-3
    )
    with pytest.raises(EarVAEError, match="0 or more"):
        latent_robustness(vae, audio, sample_rate=48_000, noise_levels=(-1,))


def test_mono_audio_has_a_curve_too(small_model: Path) -> None:
    points = latent_robustness(
        EarVAE.from_pretrained(small_model), noise(1, 22_050), sample_rate=44_100, noise_levels=(0.5,)
    )
    assert all("ccpc" not in p.against_original for p in points)
    assert points[-1].against_original["mel_distance"] > 0


def test_8_bits_are_256_steps() -> None:
    latents = noise(3, 5000) * torch.tensor([[1.0], [10.0], [0.0]])
    rounded = quantize_8_bits(latents)
    assert [row.unique().numel() for row in rounded] == [pytest.approx(220, abs=36)] * 2 + [1]
    step = (latents.amax(1) - latents.amin(1)) / 255
    assert ((rounded - latents).abs().amax(1) <= 0.5001 * step + 1e-7).all()
    assert torch.equal(rounded.amin(1), latents.amin(1))
