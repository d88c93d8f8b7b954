"""Random segments of audio files, each determined by the seed and its number alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ear_vae.audio import read_audio
from ear_vae.dsp.resampling import resample
from ear_vae.errors import EarVAEError
from ear_vae.training.data.sources import AudioFile

_LOG = logging.getLogger(__name__)
# Samples read around a segment that has to be resampled, so that its edges see their neighbours.
_RESAMPLING_CONTEXT = 512
# Draws for a segment that is loud enough, or not mono, before the last one is taken as it is.
_MOST_DRAWS = 16
_MOST_FAILURES = 200
# Where the treble begins that an augmentation lowers: from there on at 12 dB per octave at most.
_TREBLE_HZ = (500.0, 4000.0)


@dataclass(frozen=True)
class Augmentation:
    """Changes segments, both channels alike, so that the phase between them keeps its meaning.

    Args:
        gain_db: Largest attenuation; it is drawn uniformly in dB from 0 to this.
        swap_channels: Probability of exchanging left and right.
        invert_polarity: Probability of inverting the polarity of both channels.
        speed: Largest change of speed, as a fraction: 0 for none, at least 0.01 otherwise; drawn in steps of
            one per cent, and like that of a tape it changes pitch and tempo together.
        treble_db: Largest attenuation of the treble, by a shelf that begins between 500 Hz and 4 kHz; drawn
            uniformly in dB from 0 to this. Music that is all bright does not teach how dark recordings sound.

    Raises:
        EarVAEError: A value is out of range.
    """

    gain_db: float = 6.0
    swap_channels: float = 0.5
    invert_polarity: float = 0.5
    speed: float = 0.0
    treble_db: float = 0.0

    def __post_init__(self) -> None:
        for name in ("gain_db", "treble_db"):
            if not 0 <= getattr(self, name) < math.inf:
                raise EarVAEError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("swap_channels", "invert_polarity"):
            if not 0 <= getattr(self, name) <= 1:
                raise EarVAEError(f"{name} must be a probability, got {getattr(self, name)}")
        if self.speed and not 0.01 <= self.speed <= 0.5:
            raise EarVAEError(f"speed must be 0, or from 0.01 to 0.5, got {self.speed}")

    def speed_percent(self, random: np.random.Generator) -> int:
        """Draws a speed in per cent, 100 for the original one."""
        # Rounded down, and never beyond what was asked for; 0.29 * 100 is a little below 29.
        steps = math.floor(100 * self.speed + 1e-6)
        return 100 + int(random.integers(-steps, steps + 1)) if steps else 100

    def __call__(self, segment: Tensor, random: np.random.Generator, sample_rate: int) -> Tensor:
        """Changes all but the speed of a segment [2, T]."""
        gain_db, swap, flip = random.random(3)
        if self.treble_db:
            depth, begin = random.random(2)
            lowest, highest = _TREBLE_HZ
            hz = lowest * (highest / lowest) ** float(begin)
            segment = _lower_treble(
                segment, float(depth) * self.treble_db, min(hz, sample_rate / 4), sample_rate
            )
        gain = 10 ** (-self.gain_db * gain_db / 20) * (-1 if flip < self.invert_polarity else 1)
        return float(gain) * (segment.flip(0) if swap < self.swap_channels else segment)


def _lower_treble(segment: Tensor, by_db: float, from_hz: float, sample_rate: int) -> Tensor:
    """Applies two shelves of first order, one after the other, to a segment [2, T]."""
    num_samples = segment.shape[1]
    # Their responses have died away after that, and do not come round to the beginning.
    num_points = num_samples + round(10 * sample_rate / from_hz)
    # (1 + gs)/(1 + s) by the bilinear transform: s = k (1 - z⁻¹)/(1 + z⁻¹).
    delay = torch.exp(-2j * math.pi * torch.fft.rfftfreq(num_points))
    rising = (1 - delay) / math.tan(math.pi * from_hz / sample_rate)
    response = ((1 + delay + 10 ** (-by_db / 40) * rising) / (1 + delay + rising)) ** 2
    return torch.fft.irfft(torch.fft.rfft(segment, num_points) * response, num_points)[:, :num_samples]


class SegmentDataset(Dataset[Tensor]):
    """Draws random segments of files; item `index` is always the same for one seed and one list of files.

    A file is drawn with a probability proportional to its duration times its weight, and a position in it
    uniformly. The segment is read by seeking and resampled if needed; mono files become stereo. Where a file
    turns out to be unreadable it is reported, once by each process, and another segment is drawn.

    Args:
        files: Files to draw from, none shorter than a segment.
        sample_rate: Sample rate of the segments in Hz.
        segment_samples: Length of a segment in samples.
        seed: Seed that fixes which segment an index stands for.
        augmentation: Changes to the segments; None for none.
        min_level_db: Lowest root mean square of a segment in dB relative to full scale; quieter ones are
            drawn again.
        mono: Treatment of segments with two equal channels: `skip` draws them again.
        length: Length that `len` returns; every index is valid.
    """

    def __init__(
        self,
        files: Sequence[AudioFile],
        *,
        sample_rate: int,
        segment_samples: int,
        seed: int,
        augmentation: Augmentation | None = None,
        min_level_db: float | None = None,
        mono: Literal["duplicate", "skip"] = "duplicate",
        length: int = 2**31,
    ) -> None:
        self.files = files
        self.sample_rate = sample_rate
        self.segment_samples = segment_samples
        self.seed = seed
        self.augmentation = augmentation
        self.min_level = 0.0 if min_level_db is None else 10 ** (min_level_db / 20)
        self.mono = mono
        self._length = length
        # Relative to the largest, so that no sum of weights overflows.
        largest = max(file.weight for file in files)
        shares = np.cumsum([file.duration_seconds * (file.weight / largest) for file in files])
        self._shares = shares / shares[-1]
        self._reported: set[int] = set()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        """Reads segment `index`, [2, segment_samples].

        Raises:
            EarVAEError: 200 segments that were drawn could not be read.
        """
        random = np.random.default_rng((self.seed, index))
        segment: Tensor | None = None
        draws, failures = 0, 0
        while draws < _MOST_DRAWS:
            number = int(np.searchsorted(self._shares, random.random(), side="right"))
            position = float(random.random())
            percent = 100 if self.augmentation is None else self.augmentation.speed_percent(random)
            try:
                segment = self._read(self.files[number], position, percent)
            except EarVAEError as error:
                # The file can be drawn again: a process that has not come across its damage must draw the
                # same segments as one that has.
                failures += 1
                self._report(number, error, failures)
                continue
            draws += 1
            if self._is_wanted(segment):
                break
        assert segment is not None
        return segment if self.augmentation is None else self.augmentation(segment, random, self.sample_rate)

    def _report(self, number: int, error: EarVAEError, failures: int) -> None:
        if failures == _MOST_FAILURES:
            raise EarVAEError(
                f"none of {failures} segments drawn from {len(self.files)} training files could be read; the "
                f"last one: {error}"
            ) from error
        if number not in self._reported:
            _LOG.warning("not trained on, where it cannot be read: %s", error)
            self._reported.add(number)

    def _is_wanted(self, segment: Tensor) -> bool:
        if self.mono == "skip" and torch.equal(segment[0], segment[1]):
            return False
        return self.min_level == 0 or float(segment.square().mean().sqrt()) >= self.min_level

    def _read(self, file: AudioFile, position: float, percent: int) -> Tensor:
        """Reads a segment [2, segment_samples] at a relative position, played at `percent` of the speed."""
        rate, target_rate = file.sample_rate, self.sample_rate
        if percent != 100:
            rate, target_rate = rate * percent, target_rate * 100
        length = min(file.num_samples, -(-self.segment_samples * rate // target_rate))
        start = int(position * (file.num_samples - length + 1))
        if rate == target_rate:
            audio, _ = read_audio(file.path, start=start, num_samples=length)
        else:
            before = min(start, _RESAMPLING_CONTEXT)
            audio, _ = read_audio(
                file.path, start=start - before, num_samples=before + length + _RESAMPLING_CONTEXT
            )
            audio = resample(audio, rate, target_rate)
            audio = audio[:, before * target_rate // rate :]
        audio = audio[:, : self.segment_samples]
        audio = torch.nn.functional.pad(audio, (0, self.segment_samples - audio.shape[1]))
        return audio.expand(2, -1) if audio.shape[0] == 1 else audio


class MiddleExcerpts(Dataset[Tensor]):
    """The middle of each of some files, [2, T], to validate on.

    Args:
        files: Files that are not shorter than an excerpt.
        sample_rate: Sample rate of the excerpts in Hz.
        seconds: Length of an excerpt.
    """

    def __init__(self, files: Sequence[AudioFile], sample_rate: int, seconds: float) -> None:
        self.files, self.sample_rate, self.seconds = files, sample_rate, seconds

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        """Reads the excerpt of a file."""
        file = self.files[index]
        length = int(self.seconds * file.sample_rate)
        audio, _ = read_audio(file.path, start=(file.num_samples - length) // 2, num_samples=length)
        audio = resample(audio, file.sample_rate, self.sample_rate)
        return audio.expand(2, -1) if audio.shape[0] == 1 else audio
