"""Opening audio of any format, and telling whole files from cut ones."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ear_vae._files import name_of
from ear_vae.errors import EarVAEError

AudioSource = str | os.PathLike[str] | IO[bytes]

# What libsndfile says of a flac whose encoder could not go back to write its length.
_UNKNOWN_LENGTH = 2**62
# Where libsndfile's log gives the length of the audio as the header has it.
_LENGTH_LINES = {
    "WAV": "data",
    "WAVEX": "data",
    "RF64": "Riff size",
    "W64": "riff",
    "AIFF": "SSND",
    "AU": "Data Size",
}
# Programs that write wav to a pipe cannot know its length: ffmpeg and sox leave these, less the padding
# to whole frames.
_PIPED_LENGTHS = (2**32 - 1, 0x7FFF_F000)
_MP3_KILOBITS = {
    1: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_MP3_RATES = (44_100, 48_000, 32_000)
_LARGEST_OGG_PAGE = 65_307


@dataclass(frozen=True)
class OpenedAudio:
    """An open file and what is known of it.

    Attributes:
        file: The `soundfile.SoundFile` to read from.
        num_samples: Per channel.
        exact: Whether that is known; else it is an estimate.
        format: Of the source, such as `WAV` or `M4A`.
        subtype: libsndfile's name of the encoding, or `FFMPEG`.
    """

    file: Any
    num_samples: int
    exact: bool
    format: str
    subtype: str


@contextmanager
def opened_audio(source: AudioSource) -> Iterator[OpenedAudio]:
    """Opens audio with libsndfile, and through ffmpeg what libsndfile cannot read in full.

    Raises:
        EarVAEError: The source is missing, a folder, unreadable, empty, not audio, or visibly cut.
    """
    import soundfile

    name = name_of(source)
    if isinstance(source, (str, os.PathLike)):
        _require_readable(Path(source))
    try:
        file = soundfile.SoundFile(source if not isinstance(source, os.PathLike) else str(source))
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        reason = one_line(error)
    else:
        with file:
            opened = _examined(file, source, name)
            if isinstance(opened, OpenedAudio):
                yield opened
                return
        reason = opened
    with _decoded_by_ffmpeg(source, name, reason) as decoded, soundfile.SoundFile(decoded) as file:
        extension = Path(name).suffix[1:].upper() if isinstance(source, (str, os.PathLike)) else ""
        yield OpenedAudio(file, file.frames, True, extension or "FFMPEG", "FFMPEG")


def one_line(error: Exception) -> str:
    """The last line of an error's message, or the name of its class."""
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


def _examined(file: Any, source: AudioSource, name: str) -> OpenedAudio | str:
    """What libsndfile has opened, or why it cannot read that in full."""
    num_samples, exact = file.frames, True
    if _promises_more(file):
        raise EarVAEError(f"{name}: truncated: its header promises more audio than there is")
    if file.format == "OGG":
        with _bytes_of(source) as data:
            if not _last_ogg_page_is_whole(data):
                raise EarVAEError(f"{name}: truncated: the last page of the ogg stream is cut off")
    elif file.format == "MP3":
        with _bytes_of(source) as data:
            stated, counted, complete = _mp3_length(data)
        # Without the length in a header libsndfile goes by the first frame's bit rate, and stops there.
        if not stated and counted > file.frames:
            return "an mp3 of varying bit rate without its length in a header"
        exact = stated or complete
        if complete:
            num_samples = counted
    if file.frames > _UNKNOWN_LENGTH:
        return "without its length in the header"
    return OpenedAudio(file, num_samples, exact, file.format, file.subtype)


@contextmanager
def _bytes_of(source: AudioSource) -> Iterator[IO[bytes]]:
    if isinstance(source, (str, os.PathLike)):
        with Path(source).open("rb") as data:
            yield data
        return
    # libsndfile reads from the same stream and must find it where it left it.
    position = source.tell()
    source.seek(0)
    try:
        yield source
    finally:
        source.seek(position)


def _require_readable(path: Path) -> None:
    try:
        if path.is_dir():
            raise EarVAEError(f"{path}: is a folder, expected an audio file")
        with path.open("rb") as file:
            if not file.read(1):
                raise EarVAEError(f"{path}: is empty (0 bytes)")
    except FileNotFoundError:
        raise EarVAEError(f"{path}: no such file") from None
    except OSError as error:
        raise EarVAEError(f"{path}: cannot be read: {error.strerror}") from error


def _promises_more(file: Any) -> bool:
    if file.format not in _LENGTH_LINES:
        return False
    pattern = rf"^\s*{_LENGTH_LINES[file.format]}\s*: (\d+) \(should be (\d+)\)"
    found = re.search(pattern, file.extra_info, re.MULTILINE)
    if found is None:
        return False
    promised, present = int(found[1]), int(found[2])
    return promised > present and not any(0 <= piped - promised < 64 for piped in _PIPED_LENGTHS)


def _last_ogg_page_is_whole(data: IO[bytes]) -> bool:
    """Whether the file ends with a complete page (RFC 3533, section 6); a cut one hardly ever does.

    The end-of-stream mark is no help: many encoders do not write it.
    """
    size = data.seek(0, os.SEEK_END)
    data.seek(max(0, size - 2 * _LARGEST_OGG_PAGE))
    tail = data.read()
    header = tail.rfind(b"OggS")
    table = header + 27
    if header < 0 or table > len(tail):
        return False
    num_segments = tail[table - 1]
    lacing = tail[table : table + num_segments]
    return len(lacing) == num_segments and table + num_segments + sum(lacing) <= len(tail)


def _mp3_length(data: IO[bytes]) -> tuple[bool, int, bool]:
    """Whether the first frame states the length (a Xing or Info tag); else samples, and whether all.

    The count ends early where something stands between two frames; only where nothing but a tag follows
    the last one it is complete.
    """
    position = 0
    while (tag := _bytes_at(data, position, 10))[:3] == b"ID3" and len(tag) == 10:
        size = sum((byte & 0x7F) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
        position += 10 + size + (10 if tag[5] & 0x10 else 0)
    window = _bytes_at(data, position, 2**16)
    for offset in range(len(window) - 4):
        frame = _mp3_frame(window[offset : offset + 4])
        if frame and _mp3_frame(_bytes_at(data, position + offset + frame[0], 4)):
            position += offset
            break
    else:
        return False, 0, False
    # The tag follows the side information, 9 to 34 bytes behind the header; bit 0 of its flags: has a count.
    head = _bytes_at(data, position, 48)
    found = max(head.find(b"Xing"), head.find(b"Info"))
    if found > 0 and head[found + 7 : found + 8] and head[found + 7] & 1:
        return True, 0, False
    count = 0
    while frame := _mp3_frame(_bytes_at(data, position, 4)):
        position += frame[0]
        count += frame[1]
    rest = data.seek(0, os.SEEK_END) - position
    ends = rest == 0 or _bytes_at(data, position, 8).startswith((b"TAG", b"APETAGEX"))
    return False, count, ends


def _bytes_at(data: IO[bytes], position: int, size: int) -> bytes:
    data.seek(position)
    return data.read(size)


def _mp3_frame(header: bytes) -> tuple[int, int] | None:
    """Bytes and samples of the layer III frame with this header; None where it is no such header."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return None
    # 3 is MPEG 1, 2 is MPEG 2 at half its rates, 0 is MPEG 2.5 at a quarter of them.
    version = header[1] >> 3 & 3
    bit_rate, rate = header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or bit_rate in (0, 15) or rate == 3:
        return None
    kilobits = _MP3_KILOBITS[1 if version == 3 else 2][bit_rate - 1]
    samples = 1152 if version == 3 else 576
    sample_rate = _MP3_RATES[rate] // {3: 1, 2: 2, 0: 4}[version]
    return samples * kilobits * 125 // sample_rate + (header[2] >> 1 & 1), samples


@contextmanager
def _decoded_by_ffmpeg(source: AudioSource, name: str, reason: str) -> Iterator[str]:
    """A temporary float wav of what libsndfile does not read, at the source's own rate and channels."""
    with warnings.catch_warnings():
        # pydub warns at import when ffmpeg is missing; the error below says it better.
        warnings.simplefilter("ignore")
        from pydub import AudioSegment
    ffmpeg = shutil.which(AudioSegment.converter)
    if ffmpeg is None:
        raise EarVAEError(
            f"{name}: not what libsndfile reads ({reason}), and ffmpeg, which may read it, "
            "is not installed; install ffmpeg or convert the file to wav or flac"
        )
    with tempfile.TemporaryDirectory(prefix="ear-vae-") as folder:
        if isinstance(source, (str, os.PathLike)):
            # An absolute path, so that a name with a leading dash is not taken for an option.
            original = Path(source).absolute()
        else:
            original = Path(folder) / "input"
            source.seek(0)
            with original.open("wb") as copy:
                shutil.copyfileobj(source, copy)
        decoded = Path(folder) / "decoded.wav"
        command = [ffmpeg, "-nostdin", "-v", "error", "-xerror", "-i", f"file:{original}", "-map", "0:a:0"]
        command += ["-c:a", "pcm_f32le", "-rf64", "auto", str(decoded)]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if result.returncode or not decoded.exists():
            lines = [line for line in result.stderr.strip().splitlines() if line] or [reason]
            reason_given = lines[-1].replace(f"file:{original}", "").lstrip(": ")
            raise EarVAEError(f"{name}: not audio, or damaged: {reason_given}")
        yield str(decoded)
