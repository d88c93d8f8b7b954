"""Loudness and peaks against the standards' own test cases, pyloudnorm and ffmpeg."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ear_vae import EarVAEError
from ear_vae.audio import write_audio
from ear_vae.dsp import loudness
from ear_vae.dsp.loudness import integrated_loudness, loudness_range, true_peak_dbtp

RATE = 48_000


def tones(levels_db: Sequence[float], seconds: Sequence[float], rate: int = RATE) -> torch.Tensor:
    """A stereo 1 kHz tone, level after level."""
    gain = torch.cat(
        [torch.full((round(s * rate),), 10 ** (db / 20)) for db, s in zip(levels_db, seconds, strict=True)]
    )
    time = torch.arange(gain.numel(), dtype=torch.float64) / rate
    return (gain * torch.sin(2 * math.pi * 1000 * time)).float().expand(2, -1)


def programme(rate: int, seconds: float = 20, seed: int = 0) -> torch.Tensor:
    """Pink-ish stereo noise whose level wanders over 40 dB."""
    generator = torch.Generator().manual_seed(seed)
    samples = int(seconds * rate)
    spectrum = torch.fft.rfft(torch.randn(2, samples, generator=generator))
    spectrum /= torch.arange(1, spectrum.shape[1] + 1).sqrt()
    noise = torch.fft.irfft(spectrum, samples)
    time = torch.arange(samples) / rate
    level_db = -30 + 20 * torch.sin(2 * math.pi * time / 7) - 3 * (time > 10)
    return noise / noise.abs().max() * 10 ** (level_db / 20)


@pytest.mark.parametrize(
    ("levels", "seconds", "expected"),
    [
        ([-23], [20], -23.0),
        ([-33], [20], -33.0),
        ([-36, -23, -36], [10, 60, 10], -23.0),
        ([-72, -36, -23, -36, -72], [10, 10, 60, 10, 10], -23.0),
        ([-26, -20, -26], [20, 20.1, 20], -23.0),
    ],
)
def test_ebu_tech_3341(levels: list[float], seconds: list[float], expected: float) -> None:
    """Test cases 1 to 5: within 0.1 LU."""
    assert float(integrated_loudness(tones(levels, seconds), RATE)) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(
    ("levels", "expected"),
    [([-20, -30], 10), ([-20, -15], 5), ([-40, -20], 20), ([-50, -35, -20, -35, -50], 15)],
)
def test_ebu_tech_3342(levels: list[float], expected: float) -> None:
    """Test cases 1 to 4: within 1 LU; the tones' plateaus are long enough for a tenth of that."""
    found = loudness_range(tones(levels, [20] * len(levels)), RATE)
    assert float(found) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("rate", [22_050, 44_100, 48_000, 96_000])
def test_against_pyloudnorm(rate: int) -> None:
    meter = pytest.importorskip("pyloudnorm").Meter(rate, filter_class="DeMan")
    audio = programme(rate)
    expected = meter.integrated_loudness(audio.double().T.numpy())
    assert float(integrated_loudness(audio, rate)) == pytest.approx(expected, abs=0.02)
    mono = meter.integrated_loudness(audio[0].double().numpy())
    assert float(integrated_loudness(audio[:1], rate)) == pytest.approx(mono, abs=0.02)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_against_ffmpeg(tmp_path: Path, seed: int) -> None:
    audio = programme(RATE, seed=seed)
    write_audio(tmp_path / "a.wav", audio, RATE)
    command = [
        "ffmpeg",
        "-hide_banner",
        "-nostats",
        "-i",
        str(tmp_path / "a.wav"),
        "-af",
        "ebur128=peak=true",
    ]
    printed = subprocess.run([*command, "-f", "null", "-"], capture_output=True, text=True, check=True).stderr
    summary = printed[printed.rindex("Summary:") :]
    integrated, range_lu, peak = (
        float(re.search(rf"{name}:\s+(\S+) (?:LUFS|LU|dBFS)", summary)[1])  # type: ignore[index]
        for name in ("I", "LRA", "Peak")
    )
    assert float(integrated_loudness(audio, RATE)) == pytest.approx(integrated, abs=0.06)
    assert float(loudness_range(audio, RATE)) == pytest.approx(range_lu, abs=0.06)
    assert float(true_peak_dbtp(audio)) == pytest.approx(peak, abs=0.15)


@pytest.mark.parametrize("phase", [0, 45, 60, 67.5])
def test_true_peak_of_a_tone_between_samples(phase: float) -> None:
    """EBU Tech 3341, test cases 15 to 18: a quarter-rate tone of amplitude 0.5, +0.2 / -0.4 dB."""
    index = torch.arange(RATE)
    fade = torch.clamp(torch.minimum(index, RATE - index) / 1000, max=1)
    tone = 0.5 * torch.sin(math.pi / 2 * index + math.radians(phase)) * fade
    assert -6.4 < float(true_peak_dbtp(tone.float()[None])) < -5.8


def test_true_peak_of_an_impulse_is_not_below_the_sample() -> None:
    impulse = torch.zeros(2, 1, 1001)
    impulse[0, 0, 500] = impulse[1, 0, 0] = -0.5
    assert true_peak_dbtp(impulse).tolist() == pytest.approx([20 * math.log10(0.5)] * 2)


def test_blocks_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    audio = programme(RATE, seconds=5)
    # The highest peak lies between the samples on either side of a seam.
    audio[:, 3 * 777 - 1 : 3 * 777 + 1] = 2
    whole = true_peak_dbtp(audio), integrated_loudness(audio, RATE)
    monkeypatch.setattr(loudness, "_PEAK_BLOCK_SAMPLES", 777)
    monkeypatch.setattr(loudness, "_BLOCK_STEPS", 3)
    assert float(true_peak_dbtp(audio)) == pytest.approx(float(whole[0]), abs=1e-5)
    assert float(integrated_loudness(audio, RATE)) == pytest.approx(float(whole[1]), abs=1e-4)


def test_a_batch_is_its_items() -> None:
    items = [programme(RATE, 5, seed) for seed in (0, 1)] + [torch.zeros(2, 5 * RATE)]
    batch = torch.stack(items)
    for measure in (integrated_loudness, loudness_range):
        assert measure(batch, RATE).tolist() == pytest.approx([float(measure(x, RATE)) for x in items])
    assert true_peak_dbtp(batch).tolist() == pytest.approx([float(true_peak_dbtp(x)) for x in items])


def test_silence_and_short_audio_have_stated_results() -> None:
    silence = torch.zeros(2, RATE)
    assert float(integrated_loudness(silence, RATE)) == -math.inf
    assert float(true_peak_dbtp(silence)) == -math.inf
    assert float(loudness_range(silence, RATE)) == 0
    assert float(loudness_range(programme(RATE, 2.9), RATE)) == 0
    # A constant has no loudness once the filter has settled; its peak is the overshoot of its onset.
    assert float(integrated_loudness(torch.full((2, 10 * RATE), 0.5), RATE)) < -20
    assert -6.03 < float(true_peak_dbtp(torch.full((2, RATE), 0.5))) < -5


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (torch.zeros(2, 19_199), "at least 0.4 s"),
        (torch.zeros(3, RATE), "1 or 2 channels"),
        (torch.zeros(RATE), "1 or 2 channels"),
        (torch.full((2, RATE), math.nan), "NaN"),
        (torch.full((2, RATE), math.inf), "NaN or infinite"),
        (torch.zeros(2, RATE, dtype=torch.int16), "floating point"),
        (torch.zeros(2, 0), "no samples"),
    ],
)
def test_what_cannot_be_measured(audio: torch.Tensor, message: str) -> None:
    with pytest.raises(EarVAEError, match=message):
        integrated_loudness(audio, RATE)
