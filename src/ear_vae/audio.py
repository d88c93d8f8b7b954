"""Audio files to tensors and back."""

from __future__ import annotations

import io
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from ear_vae._decoding import AudioSource, OpenedAudio, one_line, opened_audio
from ear_vae._files import atomic_path, name_of
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
_BLOCK_FRAMES = 2**20
# Whole mp3 files may lack a frame or two of what they state.
_MISSING_MP3_SAMPLES = 3 * 1152
# The data of an mp3 frame begin in up to 511 bytes of frames before it. libsndfile goes back too little for
# quiet passages of varying bit rate, where these are many frames, and returns silence.
_MP3_RUN_UP = 50 * 1152


class PeakWarning(UserWarning):
    """Audio above full scale went to a format that cannot hold it."""


@dataclass(frozen=True)
class AudioInfo:
    """What a file's header says.

    Attributes:
        sample_rate: In Hz.
        channels: 1 or 2.
        num_samples: Per channel; an estimate for an mp3 that neither states its length nor is all frames.
        format: Such as `WAV`, `MP3` or `M4A`.
        subtype: Such as `PCM_16` or `VORBIS`; `FFMPEG` for what only ffmpeg reads.
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
    """Reads the header of an audio file; what only ffmpeg reads is decoded for it.

    Args:
        source: Path or open binary file, of a format that soundfile or ffmpeg reads.

    Raises:
        EarVAEError: As `read_audio`, as far as the header shows it.
    """
    with opened_audio(source) as opened:
        return _info(opened, name_of(source))


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
    name = name_of(source)
    with opened_audio(source) as opened:
        info = _info(opened, name)
        if start < 0 or (num_samples is not None and num_samples < 1):
            raise EarVAEError(f"{name}: start must be 0 or more and num_samples 1 or more")
        if start >= info.num_samples:
            raise EarVAEError(f"{name}: start {start} is past the end, at {info.num_samples} samples")
        wanted = min(info.num_samples - start, num_samples or info.num_samples)
        audio = _read_frames(opened.file, name, start, wanted)
        found = audio.shape[1]
        if opened.exact and found < wanted - (_MISSING_MP3_SAMPLES if info.format == "MP3" else 0):
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
        EarVAEError: Unknown format or subtype, a rate that the format cannot hold, wrong shape, NaN or
            infinity in the audio, an existing or unwritable destination, a full disk.
    """
    import soundfile

    name = name_of(destination)
    audio = audio.detach()
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, int) or sample_rate < 1:
        raise EarVAEError(f"{name}: the sample rate must be a positive integer in Hz, got {sample_rate!r}")
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
            file = soundfile.SoundFile(
                target, "w", sample_rate, audio.shape[0], subtype=encoding, format=container
            )
        except soundfile.LibsndfileError as error:
            raise EarVAEError(
                f"{name}: cannot write {kind} at {sample_rate} Hz: {error.error_string.strip()} "
                "Choose another format or resample first."
            ) from error
        try:
            with file:
                for block in audio.split(_BLOCK_FRAMES, dim=1):
                    block = block.float().cpu() * gain
                    file.write((block.clamp(-1, 1) if limit else block).T.contiguous().numpy())
        except (soundfile.LibsndfileError, OSError, AssertionError) as error:
            # soundfile asserts that all frames went out, which is how a full disk shows.
            raise EarVAEError(f"{name}: could not be written, is the disk full? ({error})") from error

    if isinstance(destination, (str, os.PathLike)):
        with atomic_path(destination, overwrite) as temporary:
            write(str(temporary))
        return
    buffer = io.BytesIO()
    write(buffer)
    try:
        destination.write(buffer.getbuffer())
    except OSError as error:
        raise EarVAEError(f"{name}: could not be written: {error.strerror or error}") from error


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


def _info(opened: OpenedAudio, name: str) -> AudioInfo:
    info = AudioInfo(
        opened.file.samplerate, opened.file.channels, opened.num_samples, opened.format, opened.subtype
    )
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
    return info


def _read_frames(file: Any, name: str, start: int, wanted: int) -> Tensor:
    """Up to `wanted` samples per channel, [C, T], without a second copy of the whole."""
    import soundfile

    audio = torch.empty(file.channels, wanted)
    longest_run_up = _MP3_RUN_UP if file.format == "MP3" else 0
    position = 0
    try:
        while position < wanted:
            # soundfile seeks after every read, so that each block of an mp3 needs its run-up.
            run_up = min(start + position, longest_run_up)
            if run_up or position == 0:
                file.seek(start + position - run_up)
            size = min(_BLOCK_FRAMES, wanted - position)
            block = file.read(run_up + size, dtype="float32", always_2d=True)[run_up:]
            if not len(block):
                break
            audio[:, position : position + len(block)] = torch.from_numpy(block.T)
            position += len(block)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise EarVAEError(
            f"{name}: damaged or truncated after {start + position} samples: {one_line(error)}"
        ) from error
    return audio[:, :position]


def _peak_treatment(audio: Tensor, name: str, peak: str, *, bounded: bool) -> tuple[float, bool]:
    """The gain to write with, and whether to limit to full scale."""
    if peak not in ("keep", "scale", "clip"):
        raise EarVAEError(f"{name}: peak must be keep, scale or clip, got {peak!r}")
    peaks = [float(block.abs().max()) for block in audio.split(_BLOCK_FRAMES, dim=1)]
    if not all(map(math.isfinite, peaks)):
        raise EarVAEError(f"{name}: the audio to write holds NaN or infinite samples; nothing was written")
    highest = max(peaks)
    if highest <= 1 or (peak == "keep" and not bounded):
        return 1.0, False
    if peak == "scale":
        return 1 / highest, False
    if peak == "keep":
        above_db = 20 * math.log10(highest)
        warnings.warn(
            f"{name}: peaks reach {above_db:+.2f} dBFS and are cut off in this format; write float wav, or "
            "choose peak 'scale' (lower the whole file) or 'clip' (cut off knowingly)",
            PeakWarning,
            stacklevel=3,
        )
    return 1.0, True
