"""Music made of arithmetic, where a notebook needs more than the piece that comes with the package."""

import math
import random

import torch
from torch import Tensor

SAMPLE_RATE = 44_100
# Semitones above the root of each chord, and the notes that go with all four.
_CHORDS = ((0, 4, 7, 11), (-3, 0, 4, 7), (-7, -3, 0, 5), (-5, -1, 2, 7))
_SCALE = (0, 2, 4, 7, 9, 12, 14, 16, 19)


def tune(seed: int, seconds: float = 8.0, *, brightness: float = 0.7, brushes: bool = True) -> Tensor:
    """Composes a tune for plucked strings, bass and brushes, and plays it.

    Args:
        seed: Number that decides key, tempo and notes.
        seconds: Length in seconds.
        brightness: How strong high partials are: 0.7 sounds like a harpsichord, 0 like a muffled piano.
        brushes: Whether brushes play along.

    Returns:
        [2, T] in float32 at 44 100 Hz, peak 0.7.
    """
    dice = random.Random(seed)
    noise = torch.Generator().manual_seed(seed)
    step = 60 / dice.uniform(90, 130) / 4  # a sixteenth, in seconds
    root = 110 * 2 ** (dice.randrange(12) / 12)
    audio = torch.zeros(2, round((seconds + 2) * SAMPLE_RATE))
    melody = 4
    for sixteenth in range(int(seconds / step)):
        chord = _CHORDS[sixteenth // 16 % 4]
        start = sixteenth * step
        if sixteenth % 2 == 0:
            _add(audio, start, _pluck(4 * root, chord[sixteenth // 2 % 4] - 12, 0.8, brightness), pan=-0.6)
        if sixteenth % 4 in (0, 3) and dice.random() < 0.8:
            melody = min(max(melody + dice.choice((-2, -1, 1, 2)), 0), len(_SCALE) - 1)
            _add(audio, start, _pluck(4 * root, _SCALE[melody], 1.4, brightness), pan=0.4)
        if sixteenth % 8 in (0, 6):
            _add(audio, start, 1.6 * _pluck(root, chord[0] - 12, 0.9, brightness - 0.4), pan=0.0)
        if brushes and sixteenth % 4 == 2:
            hiss = torch.randn(round(0.12 * SAMPLE_RATE), generator=noise)
            _add(audio, start, 0.25 * torch.diff(hiss) * _decay(len(hiss) - 1, 0.02), pan=0.2)
    audio = audio[:, : round(seconds * SAMPLE_RATE)]
    end = round(0.2 * SAMPLE_RATE)
    audio[:, -end:] *= torch.linspace(1, 0, end)
    # No recording is digitally silent between its notes.
    hiss = 1e-4 * torch.randn(audio.shape, generator=noise)
    return 0.7 * audio / audio.abs().max() + hiss


def _pluck(hertz: float, semitones: int, seconds: float, brightness: float) -> Tensor:
    """Makes a plucked string: partials whose level falls with their number, high ones soonest."""
    hertz *= 2 ** (semitones / 12)
    time = torch.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    count = min(40, int(16_000 / hertz))
    number = torch.arange(1, count + 1)[:, None]
    level = number ** -(1.6 - brightness) * torch.exp(-time * (2 + (1.5 - brightness) * number))
    note = (level * torch.sin(2 * math.pi * hertz * number * time)).sum(dim=0)
    return note * (1 - torch.exp(-time / 0.001)) * torch.linspace(1, 0, len(time)).clamp(max=0.1) * 10


def _decay(length: int, seconds: float) -> Tensor:
    return torch.exp(-torch.arange(length) / (seconds * SAMPLE_RATE))


def _add(audio: Tensor, start: float, note: Tensor, *, pan: float) -> None:
    """Adds a note in place, `pan` from -1 (left) to 1 (right) at constant power."""
    first = round(start * SAMPLE_RATE)
    note = note[: audio.shape[1] - first]
    angle = math.pi / 4 * (1 + pan)
    audio[0, first : first + len(note)] += math.cos(angle) * note
    audio[1, first : first + len(note)] += math.sin(angle) * note
