"""Comparing one pair of files; differences in length, rate, channels and time are handled and noted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ear_vae.audio import read_audio
from ear_vae.dsp.loudness import SHORTEST_SECONDS
from ear_vae.dsp.resampling import resample
from ear_vae.errors import EarVAEError
from ear_vae.evaluation.metrics import METRICS, measure, why_undefined
from ear_vae.evaluation.pairs import Pair
from ear_vae.evaluation.spectra import SHORTEST_SAMPLES, SPECTRAL_RATE
from ear_vae.evaluation.systems.base import System, rebuild

# What the metrics of loudness and peak are the differences of.
QUANTITIES = tuple(
    f"{name}_{side}"
    for name in ("lufs", "loudness_range_lu", "true_peak_dbtp")
    for side in ("estimate", "target")
)
LONGEST_DELAY_SECONDS = 0.1
_NOTED_SECONDS = 0.1
_CORRELATED_SECONDS = 30
# A delay is noted where taking it out makes the signals at least this much more alike.
_NOTED_RATIO = 1.02
# Different pieces have a normalised cross-correlation of some hundredths at best.
_LOWEST_CORRELATION = 0.1

_HIGHEST_INTEGER = 2**63

Row = dict[str, Any]


def compare_files(pair: Pair, *, align: bool, system: System | None = None) -> Row:
    """Measures one pair.

    Both signals are cut to the length of the shorter; SI-SDR and spectral metrics are computed at 44.1 kHz,
    loudness and peaks at each file's own rate; mono is duplicated where the other file is stereo. `notes` say
    what was done, and which metrics have no value.

    Args:
        pair: Files to compare.
        align: Take out a delay of up to 100 ms; otherwise it is only measured.
        system: System that makes the estimate where the pair has none.

    Returns:
        `name`, rates in Hz, lengths in seconds, `channels`, `delay_ms` (positive where the estimate is
        late), every one of `METRICS` and `QUANTITIES` as a finite number or None, and `notes`.

    Raises:
        EarVAEError: A file cannot be read, or the system fails.
    """
    target, rate = read_audio(pair.target)
    if pair.estimate is not None:
        estimate, estimate_rate = read_audio(pair.estimate)
    elif system is not None:
        estimate, estimate_rate = rebuild(system, target, rate), rate
    else:
        raise EarVAEError(f"{pair.name}: neither an estimate nor a system to make it")
    notes: list[str] = []
    seconds = target.shape[1] / rate, estimate.shape[1] / estimate_rate
    if estimate.shape[0] != target.shape[0]:
        mono = "estimate" if estimate.shape[0] == 1 else "target"
        notes.append(f"the {mono} is mono and was duplicated")
        estimate, target = estimate.expand(2, -1), target.expand(2, -1)
    if estimate_rate != rate:
        notes.append(f"the estimate is at {estimate_rate} Hz, the target at {rate} Hz")
    if abs(seconds[1] - seconds[0]) > _NOTED_SECONDS:
        lengths = f"the estimate lasts {seconds[1]:.2f} s, the target {seconds[0]:.2f} s"
        notes.append(f"{lengths}; cut to the shorter")
    delay = delay_seconds(estimate, estimate_rate, target, rate)
    if delay and align:
        estimate = estimate[:, max(0, round(delay * estimate_rate)) :]
        target = target[:, max(0, round(-delay * rate)) :]
        notes.append(f"a delay of {1000 * delay:.2f} ms was taken out")
    elif delay:
        late = "late" if delay > 0 else "early"
        notes.append(f"the estimate seems {1000 * abs(delay):.2f} ms {late}; alignment takes that out")
    found = figures(estimate, estimate_rate, target, rate, notes)
    return {
        "name": pair.name,
        "sample_rate": rate,
        "estimate_sample_rate": estimate_rate,
        "seconds": seconds[0],
        "estimate_seconds": seconds[1],
        "channels": target.shape[0],
        "delay_ms": 1000 * delay,
        **found,
        "notes": notes,
    }


def is_row(value: Any) -> bool:
    """Whether a value from a file is what `compare_files` returns, with the `system` added."""
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), str) and value[name] for name in ("name", "system"))
        and all(name in value and _is_figure(value[name]) for name in (*METRICS, *QUANTITIES))
        and isinstance(value.get("notes"), list)
        and all(isinstance(note, str) for note in value["notes"])
    )


def _is_figure(value: Any) -> bool:
    if value is None or (isinstance(value, float) and math.isfinite(value)):
        return True
    # JSON has integers of any size.
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _HIGHEST_INTEGER


def file_identity(path: Path | None) -> list[str | int] | None:
    """Returns path, size and modification time, which change when a file does; None without a file."""
    if path is None:
        return None
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def figures(
    estimate: Tensor, estimate_rate: int, target: Tensor, rate: int, notes: list[str]
) -> dict[str, float | None]:
    """Measures audio with equal numbers of channels.

    Args:
        estimate: Rebuilt audio, [C, T].
        estimate_rate: Sample rate of the estimate in Hz.
        target: Original audio, [C, T].
        rate: Sample rate of the target in Hz.
        notes: List to which the reason is appended for each metric that has no value.

    Returns:
        Every one of `METRICS` and `QUANTITIES`; None where it has no value.
    """
    seconds = min(estimate.shape[1] / estimate_rate, target.shape[1] / rate)
    left_out: dict[str, tuple[str, ...]] = {}
    if math.floor(seconds * SPECTRAL_RATE) < SHORTEST_SAMPLES:
        reason = f"needs {1000 * SHORTEST_SAMPLES / SPECTRAL_RATE:.0f} ms of audio"
        left_out[reason] = ("mel_distance", "stft_distance", "icpc", "ccpc")
    elif target.shape[0] == 1:
        left_out["needs two channels"] = ("ccpc",)
    if seconds < SHORTEST_SECONDS:
        reason = f"needs {SHORTEST_SECONDS} s of audio"
        left_out[reason] = ("loudness_distance_lu", "loudness_range_distance_lu")
    notes += [f"{', '.join(theirs)}: {reason}" for reason, theirs in left_out.items()]
    names = [name for name in METRICS if not any(name in theirs for theirs in left_out.values())]
    found = measure(estimate, target, sample_rate=rate, estimate_sample_rate=estimate_rate, names=names)
    values = {name: float(value) for name, value in found.items()}
    for name in names:
        if not math.isfinite(values[name]):
            notes.append(f"{name} is undefined: {why_undefined(name)}")
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    return {name: finite.get(name) for name in (*METRICS, *QUANTITIES)}


def delay_seconds(estimate: Tensor, estimate_rate: int, target: Tensor, rate: int) -> float:
    """Measures by how much the estimate is late, from the cross-correlation of 30 s in the middle of both.

    Args:
        estimate: Rebuilt audio, [C, T].
        estimate_rate: Sample rate of the estimate in Hz.
        target: Original audio, [C, T].
        rate: Sample rate of the target in Hz.

    Returns:
        The delay in seconds at the highest cross-correlation of either sign, within 100 ms; negative where
        the estimate is early, 0 where no delay makes the two clearly more alike, or where they are not alike.
    """
    num_samples = min(target.shape[1], round(estimate.shape[1] * rate / estimate_rate))
    length = min(num_samples, _CORRELATED_SECONDS * rate)
    start = (num_samples - length) // 2
    first = start * estimate_rate // rate
    excerpt = estimate[:, first : first + -(-length * estimate_rate // rate)].sum(dim=0)
    y = target[:, start : start + length].sum(dim=0)
    x = resample(excerpt, estimate_rate, rate)[:length]
    longest = min(round(LONGEST_DELAY_SECONDS * rate), length - 1)
    num_points = 1 << (2 * length - 1).bit_length()
    spectrum = torch.fft.rfft(x, num_points) * torch.fft.rfft(y, num_points).conj()
    # Lags from -longest to +longest.
    correlation = torch.fft.irfft(spectrum, num_points).roll(longest)[: 2 * longest + 1].abs()
    best = int(correlation.argmax())
    energy = float(x.norm() * y.norm())
    least = max(_NOTED_RATIO * float(correlation[longest]), _LOWEST_CORRELATION * energy)
    if float(correlation[best]) <= least:
        return 0.0
    return (best - longest) / rate
