"""K-weighting against the standard, an independent implementation, and a recursion over samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ear_vae import EarVAEError
from ear_vae.dsp.weighting import (
    a_weight,
    a_weighting_taps,
    k_weight,
    k_weighting_coefficients,
    k_weighting_response,
)
from ear_vae.losses import ReconstructionObjective

RATES = pytest.mark.parametrize("sample_rate", [44_100, 48_000])


@RATES
def test_response_is_that_of_pyloudnorm(sample_rate: int) -> None:
    """Within 0.01 dB from 20 Hz to 20 kHz of the DeMan filters."""
    pyloudnorm = pytest.importorskip("pyloudnorm")
    frequencies = np.geomspace(20, 20_000, 400)
    delay = np.exp(-2j * np.pi * frequencies / sample_rate)
    expected = np.ones(400, dtype=complex)
    for stage in pyloudnorm.Meter(sample_rate, filter_class="DeMan")._filters.values():
        expected *= stage.passband_gain * np.polyval(stage.b[::-1], delay) / np.polyval(stage.a[::-1], delay)
    found = k_weighting_response(torch.from_numpy(frequencies), sample_rate).numpy()
    assert np.abs(20 * np.log10(np.abs(found / expected))).max() < 0.01


def test_coefficients_at_48_khz_are_those_printed_in_the_standard() -> None:
    (shelf_b, shelf_a), (pass_b, pass_a) = k_weighting_coefficients(48_000)
    assert shelf_b == pytest.approx([1.53512485958697, -2.69169618940638, 1.19839281085285], abs=1e-8)
    assert shelf_a == pytest.approx([1.0, -1.69065929318241, 0.73248077421585], abs=1e-8)
    assert pass_b == [1.0, -2.0, 1.0]
    assert pass_a == pytest.approx([1.0, -1.99004745483398, 0.99007225036621], abs=1e-8)


@RATES
def test_filtering_equals_the_recursion(sample_rate: int) -> None:
    signal = pytest.importorskip("scipy.signal")
    audio = np.random.default_rng(0).standard_normal((2, 20_001))
    expected = audio
    for numerator, denominator in k_weighting_coefficients(sample_rate):
        expected = signal.lfilter(numerator, denominator, expected)
    found = k_weight(torch.from_numpy(audio), sample_rate).numpy()
    assert np.abs(found - expected).max() < 1e-5
    single = k_weight(torch.from_numpy(audio).float(), sample_rate).numpy()
    assert np.abs(single - expected).max() < 1e-4


def test_a_short_signal_does_not_wrap_around() -> None:
    impulse = torch.zeros(1, 64, dtype=torch.float64)
    impulse[0, -1] = 1.0
    weighted = k_weight(impulse, 44_100)
    assert weighted[0, :-1].abs().max() < 1e-5
    assert float(weighted[0, -1]) == pytest.approx(k_weighting_coefficients(44_100)[0][0][0], abs=1e-5)


def test_gradient_is_the_filter_run_backwards() -> None:
    """The adjoint of a filter h is the correlation with h: ⟨Kx, y⟩ = ⟨x, Kᵀy⟩, and Kᵀ reverses time."""
    x, y = (
        torch.randn(2, 500, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 500, dtype=torch.float64),
    )
    (gradient,) = torch.autograd.grad((k_weight(x, 44_100) * y).sum(), x)
    torch.testing.assert_close(gradient, k_weight(y.flip(-1), 44_100).flip(-1), rtol=0, atol=1e-5)


def test_gain_at_1_khz() -> None:
    """BS.1770 is made so that a 997 Hz sine needs an offset of 0.691 dB."""
    response = k_weighting_response(torch.tensor([997.0]), 48_000).abs()
    assert 20 * math.log10(float(response)) == pytest.approx(0.691, abs=0.01)


def test_a_rate_too_low_is_refused() -> None:
    with pytest.raises(EarVAEError, match="sample rate above 3364 Hz, got 3000"):
        k_weight(torch.zeros(1, 100), 3000)


@pytest.mark.parametrize("rate", [44_100, 48_000])
def test_a_weighting_taps_are_those_that_others_design(rate: int) -> None:
    """The construction of the original: bilinear transform, its response, least squares, all by scipy."""
    signal = pytest.importorskip("scipy.signal")
    low, second, third, high, gain_db = 20.598997, 107.65265, 737.86223, 12194.217, 1.9997
    omega = 2 * np.pi
    denominator = np.polymul(
        [1, 2 * omega * high, (omega * high) ** 2], [1, 2 * omega * low, (omega * low) ** 2]
    )
    denominator = np.polymul(np.polymul(denominator, [1, omega * third]), [1, omega * second])
    digital = signal.bilinear([(omega * high) ** 2 * 10 ** (gain_db / 20), 0, 0, 0, 0], denominator, fs=rate)
    frequencies, response = signal.freqz(*digital, worN=512, fs=rate)
    expected = signal.firls(101, frequencies, abs(response), fs=rate)
    np.testing.assert_allclose(a_weighting_taps(rate).numpy(), expected, atol=1e-9)


def test_a_rate_without_a_weighting_is_refused_at_the_start() -> None:
    message = "A-weighting needs audio at 44100 or 48000 Hz, got 22050 Hz"
    with pytest.raises(EarVAEError, match=message):
        a_weight(torch.zeros(1, 100), 22_050)
    with pytest.raises(EarVAEError, match=message):
        ReconstructionObjective(22_050, weighting="a")
    ReconstructionObjective(22_050, weighting="k")


@pytest.mark.parametrize("num_samples", [1, 50, 1000, 65_436, 200_001])
def test_a_weight_is_the_filter_centred(num_samples: int) -> None:
    audio = torch.randn(2, 3, num_samples, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    taps = a_weighting_taps(44_100)
    expected = torch.nn.functional.conv1d(audio.reshape(6, 1, -1), taps[None, None], padding=50)
    torch.testing.assert_close(a_weight(audio, 44_100), expected.reshape(audio.shape), atol=1e-12, rtol=0)


def test_the_gradient_of_a_weight_is_the_filter_itself() -> None:
    """The filter is symmetric, so its adjoint is itself: across the blocks it works in, too."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 70_000, dtype=torch.float64, generator=generator) for _ in range(2))
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad((a_weight(x, 44_100) * y).sum(), x)
    torch.testing.assert_close(gradient, a_weight(y, 44_100), rtol=0, atol=1e-10)
