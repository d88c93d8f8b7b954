"""Audio files to tensors and back."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

import torch
from torch import Tensor

from ear_vae._decoding import AudioFileWarning, AudioPart, AudioSource, OpenedAudio, one_line, opened_audio
from ear_vae._files import atomic_path, name_of, system_path, temporary_folder, write_all
from ear_vae._formats import AUDIO_EXTENSIONS, WRITTEN_FORMATS
from ear_vae._walk import find_files
from ear_vae.errors import EarVAEError
from ear_vae.limits import integer
from ear_vae.resampling import resample

__all__ = [
    "AUDIO_EXTENSIONS",
    "AudioFileWarning",
    "AudioInfo",
    "PeakPolicy",
    "PeakWarning",
    "audio_info",
    "find_audio_files",
    "read_audio",
    "resample",
    "stream_audio",
    "write_audio",
    "write_audio_stream",
]

PeakPolicy = Literal["keep", "scale", "clip"]

LOWEST_RATE, HIGHEST_RATE = 8_000, 192_000
_UNBOUNDED_SUBTYPES = {"FLOAT", "DOUBLE"}
# A plain RIFF file counts its bytes in 32 bits.
_RIFF_BYTES = 2**32 - 2**16
_BLOCK_FRAMES = 2**20
# 6 kbit/s at 44.1 kHz: no codec for music goes below.
_MOST_SAMPLES_PER_BYTE = 64
# Whole mp3 files may lack a frame or two of what they state.
_MISSING_MP3_SAMPLES = 3 * 1152
# The data of an mp3 frame begin in up to 511 bytes of frames before it. libsndfile goes back too little for
# quiet passages of varying bit rate, where these are many frames, and returns silence.
# And after a seek in ogg it leaves out what the packet before adds to the next one; 8192 is the longest.
_RUN_UPS = {"MP3": 50 * 1152, "OGG": 8192}


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
    first = integer(start)
    length = None if num_samples is None else integer(num_samples)
    if first is None or first < 0 or (num_samples is not None and (length is None or length < 1)):
        raise EarVAEError(
            f"{name}: start must be 0 or more and num_samples 1 or more, both integers, got {start!r} and "
            f"{num_samples!r}"
        )
    with opened_audio(source, None if length is None else first + length) as opened:
        info = _info(opened, name)
        if first >= info.num_samples:
            raise EarVAEError(f"{name}: start {first} is past the end, at {info.num_samples} samples")
        wanted = min(info.num_samples - first, length or info.num_samples)
        return _in_one(opened, info, name, first, wanted), info.sample_rate


@contextmanager
def stream_audio(source: AudioSource) -> Iterator[tuple[AudioInfo, Iterator[Tensor]]]:
    """Opens audio to be read block by block, in memory that does not grow with its length.

    What only ffmpeg reads is decoded to a temporary file first.

    Args:
        source: As for `read_audio`.

    Yields:
        What the header says, and an iterator over blocks [C, T_i] in float32 that together are what
        `read_audio` returns. It raises what `read_audio` would raise of the samples.

    Raises:
        EarVAEError: As `audio_info`.
    """
    name = name_of(source)
    with opened_audio(source) as opened:
        info = _info(opened, name)
        yield info, _checked_blocks(opened, info, name, 0, info.num_samples)


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
    name = name_of(destination)
    audio = audio.detach()
    if audio.ndim != 2 or audio.shape[0] not in (1, 2) or audio.shape[1] == 0:
        raise EarVAEError(
            f"{name}: audio to write must be [C, T] with 1 or 2 channels, got {list(audio.shape)}"
        )
    encoding = _encoding(destination, format, subtype, sample_rate, audio.shape[0], audio.shape[1], peak)
    blocks = audio.split(_BLOCK_FRAMES, dim=1)
    highest = max(_peak(block, name) for block in blocks)
    _write(destination, blocks, encoding, gain=encoding.gain(highest), overwrite=overwrite)


def write_audio_stream(
    destination: str | os.PathLike[str] | IO[bytes],
    blocks: Iterable[Tensor],
    sample_rate: int,
    *,
    channels: int,
    num_samples: int,
    format: str | None = None,
    subtype: str | None = None,
    peak: PeakPolicy = "keep",
    overwrite: bool = False,
) -> None:
    """`write_audio` for audio that comes in blocks; none of it is held but for a destination that is no path.

    Args:
        destination: As for `write_audio`.
        blocks: Pieces of the audio, [C, T_i].
        sample_rate: In Hz.
        channels: C, 1 or 2.
        num_samples: About how many samples there will be, to choose a container that is large enough.
        format: As for `write_audio`.
        subtype: As for `write_audio`.
        peak: As for `write_audio`. For `scale` the blocks are kept in a temporary file until the peak is
            known.
        overwrite: As for `write_audio`.

    Raises:
        EarVAEError: As for `write_audio`.
    """
    encoding = _encoding(destination, format, subtype, sample_rate, channels, num_samples, peak)
    if peak != "scale":
        _write(destination, blocks, encoding, gain=1.0, overwrite=overwrite)
        return
    folder = Path(destination).parent if isinstance(destination, (str, os.PathLike)) else None
    try:
        with temporary_folder(folder) as place:
            spool = place / "spool.wav"
            kept = _encoding(spool, "wav", "FLOAT", sample_rate, channels, num_samples, "keep")
            highest = _write(spool, blocks, kept, gain=1.0, overwrite=True)
            with stream_audio(spool) as (_, again):
                _write(destination, again, encoding, gain=encoding.gain(highest), overwrite=overwrite)
    except FileNotFoundError:
        raise EarVAEError(f"{name_of(destination)}: the folder {folder} does not exist") from None


@dataclass(frozen=True)
class _Encoding:
    """How audio is written: what `soundfile` needs to know, and what happens to peaks."""

    name: str
    container: str
    subtype: str
    sample_rate: int
    channels: int
    peak: PeakPolicy

    @property
    def bounded(self) -> bool:
        """Whether it holds nothing beyond full scale."""
        return self.subtype not in _UNBOUNDED_SUBTYPES

    @property
    def limits(self) -> bool:
        """Whether samples beyond full scale are cut off."""
        return self.peak == "clip" or (self.peak == "keep" and self.bounded)

    def gain(self, highest: float) -> float:
        """To write audio with this peak."""
        return 1 / highest if self.peak == "scale" and highest > 1 else 1.0


def _encoding(
    destination: str | os.PathLike[str] | IO[bytes],
    format: str | None,
    subtype: str | None,
    sample_rate: int,
    channels: int,
    num_samples: int,
    peak: PeakPolicy,
) -> _Encoding:
    """What the arguments of `write_audio` come to.

    Raises:
        EarVAEError: As `write_audio`.
    """
    import soundfile

    name = name_of(destination)
    rate = integer(sample_rate)
    if rate is None or rate < 1:
        raise EarVAEError(f"{name}: the sample rate must be a positive integer in Hz, got {sample_rate!r}")
    if integer(channels) not in (1, 2):
        raise EarVAEError(f"{name}: channels must be 1 or 2, got {channels!r}")
    if peak not in get_args(PeakPolicy):
        raise EarVAEError(f"{name}: peak must be keep, scale or clip, got {peak!r}")
    kind = (format or (Path(name).suffix[1:] if isinstance(destination, (str, os.PathLike)) else "")).lower()
    kind = {"aif": "aiff", "oga": "ogg"}.get(kind, kind)
    if kind not in WRITTEN_FORMATS:
        raise EarVAEError(f"{name}: cannot write format {kind!r}; choose one of {', '.join(WRITTEN_FORMATS)}")
    container, default = WRITTEN_FORMATS[kind]
    chosen = (subtype or default).upper()
    if container == "RF64" and channels * num_samples * 8 < _RIFF_BYTES:
        container = "WAV"
    if not soundfile.check_format(container, chosen):
        choices = ", ".join(soundfile.available_subtypes(container))
        raise EarVAEError(f"{name}: {kind} cannot hold subtype {chosen!r}; choose one of {choices}")
    return _Encoding(name, container, chosen, rate, int(channels), peak)


def _peak(block: Tensor, name: str) -> float:
    highest = float(block.abs().max())
    if not math.isfinite(highest):
        raise EarVAEError(f"{name}: the audio to write holds NaN or infinite samples; nothing was written")
    return highest


def _write(
    destination: str | os.PathLike[str] | IO[bytes],
    blocks: Iterable[Tensor],
    encoding: _Encoding,
    *,
    gain: float,
    overwrite: bool,
) -> float:
    """Writes the blocks and returns their peak before the gain."""
    import soundfile

    name, highest = encoding.name, 0.0

    @contextmanager
    def full_disk_is_said() -> Iterator[None]:
        try:
            yield
        except (soundfile.LibsndfileError, OSError, AssertionError) as error:
            # soundfile asserts that all frames went out, which is how a full disk shows.
            raise EarVAEError(f"{name}: could not be written, is the disk full? ({error})") from error

    def write(target: Any) -> None:
        nonlocal highest
        try:
            file = soundfile.SoundFile(
                target,
                "w",
                encoding.sample_rate,
                encoding.channels,
                subtype=encoding.subtype,
                format=encoding.container,
            )
        except soundfile.LibsndfileError as error:
            kind = {"RF64": "wav"}.get(encoding.container, encoding.container.lower())
            raise EarVAEError(
                f"{name}: cannot write {kind} at {encoding.sample_rate} Hz: {error.error_string.strip()} "
                "Choose another format or resample first."
            ) from error
        with file:
            for block in blocks:
                highest = max(highest, _peak(block, name))
                scaled = block.detach().float().cpu() * gain
                samples = (scaled.clamp(-1, 1) if encoding.limits else scaled).T.contiguous().numpy()
                with full_disk_is_said():
                    file.write(samples)
            with full_disk_is_said():
                file.close()

    if isinstance(destination, (str, os.PathLike)):
        with atomic_path(destination, overwrite) as temporary:
            write(system_path(temporary))
    else:
        buffer = io.BytesIO()
        write(buffer)
        try:
            write_all(destination, buffer.getbuffer())
        except OSError as error:
            raise EarVAEError(f"{name}: could not be written: {error.strerror or error}") from error
    if highest > 1 and encoding.bounded and encoding.peak == "keep":
        warnings.warn(
            f"{name}: peaks reach {20 * math.log10(highest):+.2f} dBFS and are cut off in this format; write "
            "float wav, or choose peak 'scale' (lower the whole file) or 'clip' (cut off knowingly)",
            PeakWarning,
            stacklevel=3,
        )
    return highest


def find_audio_files(folder: str | os.PathLike[str]) -> list[Path]:
    """All files below a folder with an audio or video extension, sorted; hidden ones are left out.

    Folders behind links are not entered. An `AudioFileWarning` tells of each folder that cannot be listed and
    of what has such an extension and is no ordinary file but, say, a pipe or a link that leads nowhere.

    Raises:
        EarVAEError: The folder does not exist or cannot be listed.
    """
    found = find_files(folder, AUDIO_EXTENSIONS)
    for problem in found.unreadable:
        warnings.warn(f"left out: {problem}", AudioFileWarning, stacklevel=2)
    return list(found.files)


def _info(opened: OpenedAudio, name: str) -> AudioInfo:
    info = AudioInfo(opened.sample_rate, opened.channels, opened.num_samples, opened.format, opened.subtype)
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


def _in_one(opened: OpenedAudio, info: AudioInfo, name: str, start: int, wanted: int) -> Tensor:
    """The samples as one tensor [C, T]."""
    blocks = _checked_blocks(opened, info, name, start, wanted)
    try:
        if wanted > max(_BLOCK_FRAMES, _MOST_SAMPLES_PER_BYTE * opened.size):
            # No file of this size holds so much: what is there is found out by reading it.
            return torch.cat(list(blocks), dim=1)
        audio = torch.empty(info.channels, wanted)
        found = 0
        # Into place at once: of hours there is no room for a second copy.
        for block in blocks:
            audio[:, found : found + block.shape[1]] = block
            found += block.shape[1]
    except RuntimeError as error:
        size = 4 * info.channels * wanted / 2**30
        raise EarVAEError(
            f"{name}: {wanted} samples take {size:.1f} GiB of memory, more than there is; read a part, or "
            "block by block (stream_audio)"
        ) from error
    return audio[:, :found]


def _checked_blocks(
    opened: OpenedAudio, info: AudioInfo, name: str, start: int, wanted: int
) -> Iterator[Tensor]:
    """Blocks [C, T_i] of up to `wanted` samples per channel.

    Raises:
        EarVAEError: The file is damaged, ends before it should, or holds NaN or infinity.
    """
    found, end = 0, start + wanted
    begin = 0
    for number, part in enumerate(opened.parts, 1):
        first, last = max(start - begin, 0), min(end - begin, part.num_samples)
        begin += part.num_samples
        if first >= last:
            continue
        missing = last - first
        for block in _read_blocks(part, name, first, last - first):
            if not bool(torch.isfinite(block).all()):
                raise EarVAEError(f"{name}: holds NaN or infinite samples; repair it or export it again")
            missing -= block.shape[1]
            found += block.shape[1]
            yield block
        may_miss = _MISSING_MP3_SAMPLES if info.format == "MP3" and number == len(opened.parts) else 0
        if opened.exact and missing > may_miss:
            raise EarVAEError(
                f"{name}: truncated: {start + found} of {info.num_samples} samples could be read"
            )
    if found == 0:
        raise EarVAEError(f"{name}: no samples could be read at {start}")


def _read_blocks(part: AudioPart, name: str, start: int, wanted: int) -> Iterator[Tensor]:
    import soundfile

    position = 0
    with part.open() as file:
        longest_run_up = _RUN_UPS.get(file.format, 0)
        # Where libsndfile finds its place at all.
        last_seek = part.num_samples - part.tail - longest_run_up
        while position < wanted:
            try:
                # soundfile seeks after every read, so that each block needs its run-up.
                run_up = start + position - max(0, min(start + position - longest_run_up, last_seek))
                if run_up or position == 0:
                    file.seek(start + position - run_up)
                size = min(_BLOCK_FRAMES, wanted - position)
                block = file.read(run_up + size, dtype="float32", always_2d=True)[run_up:]
            except (soundfile.LibsndfileError, RuntimeError) as error:
                raise EarVAEError(
                    f"{name}: damaged or truncated after {start + position} samples: {one_line(error)}"
                ) from error
            if not len(block):
                return
            yield torch.from_numpy(block.T)
            position += len(block)
