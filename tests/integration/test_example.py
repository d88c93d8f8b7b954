"""The example piece is music worth coding, and its MIDI file is well formed and reproducible."""

import importlib.util
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import soundfile

from ear_vae.errors import EarVAEError


@pytest.fixture(scope="module")
def compose(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("compose", repository / "examples" / "compose.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def audio(piece: Path) -> np.ndarray:
    samples, sample_rate = soundfile.read(piece, always_2d=True)
    assert sample_rate == 44_100
    return samples


class Event(NamedTuple):
    tick: int
    status: int
    data: bytes


def parse_midi(midi: bytes) -> list[list[Event]]:
    """Reads a MIDI file without running status; meta events have their type as the first byte of `data`."""
    magic, size, file_format, num_tracks, division = struct.unpack(">4sIHHH", midi[:14])
    assert (magic, size, file_format, division) == (b"MThd", 6, 1, 480)
    position, tracks = 14, []

    def number() -> int:
        nonlocal position
        value = 0
        while True:
            byte = midi[position]
            position += 1
            value = value * 128 + byte % 128
            if byte < 128:
                return value

    while position < len(midi):
        assert midi[position : position + 4] == b"MTrk"
        end = position + 8 + int.from_bytes(midi[position + 4 : position + 8], "big")
        position, tick, events = position + 8, 0, []
        while position < end:
            tick += number()
            status = midi[position]
            position += 1
            assert status >= 0x80
            if status == 0xFF:
                kind = midi[position : position + 1]
                position += 1
                length = number()
            else:
                kind, length = b"", 1 if status >> 4 in (0xC, 0xD) else 2
            events.append(Event(tick, status, kind + midi[position : position + length]))
            position += length
        assert position == end, "a track chunk's length disagrees with its events"
        assert (events[-1].status, events[-1].data) == (0xFF, b"\x2f")
        tracks.append(events)
    assert len(tracks) == num_tracks
    return tracks


def test_piece_format(piece: Path, audio: np.ndarray) -> None:
    assert audio.shape[1] == 2
    assert 15 <= len(audio) / 44_100 <= 30
    assert piece.stat().st_size < 1_000_000


def test_piece_is_not_clipped_and_not_faint(audio: np.ndarray) -> None:
    peak = np.abs(audio).max()
    assert 0.5 < peak < 1.0
    assert np.count_nonzero(np.abs(audio) >= 0.999 * peak) < 5, "clipped before it was scaled"


def test_piece_is_wide_and_balanced(audio: np.ndarray) -> None:
    left, right = audio.T
    side_share = np.mean((left - right) ** 2) / np.mean((left + right) ** 2)
    assert 0.03 < side_share < 0.5
    assert abs(10 * np.log10(np.mean(left**2) / np.mean(right**2))) < 3


def test_piece_has_treble_in_both_channels(audio: np.ndarray) -> None:
    power = np.abs(np.fft.rfft(audio, axis=0)) ** 2
    frequencies = np.fft.rfftfreq(len(audio), 1 / 44_100)
    treble_db = 10 * np.log10(power[frequencies > 8_000].sum(axis=0) / power.sum(axis=0))
    assert (treble_db > -30).all()


def test_piece_ends_in_silence(audio: np.ndarray) -> None:
    assert np.abs(audio[-441:]).max() < 1e-3


def test_midi_is_the_same_in_another_process(repository: Path, compose: ModuleType) -> None:
    code = "import sys, compose; sys.stdout.buffer.write(compose.midi_bytes())"
    path = [str(repository / "examples"), *filter(None, sys.path)]
    setup = f"import sys; sys.path[:0] = {path!r}; "
    other = subprocess.run([sys.executable, "-c", setup + code], check=True, capture_output=True).stdout
    assert other == compose.midi_bytes() == compose.midi_bytes()


def test_midi_notes_are_paired_and_instruments_differ(compose: ModuleType) -> None:
    tracks = parse_midi(compose.midi_bytes())
    programs, pans = set(), set()
    for events in tracks[1:]:
        sounding: set[int] = set()
        num_notes = 0
        for event in events:
            kind = event.status >> 4
            if kind == 0x9:
                assert event.data[0] not in sounding, "a key is struck again before its note-off"
                assert 1 <= event.data[1] <= 127
                sounding.add(event.data[0])
                num_notes += 1
            elif kind == 0x8:
                sounding.remove(event.data[0])
            elif kind == 0xC:
                programs.add(event.data[0])
            elif kind == 0xB and event.data[0] == 10:
                pans.add(event.data[1])
        assert not sounding
        assert num_notes >= 8
    assert len(programs) == len(tracks) - 1 == 8
    assert min(pans) < 32
    assert max(pans) > 96


def test_piece_lasts_as_long_as_the_score(compose: ModuleType, audio: np.ndarray) -> None:
    tracks = parse_midi(compose.midi_bytes())
    tempi = [(e.tick, int.from_bytes(e.data[1:], "big")) for e in tracks[0] if e.data[:1] == b"\x51"]
    ends = {events[-1].tick for events in tracks}
    assert len(ends) == 1
    ticks = [tick for tick, _ in tempi] + list(ends)
    seconds = sum((b - a) / 480 * us / 1e6 for (a, us), b in zip(tempi, ticks[1:], strict=True))
    assert len(audio) / 44_100 == pytest.approx(seconds, abs=0.01)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "00"), (0x7F, "7f"), (0x80, "8100"), (0x3FFF, "ff7f"), (0x0FFFFFFF, "ffffff7f")],
)
def test_variable_length_examples_of_the_midi_standard(
    compose: ModuleType, value: int, expected: str
) -> None:
    assert compose.variable_length(value).hex() == expected


def test_event_after_the_end_is_refused(compose: ModuleType) -> None:
    with pytest.raises(ValueError, match="after END_BEAT"):
        compose.track([(100_000, b"\x90\x40\x40")])


def test_missing_tools_are_named(
    compose: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wav = tmp_path / "piece.wav"
    monkeypatch.setattr(compose.shutil, "which", lambda name: None)
    with pytest.raises(EarVAEError, match="fluidsynth was not found"):
        compose.render(b"", soundfont=tmp_path, wav=wav)
    monkeypatch.setattr(compose.shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(EarVAEError, match=r"no soundfont at .*absent\.sf2.*--soundfont"):
        compose.render(b"", soundfont=tmp_path / "absent.sf2", wav=wav)


def test_unwritable_destination_and_silence_are_named(compose: ModuleType, tmp_path: Path) -> None:
    wav = tmp_path / "render.wav"
    soundfile.write(wav, np.full((88_200, 2), 0.1), 44_100)
    with pytest.raises(EarVAEError, match=r"cannot write .*absent.*--out"):
        compose.encode(wav, tmp_path / "absent" / "piece.ogg")
    soundfile.write(wav, np.zeros((88_200, 2)), 44_100)
    with pytest.raises(EarVAEError, match="silent"):
        compose.encode(wav, tmp_path / "piece.ogg")
