"""Resampling against tones at the new rate, another library, and itself in blocks."""

from __future__ import annotations

import math

import pytest
import torch

from ear_vae import EarVAEError
from ear_vae.dsp.resampling import resample

PAIRS = pytest.mark.parametrize(
    ("old", "new"),
    [
        (44_100, 48_000),
        (48_000, 44_100),
        (8_000, 44_100),
        (192_000, 44_100),
        (22_254, 44_100),
        (44_101, 44_100),
    ],
)


def tone(hz: float, rate: int, seconds: float = 3.0) -> torch.Tensor:
    time = torch.arange(int(seconds * rate), dtype=torch.float64) / rate
    return torch.sin(2 * math.pi * hz * time)[None]


@PAIRS
def test_a_tone_stays_itself(old: int, new: int) -> None:
    hz = 0.3 * min(old, new)
    found = resample(tone(hz, old), old, new)
    expected = tone(hz, new)
    length = min(found.shape[1], expected.shape[1])
    inner = slice(new // 2, length - new // 2)
    assert (found[:, inner] - expected[:, inner]).abs().max() < 1e-4


def test_what_does_not_fit_disappears() -> None:
    for old, new in ((44_100, 32_000), (44_101, 32_003)):
        found = resample(tone(16_500, old), old, new)
        assert found[:, new // 2 : -new // 2].abs().max() < 1e-4


@PAIRS
@pytest.mark.parametrize("samples", [1, 2, 1000, 44_101])
def test_length(old: int, new: int, samples: int) -> None:
    assert resample(torch.zeros(2, 3, samples), old, new).shape == (2, 3, -(-samples * new // old))


@PAIRS
def test_blocks_equal_the_whole(old: int, new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    audio = torch.randn(2, 6 * old, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("ear_vae.dsp.resampling._BLOCK_SECONDS", 1000)
    whole = resample(audio, old, new)
    monkeypatch.setattr("ear_vae.dsp.resampling._BLOCK_SECONDS", 1)
    blocks = resample(audio, old, new)
    assert blocks.shape == whole.shape
    # The filter has an end and is exact; the low-pass of the spectral method never quite ends.
    assert (blocks - whole).abs().max() < 1e-6


def test_gradients_through_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(1, 5 * 48_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for seconds in (1000, 1):
        monkeypatch.setattr("ear_vae.dsp.resampling._BLOCK_SECONDS", seconds)
        audio = torch.zeros(1, 5 * 44_100, dtype=torch.float64, requires_grad=True)
        (resample(audio, 44_100, 48_000) * weight).sum().backward()
        gradients.append(audio.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_against_another_library() -> None:
    signal = pytest.importorskip("scipy.signal")
    audio = resample(torch.randn(1, 20_000, dtype=torch.float64), 22_050, 44_100)
    expected = torch.from_numpy(
        signal.resample_poly(audio.numpy(), 160, 147, axis=-1, window=("kaiser", 12.0))
    )
    found = resample(audio, 44_100, 48_000)
    inner = slice(2000, -2000)
    assert (found - expected)[:, inner].square().mean() < 1e-4 * expected.square().mean()


def test_gradients_flow_and_equal_rates_do_nothing() -> None:
    audio = torch.randn(2, 500, requires_grad=True)
    resample(audio, 44_100, 48_000).sum().backward()
    # The sum of a resampled signal grows with the rate: each sample counts 48 000 / 44 100 times.
    torch.testing.assert_close(
        audio.grad[:, 200:-200], torch.full((2, 100), 48_000 / 44_100), rtol=1e-3, atol=0
    )
    assert resample(audio, 44_100, 44_100) is audio


@pytest.mark.parametrize("rates", [(0, 44_100), (44_100, -1), (44_100.0, 48_000)])
def test_bad_rates(rates: tuple[int, int]) -> None:
    with pytest.raises(EarVAEError, match="positive integers"):
        resample(torch.zeros(1, 10), *rates)
