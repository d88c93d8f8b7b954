"""Opening audio of any format, and telling whole files from cut ones."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import soundfile

from ear_vae._atomic import name_of, system_path, temporary_folder, write_all
from ear_vae.audio.matroska_asf import stated_size
from ear_vae.audio.stream_layout import Bytes, Layout, Part, PartReader, kind_of, layout_of
from ear_vae.errors import EarVAEError, first_line

AudioSource = str | os.PathLike[str] | IO[bytes]

# What libsndfile says of a flac whose encoder could not go back to write its length.
_UNKNOWN_LENGTH = 2**62
_LONGEST_VORBIS_BLOCK = 8192
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
# Formats of one file. Others, such as playlists, have ffmpeg open whatever files their text names.
_FFMPEG_FORMATS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,dts,dtshd,eac3,flac,flv,loas,matroska,mov,mp3,mpc,mpc8,mpeg,mpegts,"
    "nut,ogg,oma,rm,shn,tak,truehd,tta,voc,w64,wav,wv"
)
_COPIED_AT_ONCE = 2**20


class AudioFileWarning(UserWarning):
    """A file that contradicts itself was read all the same, or something was left out."""


@dataclass(frozen=True)
class AudioPart:
    """A stretch of audio that libsndfile reads in one go.

    Attributes:
        num_samples: Number of samples per channel.
        open: Function that opens the `soundfile.SoundFile` to read it from.
        tail: Samples at the end that libsndfile reads correctly only when it starts before them.
        may_miss: Samples that may be missing at the end though the file is whole.
    """

    num_samples: int
    open: Callable[[], AbstractContextManager[Any]]
    tail: int = 0
    may_miss: int = 0


@dataclass(frozen=True)
class OpenedAudio:
    """An open file and what is known about it.

    Attributes:
        parts: Stretches of audio that follow each other.
        sample_rate: Sample rate in Hz.
        channels: Number of channels, the same in all parts.
        exact: Whether the length is known; otherwise it is an estimate.
        format: Container, such as `WAV` or `M4A`.
        subtype: Encoding by libsndfile's name, or `FFMPEG`.
        size: Size in bytes of the file that is read.
    """

    parts: tuple[AudioPart, ...]
    sample_rate: int
    channels: int
    exact: bool
    format: str
    subtype: str
    size: int

    @property
    def num_samples(self) -> int:
        """Number of samples per channel."""
        return sum(part.num_samples for part in self.parts)


class _ForFFmpeg(Exception):
    """Says why libsndfile cannot read something in full."""


@contextmanager
def opened_audio(source: AudioSource, end: int | None = None) -> Iterator[OpenedAudio]:
    """Opens audio with libsndfile, and through ffmpeg what libsndfile cannot read in full.

    Args:
        source: A path or an open binary file; what cannot seek, such as a pipe, is copied first.
        end: Number of samples that are wanted from the start; all by default. Only as much of the file is
            examined as these take.

    Raises:
        EarVAEError: The source is missing, a folder, a device, unreadable, empty, not audio, or visibly cut.
    """
    name = name_of(source)
    with ExitStack() as stack:
        place, stream = stack.enter_context(_seekable(source, name))
        try:
            opened = _opened_by_libsndfile(stack, place, stream, name, end)
        except _ForFFmpeg as error:
            file, size = stack.enter_context(_decoded_by_ffmpeg(place, stream, name, str(error)))
            label = Path(name).suffix[1:].upper() if isinstance(source, (str, os.PathLike)) else ""
            opened = OpenedAudio(
                (AudioPart(file.frames, lambda: nullcontext(file)),),
                file.samplerate,
                file.channels,
                True,
                label or "FFMPEG",
                "FFMPEG",
                size,
            )
        yield opened


@contextmanager
def _seekable(source: AudioSource, name: str) -> Iterator[tuple[Path | None, IO[bytes]]]:
    """Gives a stream that can seek, with its path if it has one."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        is_pipe = _require_readable(path)
        with path.open("rb") as stream:
            if is_pipe:
                with _copy_of(stream, name) as copy, copy.open("rb") as again:
                    yield copy, again
            else:
                yield path, stream
        return
    try:
        if not isinstance(source.read(0), (bytes, bytearray)):
            raise EarVAEError(f"{name}: is open as text; open it in binary mode, 'rb'")
        is_pipe = not source.seekable()
    except (AttributeError, TypeError):
        kind = type(source).__name__
        raise EarVAEError(f"{name}: expected a path or an open binary file, got {kind}") from None
    except (ValueError, OSError) as error:
        raise EarVAEError(f"{name}: cannot be read: {first_line(error)}") from error
    if is_pipe:
        with _copy_of(source, name) as copy, copy.open("rb") as again:
            yield copy, again
    else:
        yield None, source


def _require_readable(path: Path) -> bool:
    """Refuses what is no readable file; returns whether it is a pipe, which can be read only once."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise EarVAEError(f"{path}: is a folder, expected an audio file")
        if stat.S_ISFIFO(mode):
            return True
        if not stat.S_ISREG(mode):
            raise EarVAEError(f"{path}: is a device or a socket, expected an audio file")
        with path.open("rb") as file:
            if not file.read(1):
                raise EarVAEError(f"{path}: is empty (0 bytes)")
    except FileNotFoundError:
        raise EarVAEError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise EarVAEError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return False


def _opened_by_libsndfile(
    stack: ExitStack, place: Path | None, stream: IO[bytes], name: str, end: int | None
) -> OpenedAudio:
    """Opens what libsndfile reads of a file, part by part if need be.

    Raises:
        _ForFFmpeg: It does not read it, or not in full.
        EarVAEError: The file is cut, or its parts do not go together.
    """
    size = stream.seek(0, os.SEEK_END)
    if not size:
        raise EarVAEError(f"{name}: is empty (0 bytes)")
    # A part seeks before each read, so that nobody else moves libsndfile's position in the stream.
    whole = PartReader(stream, Part(((0, size),))) if place is None else system_path(place)
    kind = kind_of(Bytes(stream))
    file = None
    if not kind or (kind == "flac" and end is not None):
        file = stack.enter_context(_sound_file(whole))
        if file.format == "MP3":
            kind = "mp3"
        elif end is None or end <= file.frames < _UNKNOWN_LENGTH:
            return _single(file, name, size)
    layout = _layout(kind, place, stream) if kind else Layout()
    if layout is None and kind == "flac":
        raise _ForFFmpeg("a flac without its length in the header, whose last frame cannot be found")
    exact = layout is not None
    layout = layout or Layout()
    if layout.cut:
        raise EarVAEError(f"{name}: truncated: {layout.cut}")
    if layout.remark:
        warnings.warn(f"{name}: {layout.remark}", AudioFileWarning, stacklevel=2)
    if layout.parts is None:
        return _single(file or stack.enter_context(_sound_file(whole)), name, size, exact=exact)
    return _joined(layout.parts, stream, kind, name, size)


def _single(file: Any, name: str, size: int, *, exact: bool = True) -> OpenedAudio:
    if _promises_more(file):
        raise EarVAEError(f"{name}: truncated: its header promises more audio than there is")
    if file.frames > _UNKNOWN_LENGTH:
        raise _ForFFmpeg("without its length in the header")
    part = AudioPart(file.frames, lambda: nullcontext(file))
    return OpenedAudio((part,), file.samplerate, file.channels, exact, file.format, file.subtype, size)


def _joined(parts: tuple[Part, ...], stream: IO[bytes], kind: str, name: str, size: int) -> OpenedAudio:
    """Opens each part to read its header, and again when it is its turn."""
    readable = []
    facts: dict[tuple[int, int], Any] = {}
    for number, part in enumerate(parts, 1):
        try:
            with _sound_file(PartReader(stream, part)) as file:
                opened = _single(file, name, size)
        except _ForFFmpeg as error:
            # Of chunks ffmpeg reads the first file only.
            if kind != "chunks":
                raise
            raise EarVAEError(f"{name}: part {number} of {len(parts)} cannot be read: {error}") from error
        facts[opened.sample_rate, opened.channels] = opened

        def again(part: Part = part) -> AbstractContextManager[Any]:
            return _sound_file(PartReader(stream, part), seekable=part.seekable)

        # Pages that misstate positions may state a block too many.
        may_miss = 0 if part.seekable else _LONGEST_VORBIS_BLOCK
        readable.append(AudioPart(opened.num_samples, again, part.tail, may_miss))
    if len(facts) > 1:
        kinds = ", then ".join(f"{channels} channels at {rate} Hz" for rate, channels in facts)
        raise EarVAEError(
            f"{name}: was joined from files that do not go together: {kinds}; cut it at its joins"
        )
    return OpenedAudio(
        tuple(readable), opened.sample_rate, opened.channels, True, opened.format, opened.subtype, size
    )


class _OrderedSoundFile(soundfile.SoundFile):
    """Is read in order: soundfile seeks after each read where it may."""

    def seekable(self) -> bool:
        """Never."""
        return False


def _sound_file(source: Any, *, seekable: bool = True) -> Any:
    try:
        return (soundfile.SoundFile if seekable else _OrderedSoundFile)(source)
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        reason = first_line(error)
        # Its mp3 decoder's word for everything; the file has been opened.
        raise _ForFFmpeg("Format not recognised" if "does not exist" in reason else reason) from error


def _layout(kind: str, place: Path | None, stream: IO[bytes]) -> Layout | None:
    if place is None:
        return layout_of(kind, Bytes(stream))
    status = os.fstat(stream.fileno())
    return _remembered_layout(
        kind, place, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    )


# Training reads many short segments of each file.
@lru_cache(maxsize=2**14)
def _remembered_layout(kind: str, place: Path, identity: tuple[int, ...]) -> Layout | None:
    with place.open("rb") as stream:
        return layout_of(kind, Bytes(stream))


def _promises_more(file: Any) -> bool:
    if file.format not in _LENGTH_LINES:
        return False
    pattern = rf"^\s*{_LENGTH_LINES[file.format]}\s*: (\d+) \(should be (\d+)\)"
    found = re.search(pattern, file.extra_info, re.MULTILINE)
    if found is None:
        return False
    promised, present = int(found[1]), int(found[2])
    return promised > present and not any(0 <= piped - promised < 64 for piped in _PIPED_LENGTHS)


@contextmanager
def _copy_of(stream: IO[bytes], name: str) -> Iterator[Path]:
    """Copies what comes out of a stream to a temporary file.

    Raises:
        EarVAEError: There is no room for it, or the stream is empty.
    """
    with _scratch_file(name) as scratch:
        try:
            while block := stream.read(_COPIED_AT_ONCE):
                scratch.write(block)
        except OSError as error:
            raise EarVAEError(f"{name}: cannot be read: {error.strerror or error}") from error
        if not scratch.size:
            raise EarVAEError(f"{name}: is empty (0 bytes)")
        yield scratch.path


class _Scratch:
    """A temporary file to write to."""

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name
        self.path, self.size = Path(file.name), 0

    def write(self, block: bytes) -> None:
        """Adds a block.

        Raises:
            EarVAEError: There is no room for it.
        """
        try:
            # Unbuffered, so that nothing is left to fail when it is closed.
            write_all(self._file, block)
        except OSError as error:
            raise _no_room(self._name, str(self.path.parent.parent), error) from error
        self.size += len(block)


@contextmanager
def _scratch_file(name: str) -> Iterator[_Scratch]:
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(temporary_folder())
            file = stack.enter_context((folder / "audio").open("xb", buffering=0))
        except OSError as error:
            raise _no_room(name, tempfile.gettempdir(), error) from error
        yield _Scratch(file, name)


def _no_room(name: str, folder: str, error: OSError) -> EarVAEError:
    return EarVAEError(
        f"{name}: no temporary copy could be written to {folder}: {error.strerror or error}; make room "
        "there, or name another folder in TMPDIR"
    )


@contextmanager
def _decoded_by_ffmpeg(
    place: Path | None, stream: IO[bytes], name: str, reason: str
) -> Iterator[tuple[Any, int]]:
    """Decodes what libsndfile does not read to a temporary file at its own rate; also returns its size."""
    with warnings.catch_warnings():
        # pydub warns at import when ffmpeg is missing; the error below says it better.
        warnings.simplefilter("ignore")
        from pydub import AudioSegment
    ffmpeg = shutil.which(AudioSegment.converter)
    if ffmpeg is None:
        raise EarVAEError(
            f"{name}: not audio that libsndfile reads ({reason.rstrip('. ')}), and ffmpeg, which may read "
            "it, is not installed; install ffmpeg or convert the file to wav or flac"
        )
    data = Bytes(stream)
    if (stated := stated_size(data)) is not None and stated > data.size:
        raise EarVAEError(f"{name}: truncated: its header states {stated} bytes, {data.size} are there")
    with ExitStack() as stack:
        if place is None:
            stream.seek(0)
            place = stack.enter_context(_copy_of(stream, name))
        scratch = stack.enter_context(_scratch_file(name))
        # An absolute path, so that a name with a leading dash is not taken for an option.
        original = f"file:{place.absolute()}"
        command = [ffmpeg, "-nostdin", "-v", "error", "-xerror", "-format_whitelist", _FFMPEG_FORMATS]
        command += ["-protocol_whitelist", "file", "-i", original, "-map", "0:a:0"]
        # The one container of floats whose length a pipe can leave open, beyond 4 GiB too.
        command += ["-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
        code, errors = _run_into(scratch, command)
        if code or not scratch.size:
            raise EarVAEError(f"{name}: not audio, or damaged: {_ffmpeg_reason(errors, original) or reason}")
        try:
            file = stack.enter_context(_sound_file(scratch.path))
        except _ForFFmpeg as error:
            raise EarVAEError(
                f"{name}: {ffmpeg} gave no audio for it ({str(error).rstrip('. ')}); ear-vae env says which "
                "ffmpeg that is"
            ) from error
        yield file, scratch.size


def _run_into(scratch: _Scratch, command: list[str]) -> tuple[int, str]:
    """Runs a command with its output going to a file; returns its exit code and its errors."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        errors: list[bytes] = []
        # Otherwise a command with many messages would wait for us, and we for it.
        listener = threading.Thread(target=lambda pipe: errors.append(pipe.read()), args=(process.stderr,))
        listener.start()
        try:
            while block := process.stdout.read(_COPIED_AT_ONCE):
                scratch.write(block)
        except BaseException:
            process.kill()
            raise
        finally:
            listener.join()
    return process.returncode, os.fsdecode(b"".join(errors))


def _ffmpeg_reason(errors: str, original: str) -> str:
    if refused := re.search(r"\[([\w,]+) @ [^]]*\] Format not on whitelist", errors):
        return (
            f"{refused[1]} is no format that is read; playlists and the like are not, because they have "
            "other files opened"
        )
    lines = [line for line in errors.strip().splitlines() if line]
    last = lines[-1].replace(original, "").lstrip(": ") if lines else ""
    # What it says of text that is called .mp3 would make one look for the fault in the command.
    return "" if last == "Invalid argument" else last
