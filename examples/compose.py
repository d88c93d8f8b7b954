"""Compose, render and encode `piece.ogg`, a short stereo piece to try the package on.

    python examples/compose.py [--soundfont PATH] [--out PATH]

The score below is original. It becomes a Standard MIDI File in plain Python, `fluidsynth` plays it through a
General MIDI soundfont, and soundfile encodes the result as Ogg Vorbis.
Needs numpy, soundfile (both come with ear-vae) and fluidsynth with a soundfont; see examples/README.md.
"""

import argparse
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from ear_vae.errors import EarVAEError

SAMPLE_RATE = 44_100
TICKS_PER_BEAT = 480
BEATS_PER_BAR = 4
END_BEAT = 43.0
TEMPI = ((0.0, 108.0), (34.0, 103.0), (35.0, 94.0), (36.0, 100.0))  # (beat, beats per minute)
PEAK_DBFS = -1.8  # Vorbis moves peaks and true peaks exceed samples; this keeps the true peak below -1 dBTP
FADE_SECONDS = 1.5
DEFAULT_SOUNDFONT = Path("/usr/share/sounds/sf2/FluidR3_GM.sf2")
DEFAULT_OUT = Path(__file__).with_name("piece.ogg")
VORBIS_COMPRESSION = 0.3  # soundfile's scale from 0 (largest) to 1; 0.3 is Vorbis quality 7

EXPRESSION = 11  # MIDI controller numbers
VOLUME, PAN, REVERB = 7, 10, 91


class Note(NamedTuple):
    """One note: `start` and `length` in beats from the start of the piece, `key` and `velocity` 1 to 127."""

    start: float
    length: float
    key: int
    velocity: int


class Part(NamedTuple):
    """One instrument. Program, pan (64 is the centre), volume, reverb and swell values go from 0 to 127.

    `swell` holds (beat, expression) corner points; the expression moves in straight lines between them.
    """

    name: str
    channel: int
    program: int
    pan: int
    volume: int
    reverb: int
    notes: list[Note]
    swell: tuple[tuple[float, int], ...] = ((0.0, 127),)


# ---------------------------------------------------------------------------------------------- the score
# E minor turning to G major, ten bars of 4/4. PITCH:BEATS; "-" is a rest, "+" joins a chord.
CHORDS = ("Em9", "Cmaj9", "Em9", "Cmaj9", "G/B", "Dsus D", "Am9", "Bm7", "Cmaj7 D7sus", "Gmaj9")
VOICINGS = {
    "Em9": "G3+B3+D4+F#4", "Cmaj9": "G3+B3+D4+E4", "G/B": "A3+B3+D4+G4", "Dsus": "A3+D4+G4", "D": "A3+D4+F#4",
    "Am9": "G3+B3+C4+E4", "Bm7": "A3+B3+D4+F#4", "Cmaj7": "G3+B3+C4+E4", "D7sus": "A3+C4+D4+G4",
    "Gmaj9": "A3+B3+D4+F#4",
}  # fmt: skip
GUITAR_TONES = {
    "Em9": "E3+B3+F#4+G4+B4", "Cmaj9": "C3+G3+D4+E4+B4", "G/B": "B2+G3+D4+G4+A4", "Dsus": "D3+A3+D4+G4+A4",
    "D": "D3+A3+D4+F#4+A4", "Am9": "A2+E3+C4+E4+B4", "Bm7": "B2+F#3+D4+F#4+A4", "Cmaj7": "C3+G3+C4+E4+B4",
    "D7sus": "D3+A3+C4+G4+A4", "Gmaj9": "G2+D3+B3+F#4+A4",
}  # fmt: skip
GUITAR_PATTERN = (0, 2, 1, 3, 4, 3, 1, 2)  # which of the five tones, in eighth notes
BASS = (
    "-:4", "-:3 C2:.5 D2:.5", "E2:1.5 E2:.5 G2:.5 F#2:.5 E2:.5 D2:.5",
    "C2:1.5 C2:.5 G1:.5 C2:.5 E2:.5 C2:.5", "B1:1.5 B1:.5 G1:1 B1:.5 C2:.5",
    "D2:1.5 D2:.5 A1:1 C2:.5 B1:.5", "A1:1 A1:.5 A1:.5 E2:.5 G2:.5 E2:.5 A1:.5",
    "B1:1 B1:.5 B1:.5 F#2:.5 A2:.5 F#2:.5 B1:.5", "C2:.75 C2:.75 G2:.5 D2:.75 D2:.75 F#1:.5",
    "G1:5",
)  # fmt: skip
FLUTE = (
    "-:4", "-:2.5 B4:.5 D5:.5 E5:.5", "F#5:1.5 E5:.5 D5:.75 B4:.25 A4:1",
    "B4:2 -:.5 G4:.5 B4:.5 D5:.5", "G5:1.5 F#5:.5 D5:.5 E5:.5 D5:1",
    "A4:.5 D5:1 G5:.5 F#5:1.5 E5:.5", "E5:.75 G5:.75 B5:1 A5:.5 G5:.5 E5:.5",
    "F#5:.75 A5:.75 D6:1 B5:.5 A5:.5 F#5:.5", "G5:1 E5:.5 B5:.5 A5:.75 G5:.75 D5:.5", "B5:4.5",
)  # fmt: skip
VIBRAPHONE = (
    "-:1 B5:.5 F#5:.5 D6:.5 B5:.5 G5:1", "-:.5 D6:.5 B5:.5 G5:.5 E5:2", "-:3.5 G5:.5",
    "-:.5 E5:.5 G5:.5 B5:.5 D6:2", "-:4", "-:2.5 A5:.5 D6:.5 F#6:.5", "-:1.5 E5+B5:.5 -:1 E5+C6:1",
    "-:1.5 F#5+D6:.5 -:1 D5+A5:1", "E5+B5:2 C5+G5:2",
    "-:.5 G4:.25 B4:.25 D5:.25 F#5:.25 A5:.25 B5:.25 D6:.25 F#6:2.75",
)  # fmt: skip
VIOLINS = (
    "-:8", "G4+B4:4", "E4+B4:4", "D5+A4:4", "D5+A4:4",
    "C5+E5:4", "D5+F#5:4", "E5+G5:2 D5+G5:2", "D5+F#5+A5:5",
)  # fmt: skip
CELLOS = (
    "-:8", "E3+B3:4", "C3+G3:4", "B2+G3:4", "D3+A3:4",
    "A2+E3:4", "B2+F#3:4", "C3+G3:2 D3+A3:2", "G2+D3:5",
)  # fmt: skip

# General MIDI drum keys. One character per sixteenth note: "." rests, 1 to 9 is the loudness.
KICK, RIM, SNARE, CLOSED_HAT, OPEN_HAT, CRASH, RIDE, RIDE_BELL, SPLASH = 36, 37, 38, 42, 46, 49, 51, 53, 55
HIGH_TOM, MIDDLE_TOM, FLOOR_TOM, SHAKER, TAMBOURINE = 48, 45, 41, 82, 54
REST = "." * 16
DRUMS: dict[int, tuple[str, ...]] = {
    KICK: (REST, REST, *("8.....5.8.......", "8.....6...7.....") * 2, *("8..5..6.8.....5.",) * 2,
           "8..7....8..7....", "9" + "." * 15),
    RIM: (REST, "....5.......5...", *(REST,) * 8),
    SNARE: (REST, ".............3.4", *("....7..1.1..7...", "....7..1.1..7..3") * 2,
            *("....8..2.2..8..2",) * 2, "....7...3.4.5678", REST),
    CLOSED_HAT: (*("5.3.5.3.5.3.5.3.",) * 2, *("6.4.63426.4.64..", "6.4.6.4.63426.4.") * 2, *(REST,) * 4),
    OPEN_HAT: (REST, REST, *("." * 14 + "5.", REST) * 2, *(REST,) * 4),
    RIDE: (*(REST,) * 6, *("6.4.6.446.4.6.4.",) * 2, "6..6..4.6..6....", REST),
    RIDE_BELL: (*(REST,) * 6, *("." * 14 + "6.",) * 2, REST, REST),
    CRASH: (REST, REST, "7" + "." * 15, *(REST,) * 3, "8" + "." * 15, REST, REST, "9" + "." * 15),
    SPLASH: (*(REST,) * 5, "." * 14 + "5.", *(REST,) * 4),
    HIGH_TOM: (REST, "." * 12 + "6...", *(REST,) * 6, "." * 10 + "6.....", REST),
    MIDDLE_TOM: (REST, "." * 14 + "7.", *(REST,) * 6, "." * 11 + "7....", REST),
    FLOOR_TOM: (*(REST,) * 9, "7" + "." * 15),
    SHAKER: (*("3243" * 4,) * 6, *("4354" * 4,) * 2, "4354" * 4, REST),
    TAMBOURINE: (*(REST,) * 6, *("....5.......5...",) * 3, REST),
}  # fmt: skip


def key_number(pitch: str) -> int:
    """Returns the MIDI key of a pitch such as "F#4" (C4 is 60)."""
    steps = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
    return 12 * (int(pitch[-1]) + 1) + steps[pitch[0]] + pitch.count("#")


def melody(bars: tuple[str, ...], velocity: int, *, gate: float = 0.95) -> list[Note]:
    """Returns the notes of written bars; each sounds for `gate` of its length, strong beats a bit louder."""
    notes, beat = [], 0.0
    for bar in bars:
        for word in bar.split():
            pitches, length = word.split(":")
            loud = velocity + 6 if beat % 2 == 0 else velocity
            if pitches != "-":
                keys = [key_number(pitch) for pitch in pitches.split("+")]
                notes += [Note(beat, float(length) * gate, key, loud) for key in keys]
            beat += float(length)
    return notes


def chord_spans() -> list[tuple[float, float, str]]:
    """Returns (first beat, length in beats, chord name) of every chord; two chords share a bar evenly."""
    spans = []
    for bar, names in enumerate(CHORDS):
        length = BEATS_PER_BAR / len(names.split())
        spans += [(bar * BEATS_PER_BAR + i * length, length, name) for i, name in enumerate(names.split())]
    return spans


def electric_piano() -> list[Note]:
    """Returns the comping: a held chord, an off-beat stab, a soft push; the last chord is rolled and held."""
    notes = []
    for start, length, name in chord_spans():
        keys = [key_number(pitch) for pitch in VOICINGS[name].split("+")]
        if start == 36:
            notes += [Note(start + 0.06 * i, 5.0, key, 78) for i, key in enumerate(keys)]
            continue
        rhythm = ((0.0, 1.4, 74), (1.5, 0.4, 62), (2.5, 1.0, 68), (3.5, 0.45, 54))
        heard = [hit for hit in rhythm if hit[0] < length]
        notes += [Note(start + at, hold, key, loud) for at, hold, loud in heard for key in keys]
    return notes


def guitar() -> list[Note]:
    """Returns broken chords in eighth notes that ring into each other, and a strum at the end."""
    notes = []
    for start, length, name in chord_spans():
        keys = [key_number(pitch) for pitch in GUITAR_TONES[name].split("+")]
        if start == 36:
            notes += [Note(start + 0.05 * i, 5.0, key, 84) for i, key in enumerate(keys)]
            continue
        for step in range(int(2 * length)):
            at = start + step / 2
            notes.append(Note(at, 0.9, keys[GUITAR_PATTERN[int(2 * at) % 8]], 84 if step % 4 == 0 else 70))
    return notes


def drums() -> list[Note]:
    """Returns the drum part from its grids of sixteenth notes."""
    return [
        Note(bar * BEATS_PER_BAR + step / 4, 0.2, key, 9 + 12 * int(mark))
        for key, bars in DRUMS.items()
        for bar, grid in enumerate(bars)
        for step, mark in enumerate(grid)
        if mark != "."
    ]


def score() -> tuple[Part, ...]:
    """Returns every part of the piece; programs are General MIDI numbers counted from 0."""
    swell = ((0.0, 50), (8.0, 55), (16.0, 82), (24.0, 95), (34.0, 125), (36.0, 112), (38.0, 118), (42.0, 20))
    breath = ((0.0, 105), (24.0, 118), (36.0, 115), (41.0, 40))
    return (
        Part("drums", 9, 0, 64, 92, 30, drums()),
        Part("bass", 0, 33, 62, 104, 8, melody(BASS, 92, gate=0.9)),
        Part("electric piano", 1, 4, 44, 88, 40, electric_piano()),
        Part("guitar", 2, 25, 14, 74, 45, guitar()),
        Part("vibraphone", 3, 11, 112, 92, 70, melody(VIBRAPHONE, 76, gate=1.6)),
        Part("violins", 4, 48, 26, 66, 80, melody(VIOLINS, 72, gate=1.0), swell),
        Part("cellos", 5, 49, 100, 72, 80, melody(CELLOS, 74, gate=1.0), swell),
        Part("flute", 6, 73, 76, 98, 75, melody(FLUTE, 88, gate=0.97), breath),
    )


# ----------------------------------------------------------------------------------------- the MIDI file
def variable_length(value: int) -> bytes:
    """Returns `value` as a MIDI variable-length quantity: seven bits a byte, all but the last flagged.

    Raises:
        ValueError: `value` is negative, as when an event lies after `END_BEAT`.
    """
    if value < 0:
        raise ValueError(f"a MIDI quantity must be 0 or more, got {value}; is an event after END_BEAT?")
    groups = [value & 0x7F]
    while value := value >> 7:
        groups.append(value & 0x7F | 0x80)
    return bytes(reversed(groups))


def track(events: list[tuple[int, bytes]]) -> bytes:
    """Returns a track chunk of (tick, message) events, sorted by tick, that ends at `END_BEAT`."""
    body, now = b"", 0
    # Sorting puts note-offs (0x8n) first, so that a key repeated on the same tick is not cut off.
    for tick, message in sorted(events):
        body += variable_length(tick - now) + message
        now = tick
    body += variable_length(round(END_BEAT * TICKS_PER_BEAT) - now) + b"\xff\x2f\x00"
    return b"MTrk" + struct.pack(">I", len(body)) + body


def swell_events(part: Part) -> list[tuple[int, bytes]]:
    """Returns expression messages, eight a beat, along the lines between the corners of `part.swell`."""
    controller = bytes([0xB0 | part.channel, EXPRESSION])
    events = [(0, controller + bytes([part.swell[0][1]]))]
    for (start, low), (end, high) in zip(part.swell, part.swell[1:], strict=False):
        steps = round((end - start) * 8)
        for i in range(1, steps + 1):
            value = round(low + (high - low) * i / steps)
            beat = start + (end - start) * i / steps
            events.append((round(beat * TICKS_PER_BEAT), controller + bytes([value])))
    return events


def part_events(part: Part) -> list[tuple[int, bytes]]:
    """Returns the (tick, message) events of a part, with a player's small unevenness from a fixed seed."""
    channel = part.channel
    settings = ((VOLUME, part.volume), (PAN, part.pan), (REVERB, part.reverb))
    events = [(0, b"\xff\x03" + variable_length(len(part.name)) + part.name.encode("ascii"))]
    events += [(0, bytes([0xC0 | channel, part.program]))]
    events += [(0, bytes([0xB0 | channel, controller, value])) for controller, value in settings]
    events += swell_events(part)
    dice = random.Random(part.channel)
    for note in part.notes:
        late = 0.012 * dice.random() if note.start > 0 else 0.0
        velocity = max(1, min(127, note.velocity + round(8 * (dice.random() - 0.5))))
        start = round((note.start + late) * TICKS_PER_BEAT)
        end = round((note.start + note.length) * TICKS_PER_BEAT)
        events.append((start, bytes([0x90 | channel, note.key, velocity])))
        events.append((end, bytes([0x80 | channel, note.key, 64])))
    return events


def midi_bytes() -> bytes:
    """Returns the piece as a Standard MIDI File of format 1; the same bytes on every call and machine."""
    conductor = [(0, b"\xff\x58\x04\x04\x02\x18\x08")]  # 4/4
    for beat, beats_per_minute in TEMPI:
        microseconds = round(60e6 / beats_per_minute)
        conductor.append((round(beat * TICKS_PER_BEAT), b"\xff\x51\x03" + microseconds.to_bytes(3, "big")))
    tracks = [track(conductor), *(track(part_events(part)) for part in score())]
    return b"MThd" + struct.pack(">IHHH", 6, 1, len(tracks), TICKS_PER_BEAT) + b"".join(tracks)


# ------------------------------------------------------------------------------------------- the sound file
def duration_seconds() -> float:
    """Returns the time from the first beat to `END_BEAT`."""
    beats = [beat for beat, _ in TEMPI] + [END_BEAT]
    return sum(60 / tempo * (end - start) for (start, tempo), end in zip(TEMPI, beats[1:], strict=True))


def render(midi: bytes, *, soundfont: Path, wav: Path) -> None:
    """Plays `midi` through `soundfont` with fluidsynth into the float32 stereo file `wav`.

    Raises:
        EarVAEError: fluidsynth is not installed or fails, or there is no such soundfont.
    """
    if shutil.which("fluidsynth") is None:
        raise EarVAEError("fluidsynth was not found on PATH; install it (Debian: apt install fluidsynth)")
    if not soundfont.is_file():
        raise EarVAEError(
            f"no soundfont at {soundfont}; install one (Debian: apt install fluid-soundfont-gm) "
            "or name another General MIDI .sf2 file with --soundfont"
        )
    midi_path = wav.with_suffix(".mid")
    midi_path.write_bytes(midi)
    command = ["fluidsynth", "-niq", "-g", "0.4", "-r", str(SAMPLE_RATE), "-T", "wav", "-O", "float"]
    command += ["-C", "0", "-o", "synth.reverb.room-size=0.55", "-o", "synth.reverb.level=0.6"]
    command += ["-F", str(wav), str(soundfont), str(midi_path)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    # fluidsynth reports an unreadable soundfont on stderr but exits with 0.
    if result.returncode != 0 or not wav.is_file() or "error:" in result.stderr:
        reason = result.stderr.strip() or f"exit code {result.returncode}"
        raise EarVAEError(f"fluidsynth could not render with {soundfont}: {reason}")


def encode(wav: Path, out: Path) -> None:
    """Writes the piece in `wav` to `out` as Ogg Vorbis, its peak at `PEAK_DBFS` and its end faded.

    Raises:
        EarVAEError: the render is silent, or `out` cannot be written.
    """
    import numpy as np
    import soundfile

    # fluidsynth goes on in silence for some seconds after the last event.
    audio, sample_rate = soundfile.read(wav, round(duration_seconds() * SAMPLE_RATE), dtype="float32")
    peak = float(np.abs(audio).max(initial=0.0))
    if peak == 0.0:
        raise EarVAEError("the render is silent; name a General MIDI soundfont with --soundfont")
    audio *= 10 ** (PEAK_DBFS / 20) / peak
    fade = round(FADE_SECONDS * sample_rate)
    audio[-fade:] *= np.cos(np.linspace(0, np.pi / 2, fade, dtype=np.float32))[:, None]
    try:
        with soundfile.SoundFile(
            out, "w", sample_rate, 2, "VORBIS", format="OGG", compression_level=VORBIS_COMPRESSION
        ) as file:
            # libsndfile's Vorbis encoder overflows its stack when it gets a whole piece in one call.
            for start in range(0, len(audio), 65_536):
                file.write(audio[start : start + 65_536])
    except (OSError, soundfile.LibsndfileError) as error:
        raise EarVAEError(f"cannot write {out}: {error}; choose another place with --out") from error


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compose, render and encode the example piece.")
    parser.add_argument("--soundfont", type=Path, default=DEFAULT_SOUNDFONT, help="General MIDI .sf2 file")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=".ogg file to write")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            wav = Path(folder) / "piece.wav"
            render(midi_bytes(), soundfont=arguments.soundfont, wav=wav)
            encode(wav, arguments.out)
    except EarVAEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
