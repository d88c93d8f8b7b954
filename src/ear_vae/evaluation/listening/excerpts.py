"""Excerpts to listen to: chosen from the originals, rebuilt by every system, brought to one level, measured.

Which files: all if there are few, otherwise evenly spaced ones, from the first to the last in the given
order. Where in a file: where it is loudest, so that the choice favours no system; for several excerpts, a
file is cut into as many equal parts, and the loudest place of each is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ear_vae.audio import audio_info, read_audio
from ear_vae.dsp.loudness import SHORTEST_SECONDS, Loudness
from ear_vae.dsp.resampling import resample
from ear_vae.dsp.stereo import side_to_mid_db, stereo_correlation
from ear_vae.errors import EarVAEError
from ear_vae.evaluation.files import delay_seconds, figures
from ear_vae.evaluation.runner import Task
from ear_vae.evaluation.systems.base import rebuild

ORIGINAL = "Original"
# Every browser plays this rate, and ears need no more.
HIGHEST_RATE = 48_000
LARGEST_GAIN_DB = 20.0
# Excerpts start on whole tenths of a second, which are whole samples at all usual rates.
_STEPS_PER_SECOND = 10
# Audio that models and resampling see on either side of an excerpt.
_MARGIN_SECONDS = 1


@dataclass(frozen=True)
class ExcerptSpan:
    """Part of an original.

    Attributes:
        name: Name of the file.
        target: Path of the original.
        start_seconds: Start in seconds, in whole tenths.
        seconds: Length in seconds; it may go past the end of the file.
    """

    name: str
    target: Path
    start_seconds: float
    seconds: float


@dataclass(frozen=True)
class Signal:
    """Audio of an excerpt: that of the original, or of one system.

    Attributes:
        name: `ORIGINAL`, or the name of the system.
        audio: [C, T], as many channels and samples as all others of the excerpt.
        gain_db: Gain in dB that brings it to the original's integrated loudness.
        correlation: Correlation of left and right, None where it has no value.
        side_db: Energy of the side relative to that of the mid in dB, None where it has no finite value.
        figures: Figures of `ear_vae.evaluation.files.figures`; empty for the original.
        notes: Remarks for the listener.
    """

    name: str
    audio: Tensor
    gain_db: float = 0.0
    correlation: float | None = None
    side_db: float | None = None
    figures: dict[str, float | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Excerpt:
    """An excerpt of an original, and what the systems made of it.

    Attributes:
        span: Part of the original that it holds.
        sample_rate: Sample rate of all signals in Hz.
        signals: Signals of the original, then of the systems in their order.
    """

    span: ExcerptSpan
    sample_rate: int
    signals: tuple[Signal, ...]

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return self.signals[0].audio.shape[1] / self.sample_rate

    def shortened(self, seconds: float) -> Excerpt:
        """Returns its first seconds."""
        num_samples = max(1, int(seconds * self.sample_rate))
        cut = (replace(signal, audio=signal.audio[:, :num_samples]) for signal in self.signals)
        return replace(self, signals=tuple(cut))


def evenly_spaced(count: int, available: int) -> list[int]:
    """Returns `count` indices below `available`, with the first and the last, or all if there are fewer."""
    if count >= available:
        return list(range(available))
    if count == 1:
        return [0]
    return [round(index * (available - 1) / (count - 1)) for index in range(count)]


def choose_spans(originals: Sequence[tuple[str, Path]], *, count: int, seconds: float) -> list[ExcerptSpan]:
    """Chooses parts of originals to listen to, always the same for the same files.

    Args:
        originals: Names and files, in the order to choose from.
        count: Number of excerpts; there are fewer where the files are too few and too short.
        seconds: Length of each in seconds.

    Raises:
        EarVAEError: A file cannot be read.
    """
    chosen = [originals[index] for index in evenly_spaced(count, len(originals))]
    spans = []
    for index, (name, target) in enumerate(chosen):
        several = count // len(chosen) + (index < count % len(chosen))
        audio, sample_rate = read_audio(target)
        parts = max(1, min(several, int(audio.shape[1] / sample_rate / seconds)))
        spans += [
            ExcerptSpan(name, target, start, seconds) for start in loudest(audio, sample_rate, seconds, parts)
        ]
    return spans


def loudest(audio: Tensor, sample_rate: int, seconds: float, parts: int = 1) -> list[float]:
    """Finds where the loudest stretch begins in each of equal parts, in seconds.

    Args:
        audio: Audio to search, [C, T].
        sample_rate: Sample rate of `audio` in Hz.
        seconds: Length of a stretch in seconds.
        parts: Number of parts; they must be as long as a stretch, unless there is only one.
    """
    if audio.shape[1] < SHORTEST_SECONDS * sample_rate:
        return [0.0] * parts
    powers = Loudness(audio, sample_rate).powers
    length = max(1, min(round(seconds * _STEPS_PER_SECOND), len(powers) // parts))
    starts = []
    for part in range(parts):
        first, stop = len(powers) * part // parts, len(powers) * (part + 1) // parts
        sums = powers[first:stop].unfold(0, length, 1).sum(dim=-1)
        starts.append((first + int(sums.argmax())) / _STEPS_PER_SECOND)
    return starts


def cut(span: ExcerptSpan, tasks: Sequence[Task]) -> Excerpt:
    """Cuts an excerpt out of the original and of every system's audio, without measuring it.

    Args:
        span: Part of an original.
        tasks: One comparison for each system, with a file to read or a model to run, all of the
            span's file.

    Raises:
        EarVAEError: A file that cannot be read or ends before the excerpt, or a system's failure.
    """
    rate = min(audio_info(span.target).sample_rate, HIGHEST_RATE)
    target = _read_span(span.target, span.start_seconds, span.seconds, rate)
    # At the end of a file there may be less than was asked for.
    target = target[:, : max(1, round((_duration(span.target) - span.start_seconds) * rate))]
    signals = [Signal(ORIGINAL, target)]
    for task in tasks:
        audio, notes = _estimate(span, task, target, rate)
        signals.append(Signal(task.system_name, audio, notes=tuple(notes)))
    channels = max(signal.audio.shape[0] for signal in signals)
    return Excerpt(span, rate, tuple(_with_channels(signal, channels) for signal in signals))


def measured(excerpt: Excerpt) -> Excerpt:
    """Returns the excerpt with gains, figures and notes.

    Raises:
        EarVAEError: A system's audio holds NaN.
    """
    target = excerpt.signals[0].audio
    signals = [_with_stereo(excerpt.signals[0])]
    for signal in excerpt.signals[1:]:
        notes = list(signal.notes)
        found = figures(signal.audio, excerpt.sample_rate, target, excerpt.sample_rate, notes)
        theirs, ours = found["lufs_target"], found["lufs_estimate"]
        gain_db = 0.0
        if theirs is None or ours is None:
            notes.append("its level was not matched: there is no loudness to compare")
        else:
            gain_db = max(-LARGEST_GAIN_DB, min(LARGEST_GAIN_DB, theirs - ours))
            if gain_db != theirs - ours:
                notes.append(f"its level would need {theirs - ours:+.1f} dB to match")
        matched = replace(signal, gain_db=gain_db, figures=found, notes=tuple(notes))
        signals.append(_with_stereo(matched))
    return replace(excerpt, signals=tuple(signals))


def _estimate(span: ExcerptSpan, task: Task, target: Tensor, rate: int) -> tuple[Tensor, list[str]]:
    """Returns audio [C, T] as long as the target, and notes on what was done to it."""
    notes: list[str] = []
    num_samples = target.shape[1]
    if task.pair.estimate is None:
        if task.system is None:
            raise EarVAEError(f"{span.name}: neither an estimate nor a system to make it")
        start = span.start_seconds - _MARGIN_SECONDS
        wide = _read_span(span.target, start, span.seconds + 2 * _MARGIN_SECONDS, rate)
        before = _MARGIN_SECONDS * rate
        return rebuild(task.system, wide, rate)[:, before : before + num_samples], notes
    path = task.pair.estimate
    own_rate = audio_info(path).sample_rate
    seconds = num_samples / rate
    missing = span.start_seconds + seconds - _duration(path)
    if missing >= seconds:
        raise EarVAEError(f"{path}: ends before the excerpt at {span.start_seconds:.1f} s")
    if missing > 1 / _STEPS_PER_SECOND:
        notes.append(f"it ends {missing:.2f} s before the excerpt does")
    if own_rate != rate:
        notes.append(f"it is at {own_rate} Hz and was resampled to {rate} Hz")
    audio = _read_span(path, span.start_seconds, seconds, rate)[:, :num_samples]
    delay = delay_seconds(audio, rate, target, rate)
    if delay and task.align:
        audio = _read_span(path, span.start_seconds + delay, seconds, rate)[:, :num_samples]
        notes.append(f"a delay of {1000 * delay:.2f} ms was taken out")
    elif delay:
        late = "late" if delay > 0 else "early"
        notes.append(f"it seems {1000 * abs(delay):.2f} ms {late}; alignment takes that out")
    return audio, notes


def _with_channels(signal: Signal, channels: int) -> Signal:
    if signal.audio.shape[0] == channels:
        return signal
    notes = (*signal.notes, "it is mono and was duplicated")
    return replace(signal, audio=signal.audio.expand(channels, -1), notes=notes)


def _duration(path: Path) -> float:
    return audio_info(path).duration_seconds


def _read_span(path: Path, start_seconds: float, seconds: float, rate: int) -> Tensor:
    """Reads audio [C, T] of a file at a rate, with zeros beyond its ends."""
    own_rate = audio_info(path).sample_rate
    margin = _MARGIN_SECONDS * own_rate
    first = round(start_seconds * own_rate) - margin
    wanted = math.ceil(seconds * own_rate) + 2 * margin
    start = max(0, first)
    audio, _ = read_audio(path, start=start, num_samples=wanted - (start - first))
    before = start - first
    audio = torch.nn.functional.pad(audio, (before, wanted - before - audio.shape[1]))
    resampled = resample(audio, own_rate, rate)
    return resampled[:, _MARGIN_SECONDS * rate :][:, : round(seconds * rate)]


def _with_stereo(signal: Signal) -> Signal:
    if signal.audio.shape[0] < 2:
        return signal
    alike, side_db = float(stereo_correlation(signal.audio)), float(side_to_mid_db(signal.audio))
    return replace(
        signal,
        correlation=alike if math.isfinite(alike) else None,
        side_db=side_db if math.isfinite(side_db) else None,
    )
