"""Distortion of tones by a system (THD+N after AES17), and the spectrum of its error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ear_vae.errors import EarVAEError

AES17_HZ, AES17_DBFS = 997.0, -1.0
SWEEP_HZ = (40.0, 100.0, 250.0, 500.0, AES17_HZ, 2000.0, 4000.0, 8000.0, 12_000.0, 16_000.0)
SWEEP_DBFS = (-1.0, -10.0, -20.0, -40.0, -60.0)
# The band of AES17.
_BAND_HZ = (20.0, 20_000.0)
_HARMONICS = 10
# Cut off at both ends of what a system returns, where it fades in or out.
_SETTLING_SECONDS = 0.25
_LOWEST_POWER = 1e-30

AudioFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ToneDistortion:
    """Distortion of one tone by a system.

    Attributes:
        frequency_hz: Frequency of the tone in Hz.
        level_dbfs: Level of the tone that went in; 0 for a sine with peaks at full scale.
        gain_db: Level of the tone that came out, relative to what went in.
        thd_n_db: Level of everything but the tone that came out, from 20 Hz to 20 kHz, relative to everything
            that came out (root mean squares); NaN where a channel comes out silent.
        thd_db: Level of the 2nd to 10th harmonics relative to the tone; -infinite where none fits in the
            band, NaN where a channel comes out silent.
    """

    frequency_hz: float
    level_dbfs: float
    gain_db: float
    thd_n_db: float
    thd_db: float


def tone(frequency_hz: float, sample_rate: int, *, level_dbfs: float, seconds: float = 3.0) -> Tensor:
    """Makes a stereo sine [2, T], equal in both channels, that fades in and out over 10 ms."""
    time = torch.arange(round(seconds * sample_rate), dtype=torch.float64) / sample_rate
    fade = (torch.minimum(time, time.flip(0)) / 0.01).clamp(max=1)
    sine = 10 ** (level_dbfs / 20) * torch.sin(2 * math.pi * frequency_hz * time) * fade
    return sine.float().expand(2, -1)


def tone_distortion(
    system: AudioFunction,
    sample_rate: int,
    *,
    frequency_hz: float = AES17_HZ,
    level_dbfs: float = AES17_DBFS,
) -> ToneDistortion:
    """Measures THD+N and THD of a system at one frequency and level.

    AES17 removes the tone with a notch of Q 1.2 to 3. Here the sine that fits the output best is removed, so
    that whatever lies close to the tone, such as a wavering level, counts as distortion too.

    Args:
        system: Function that takes audio [2, T] at `sample_rate` and returns it, about as long, with 1 or 2
            channels; the worst channel counts.
        sample_rate: Sample rate of the audio in Hz.
        frequency_hz: Frequency of the tone in Hz, below 20 kHz and the Nyquist frequency.
        level_dbfs: Level of the tone; 0 for a sine with peaks at full scale.

    Raises:
        EarVAEError: A frequency outside the band, or a system that returns too little, or NaN.

    Reference: AES17-2020, total harmonic distortion and noise ratio.
    """
    top = min(_BAND_HZ[1], sample_rate / 2)
    if not _BAND_HZ[0] <= frequency_hz < top:
        raise EarVAEError(
            f"the tone must lie from {_BAND_HZ[0]:.0f} Hz to below {top:.0f} Hz, got {frequency_hz} Hz"
        )
    given = tone(frequency_hz, sample_rate, level_dbfs=level_dbfs)
    with torch.no_grad():
        output = system(given)
    settled = _settled(output, sample_rate)
    residual, amplitudes = _without_harmonics(settled, frequency_hz, sample_rate, 1)
    heard = _band_power(residual, sample_rate)
    everything = amplitudes[:, 0].square() / 2 + heard
    # Of silence there is no ratio; -infinity would call it free of distortion.
    everything = everything.masked_fill(everything < _LOWEST_POWER, math.nan)
    # Harmonics are fitted jointly with the tone, and those above the band do not count.
    count = max(1, min(_HARMONICS, int(min(_BAND_HZ[1], 0.499 * sample_rate) / frequency_hz)))
    _, harmonics = _without_harmonics(settled, frequency_hz, sample_rate, count)
    overtones = harmonics[:, 1:].square().sum(dim=1) / harmonics[:, 0].square().clamp(min=_LOWEST_POWER)
    overtones = overtones.masked_fill(everything.isnan(), math.nan)
    return ToneDistortion(
        frequency_hz=frequency_hz,
        level_dbfs=level_dbfs,
        gain_db=float(20 * amplitudes[:, 0].mean().log10()) - level_dbfs,
        thd_n_db=float(10 * (heard / everything).max().log10()),
        thd_db=float(10 * overtones.max().log10()),
    )


def distortion_sweep(
    system: AudioFunction,
    sample_rate: int,
    *,
    frequencies_hz: Iterable[float] = SWEEP_HZ,
    levels_dbfs: Iterable[float] = (AES17_DBFS,),
) -> list[ToneDistortion]:
    """Measures `tone_distortion` at every frequency, for every level.

    Args:
        system: Function to measure, as for `tone_distortion`.
        sample_rate: Sample rate of the audio in Hz.
        frequencies_hz: Frequencies of the tones; those above the Nyquist frequency are left out.
        levels_dbfs: Levels of the tones, such as `SWEEP_DBFS`.

    Raises:
        EarVAEError: As `tone_distortion`.
    """
    fitting = [hz for hz in frequencies_hz if hz < min(_BAND_HZ[1], sample_rate / 2)]
    return [
        tone_distortion(system, sample_rate, frequency_hz=hz, level_dbfs=level)
        for level in levels_dbfs
        for hz in fitting
    ]


def residual_spectrum(
    estimate: Tensor, target: Tensor, sample_rate: int, *, window_size: int = 8192
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the mean power spectra of the error and of the target.

    Args:
        estimate: Rebuilt audio, [C, T].
        target: Original audio, same shape but for T; both are cut to the shorter.
        sample_rate: Sample rate of the audio in Hz.
        window_size: Size of the Hann window in samples; windows overlap by half.

    Returns:
        Frequencies in Hz, power of `estimate - target` and power of `target` per bin in dB, each [F] in
        float64. The powers of all bins add up to the mean square, averaged over channels.

    Raises:
        EarVAEError: Different channels, or fewer samples than one window.
    """
    num_samples = min(estimate.shape[-1], target.shape[-1])
    if estimate.ndim != 2 or estimate.shape[0] != target.shape[0] or num_samples < window_size:
        raise EarVAEError(
            f"a spectrum needs two signals [C, T] with equal channels and at least {window_size} samples, "
            f"got shapes {list(estimate.shape)} and {list(target.shape)}"
        )
    estimate, target = estimate[:, :num_samples], target[:, :num_samples]
    frequencies = torch.fft.rfftfreq(window_size, 1 / sample_rate, dtype=torch.float64)
    return (frequencies, *(_power_spectrum_db(audio, window_size) for audio in (estimate - target, target)))


def _settled(output: Tensor, sample_rate: int) -> Tensor:
    cut = round(_SETTLING_SECONDS * sample_rate)
    if output.ndim != 2 or output.shape[1] < 4 * cut or not bool(torch.isfinite(output).all()):
        raise EarVAEError(
            f"the system returned shape {list(output.shape)}; expected finite audio [C, T] of at least 1 s"
        )
    return output[:, cut : output.shape[1] - cut].double().cpu()


def _without_harmonics(
    audio: Tensor, frequency_hz: float, sample_rate: int, count: int
) -> tuple[Tensor, Tensor]:
    """Returns audio [C, T] without its first harmonics, and their amplitudes [C, count]."""
    angle = 2 * math.pi * frequency_hz / sample_rate * torch.arange(audio.shape[1], dtype=torch.float64)
    orders = torch.arange(1, count + 1, dtype=torch.float64)[:, None]
    waves = torch.cat((torch.cos(orders * angle), torch.sin(orders * angle)))
    weights = torch.linalg.solve(waves @ waves.T, waves @ audio.T).T
    return audio - weights @ waves, torch.hypot(weights[:, :count], weights[:, count:])


def _band_power(audio: Tensor, sample_rate: int) -> Tensor:
    """Returns the mean square of audio [C, T] from 20 Hz to 20 kHz."""
    num_samples = audio.shape[1]
    frequencies = torch.fft.rfftfreq(num_samples, 1 / sample_rate, dtype=torch.float64)
    inside = (frequencies >= _BAND_HZ[0]) & (frequencies <= _BAND_HZ[1])
    power = torch.fft.rfft(audio).abs().square()
    return 2 * power[:, inside].sum(dim=1) / num_samples**2


def _power_spectrum_db(audio: Tensor, window_size: int) -> Tensor:
    window = torch.hann_window(window_size, device=audio.device)
    scale = window_size * window.double().square().sum()
    total = torch.zeros(window_size // 2 + 1, dtype=torch.float64, device=audio.device)
    frames = audio.float().unfold(-1, window_size, window_size // 2)
    for block in frames.split(64, dim=1):
        total += torch.fft.rfft(block * window).abs().square().double().sum(dim=(0, 1))
    power = total / (scale * frames.shape[0] * frames.shape[1])
    power[1:-1] *= 2
    return 10 * power.clamp(min=_LOWEST_POWER).log10().cpu()
