"""Audio files to tensors and back."""

from __future__ import annotations

import io
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from ear_vae._files import atomic_path
from ear_vae.errors import EarVAEError
from ear_vae.resampling import resample

__all__ = [
    "AUDIO_EXTENSIONS",
    "AudioInfo",
    "PeakPolicy",
    "PeakWarning",
    "audio_info",
    "find_audio_files",
    "read_audio",
    "resample",
    "write_audio",
]

AudioSource = str | os.PathLike[str] | IO[bytes]
PeakPolicy = Literal["keep", "scale", "clip"]

LOWEST_RATE, HIGHEST_RATE = 8_000, 192_000
_NATIVE_EXTENSIONS = {
    ".wav",
    ".flac",
    ".ogg",
    ".oga",
    ".opus",
    ".mp3",
    ".aif",
    ".aiff",
    ".aifc",
    ".au",
    ".caf",
    ".w64",
    ".rf64",
}
_FFMPEG_EXTENSIONS = {
    *(
        ".m4a",
        ".aac",
        ".wma",
        ".mp4",
        ".m4v",
        ".mov",
        ".mkv",
        ".mka",
        ".webm",
        ".avi",
        ".ac3",
        ".ape",
        ".wv",
        ".mp2",
    ),
}
AUDIO_EXTENSIONS = frozenset(_NATIVE_EXTENSIONS | _FFMPEG_EXTENSIONS)

# Format and default subtype by extension.
_WRITTEN = {
    "wav": ("RF64", "FLOAT"),
    "flac": ("FLAC", "PCM_24"),
    "ogg": ("OGG", "VORBIS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "aiff": ("AIFF", "PCM_24"),
}
_UNBOUNDED_SUBTYPES = {"FLOAT", "DOUBLE"}
# A plain RIFF file counts its bytes in 32 bits.
_RIFF_BYTES = 2**32 - 2**16
_BLOCK_FRAMES = 2**18
# Lengths in mp3 headers are estimates, sometimes several seconds off in whole files.
_SHORTEST_MP3_FRACTION = 0.9


class PeakWarning(UserWarning):
    """Audio above full scale went to a format that cannot hold it."""


@dataclass(frozen=True)
class AudioInfo:
    """What a file's header says.

    Attributes:
        sample_rate: In Hz.
        channels: 1 or 2.
        num_samples: Per channel; an estimate for mp3 and for what ffmpeg reads.
        format: Such as `WAV` or `MP3`.
        subtype: Such as `PCM_16` or `VORBIS`.
    """

    sample_rate: int
    channels: int
    num_samples: int
    format: str
    subtype: str

    @property
    def duration_seconds(self) -> float:
        """Length in seconds."""
        return self.num_samples / self.sample_rate


def audio_info(source: AudioSource) -> AudioInfo:
    """Reads the header of an audio file.

    Args:
        source: Path or open binary file, of a format that soundfile or ffmpeg reads.

    Raises:
        EarVAEError: As `read_audio`, as far as the header shows it.
    """
    with _opened(source) as file:
        return _info(file, _name(source))


def read_audio(source: AudioSource, *, start: int = 0, num_samples: int | None = None) -> tuple[Tensor, int]:
    """Reads audio at its own sample rate.

    A part of a file is read by seeking, sample for sample what reading the whole would give, except in
    formats that only ffmpeg reads, which are decoded whole.

    Args:
        source: Path or open binary file, of a format that soundfile or ffmpeg reads, video included.
        start: First sample to read.
        num_samples: Samples to read, fewer if the file ends before; all by default.

    Returns:
        Audio [C, T] in float32 with C of 1 or 2, and its sample rate in Hz.

    Raises:
        EarVAEError: The file is missing, a folder, unreadable, empty, truncated, damaged or not audio; it
            has more than two channels, a rate outside 8 to 192 kHz, no samples, or NaN or infinity in it;
            `start` is past its end.
    """
    name = _name(source)
    with _opened(source) as file:
        info = _info(file, name)
        if start < 0 or (num_samples is not None and num_samples < 1):
            raise EarVAEError(f"{name}: start must be 0 or more and num_samples 1 or more")
        if start >= info.num_samples:
            raise EarVAEError(f"{name}: start {start} is past the end, at {info.num_samples} samples")
        wanted = min(info.num_samples - start, num_samples or info.num_samples)
        audio = _read_frames(file, name, start, wanted)
        found = audio.shape[1]
        whole = start == 0 and wanted == info.num_samples
        if found < wanted and (info.format != "MP3" or (whole and found < _SHORTEST_MP3_FRACTION * wanted)):
            raise EarVAEError(
                f"{name}: truncated: {start + found} of {info.num_samples} samples could be read"
            )
    if found == 0:
        raise EarVAEError(f"{name}: no samples could be read at {start}")
    if not bool(torch.isfinite(audio).all()):
        raise EarVAEError(f"{name}: holds NaN or infinite samples; repair it or export it again")
    return audio, info.sample_rate


def write_audio(
    destination: str | os.PathLike[str] | IO[bytes],
    audio: Tensor,
    sample_rate: int,
    *,
    format: str | None = None,
    subtype: str | None = None,
    peak: PeakPolicy = "keep",
    overwrite: bool = False,
) -> None:
    """Writes audio; a file appears complete or not at all.

    Args:
        destination: Path, or an open binary file (then `format` is required).
        audio: [C, T] with C of 1 or 2.
        sample_rate: In Hz.
        format: `wav`, `flac`, `ogg`, `mp3` or `aiff`; by default what the path's extension says.
        subtype: libsndfile's name of the encoding, such as `PCM_16`; by default float32 for wav, 24 bits
            for flac and aiff.
        peak: What to do with samples beyond full scale. `keep` writes them as they are, which in any
            format but float means that they are cut off, with a `PeakWarning`; `scale` lowers the whole file
            so that its peak is full scale; `clip` cuts them off.
        overwrite: Replace an existing file.

    Raises:
        EarVAEError: Unknown format or subtype, wrong shape, an existing or unwritable destination, a full
            disk.
    """
    import soundfile

    name = _name(destination)
    if audio.ndim != 2 or audio.shape[0] not in (1, 2) or audio.shape[1] == 0:
        raise EarVAEError(
            f"{name}: audio to write must be [C, T] with 1 or 2 channels, got {list(audio.shape)}"
        )
    kind = (format or (Path(name).suffix[1:] if isinstance(destination, (str, os.PathLike)) else "")).lower()
    kind = {"aif": "aiff", "oga": "ogg"}.get(kind, kind)
    if kind not in _WRITTEN:
        raise EarVAEError(f"{name}: cannot write format {kind!r}; choose one of {', '.join(_WRITTEN)}")
    container, default = _WRITTEN[kind]
    encoding = (subtype or default).upper()
    if container == "RF64" and audio.numel() * 8 < _RIFF_BYTES:
        container = "WAV"
    if not soundfile.check_format(container, encoding):
        choices = ", ".join(soundfile.available_subtypes(container))
        raise EarVAEError(f"{name}: {kind} cannot hold subtype {encoding!r}; choose one of {choices}")
    gain, limit = _peak_treatment(audio, name, peak, bounded=encoding not in _UNBOUNDED_SUBTYPES)

    def write(target: Any) -> None:
        try:
            with soundfile.SoundFile(
                target, "w", sample_rate, audio.shape[0], subtype=encoding, format=container
            ) as file:
                for block in audio.detach().split(_BLOCK_FRAMES, dim=1):
                    block = block.float().cpu() * gain
                    file.write((block.clamp(-1, 1) if limit else block).T.contiguous().numpy())
        except (soundfile.LibsndfileError, OSError, AssertionError) as error:
            # soundfile asserts that all frames went out, which is how a full disk shows.
            raise EarVAEError(f"{name}: could not be written, is the disk full? ({error})") from error

    if isinstance(destination, (str, os.PathLike)):
        with atomic_path(destination, overwrite) as temporary:
            write(str(temporary))
    else:
        buffer = io.BytesIO()
        write(buffer)
        destination.write(buffer.getbuffer())


def find_audio_files(folder: str | os.PathLike[str]) -> list[Path]:
    """All files below a folder with an audio or video extension, sorted; hidden ones are left out.

    Raises:
        EarVAEError: The folder does not exist.
    """
    root = Path(folder)
    if not root.is_dir():
        raise EarVAEError(f"{root}: not a folder")
    return sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in AUDIO_EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and path.is_file()
    )


def _info(file: Any, name: str) -> AudioInfo:
    info = AudioInfo(file.samplerate, file.channels, file.frames, file.format, file.subtype)
    if info.channels > 2:
        raise EarVAEError(
            f"{name}: {info.channels} channels, expected 1 or 2; downmix it first, for example with "
            f"ffmpeg -i INPUT -ac 2 OUTPUT.wav"
        )
    if not LOWEST_RATE <= info.sample_rate <= HIGHEST_RATE:
        raise EarVAEError(
            f"{name}: sample rate {info.sample_rate} Hz, expected {LOWEST_RATE} to {HIGHEST_RATE}; "
            "resample it first"
        )
    if info.num_samples < 1:
        raise EarVAEError(f"{name}: holds no audio samples")
    if info.format in ("WAV", "WAVEX") and "(should be" in file.extra_info.split("data :")[-1]:
        raise EarVAEError(f"{name}: truncated: its header promises more audio than there is")
    return info


def _read_frames(file: Any, name: str, start: int, wanted: int) -> Tensor:
    """Up to `wanted` samples per channel, [C, T], without a second copy of the whole."""
    import soundfile

    audio = torch.empty(file.channels, wanted)
    position = 0
    try:
        if start:
            file.seek(start)
        while position < wanted:
            block = file.read(min(_BLOCK_FRAMES, wanted - position), dtype="float32", always_2d=True)
            if not len(block):
                break
            audio[:, position : position + len(block)] = torch.from_numpy(block.T)
            position += len(block)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise EarVAEError(
            f"{name}: damaged or truncated after {start + position} samples: {_reason(error)}"
        ) from error
    return audio[:, :position]


@contextmanager
def _opened(source: AudioSource) -> Iterator[Any]:
    """A soundfile.SoundFile of the source, through ffmpeg where libsndfile does not know the format."""
    import soundfile

    name = _name(source)
    if isinstance(source, (str, os.PathLike)):
        _require_readable(Path(source))
    try:
        file = soundfile.SoundFile(source if not isinstance(source, os.PathLike) else str(source))
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        with _decoded_by_ffmpeg(source, name, error) as decoded, soundfile.SoundFile(decoded) as file:
            yield file
        return
    with file:
        if (
            file.format == "OGG"
            and isinstance(source, (str, os.PathLike))
            and not _last_ogg_page_is_whole(Path(source))
        ):
            raise EarVAEError(f"{name}: truncated: the last page of the ogg stream is cut off")
        yield file


def _require_readable(path: Path) -> None:
    if path.is_dir():
        raise EarVAEError(f"{path}: is a folder, expected an audio file")
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise EarVAEError(f"{path}: is empty (0 bytes)")
    except FileNotFoundError:
        raise EarVAEError(f"{path}: no such file") from None
    except OSError as error:
        raise EarVAEError(f"{path}: cannot be read: {error.strerror}") from error


@contextmanager
def _decoded_by_ffmpeg(source: AudioSource, name: str, reason: Exception) -> Iterator[str]:
    """A temporary float wav of what libsndfile could not open, at the source's own rate and channels."""
    import shutil
    import subprocess

    with warnings.catch_warnings():
        # pydub warns at import when ffmpeg is missing; the error below says it better.
        warnings.simplefilter("ignore")
        from pydub import AudioSegment
    ffmpeg = shutil.which(AudioSegment.converter)
    if ffmpeg is None:
        raise EarVAEError(
            f"{name}: not a format that libsndfile reads ({_reason(reason)}), and ffmpeg, which may read it, "
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
            lines = [line for line in result.stderr.strip().splitlines() if line] or [_reason(reason)]
            reason_given = lines[-1].replace(f"file:{original}", "").lstrip(": ")
            raise EarVAEError(f"{name}: not audio, or damaged: {reason_given}")
        yield str(decoded)


def _last_ogg_page_is_whole(path: Path) -> bool:
    """Whether the file ends with a complete page (RFC 3533, section 6); a cut one hardly ever does.

    The end-of-stream mark is no help: many encoders do not write it.
    """
    largest_page = 65_307
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 2 * largest_page))
        tail = file.read()
    header = tail.rfind(b"OggS")
    table = header + 27
    if header < 0 or table > len(tail):
        return False
    num_segments = tail[table - 1]
    lacing = tail[table : table + num_segments]
    return len(lacing) == num_segments and table + num_segments + sum(lacing) <= len(tail)


def _peak_treatment(audio: Tensor, name: str, peak: str, *, bounded: bool) -> tuple[float, bool]:
    """The gain to write with, and whether to limit to full scale."""
    if peak not in ("keep", "scale", "clip"):
        raise EarVAEError(f"{name}: peak must be keep, scale or clip, got {peak!r}")
    highest = max(float(block.abs().max()) for block in audio.split(_BLOCK_FRAMES, dim=1))
    if highest <= 1 or (peak == "keep" and not bounded):
        return 1.0, False
    if peak == "scale":
        return 1 / highest, False
    if peak == "keep":
        above_db = 20 * torch.tensor(highest).log10().item()
        warnings.warn(
            f"{name}: peaks reach {above_db:+.2f} dBFS and are cut off in this format; write float wav, or "
            "choose peak 'scale' (lower the whole file) or 'clip' (cut off knowingly)",
            PeakWarning,
            stacklevel=3,
        )
    return 1.0, True


def _name(source: Any) -> str:
    return (
        os.fspath(source)
        if isinstance(source, (str, os.PathLike))
        else str(getattr(source, "name", "<stream>"))
    )


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
