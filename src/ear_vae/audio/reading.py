"""Reading audio files of any format as tensors, whole, in part or block by block."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from ear_vae._atomic import name_of
from ear_vae.audio.decoding import (
    AudioFileWarning,
    AudioPart,
    AudioSource,
    OpenedAudio,
    opened_audio,
)
from ear_vae.audio.folders import find_files
from ear_vae.audio.formats import AUDIO_EXTENSIONS
from ear_vae.errors import EarVAEError, first_line
from ear_vae.limits import integer

LOWEST_RATE, HIGHEST_RATE = 8_000, 192_000
BLOCK_FRAMES = 2**20
"""Samples per channel that are read or written at once."""
# 6 kbit/s at 44.1 kHz: no codec for music goes below.
_MOST_SAMPLES_PER_BYTE = 64
# Whole mp3 files may lack a frame or two of what they state.
_MISSING_MP3_SAMPLES = 3 * 1152
# The data of an mp3 frame begin in up to 511 bytes of frames before it. libsndfile goes back too little for
# quiet passages of varying bit rate, where these are many frames, and returns silence.
# And after a seek in ogg it leaves out what the packet before adds to the next one; 8192 is the longest.
_RUN_UPS = {"MP3": 50 * 1152, "OGG": 8192}


@dataclass(frozen=True)
class AudioInfo:
    """Facts from the header of an audio file.

    Attributes:
        sample_rate: Sample rate in Hz.
        channels: Number of channels, 1 or 2.
        num_samples: Number of samples per channel; an estimate for an mp3 that neither states its length nor
            is all frames.
        format: Container, such as `WAV`, `MP3` or `M4A`.
        subtype: Encoding, such as `PCM_16` or `VORBIS`; `FFMPEG` for what only ffmpeg reads.
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

    A part of a file is read by seeking, sample for sample what reading the whole would give. Ogg Vorbis
    whose pages misstate their positions is decoded from its start, what only ffmpeg reads is decoded whole.

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
        source: Path or open binary file, of a format that soundfile or ffmpeg reads, video included.

    Yields:
        The facts of the header, and an iterator over blocks [C, T_i] in float32 that together are what
        `read_audio` returns. The iterator raises what `read_audio` raises about the samples.

    Raises:
        EarVAEError: As `audio_info`.
    """
    name = name_of(source)
    with opened_audio(source) as opened:
        info = _info(opened, name)
        yield info, _checked_blocks(opened, info, name, 0, info.num_samples)


def find_audio_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Lists all files below a folder with an audio or video extension, sorted; hidden ones are left out.

    Folders behind links are not entered. An `AudioFileWarning` is given for each folder that cannot be
    listed, and for whatever has such an extension but is no ordinary file, such as a pipe or a broken link.

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
    """Returns the samples as one tensor [C, T]."""
    blocks = _checked_blocks(opened, info, name, start, wanted)
    try:
        if wanted > max(BLOCK_FRAMES, _MOST_SAMPLES_PER_BYTE * opened.size):
            # No file of this size holds so much: what is there is found out by reading it.
            return torch.cat(list(blocks), dim=1)
        audio = torch.empty(info.channels, wanted)
        found = 0
        # Straight into place: there is no room for a second copy of hours of audio.
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
    """Yields blocks [C, T_i] of up to `wanted` samples per channel.

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
        is_last_mp3 = info.format == "MP3" and number == len(opened.parts)
        may_miss = _MISSING_MP3_SAMPLES if is_last_mp3 else part.may_miss
        if opened.exact and missing > may_miss:
            raise EarVAEError(
                f"{name}: truncated: {start + found} of {info.num_samples} samples could be read"
            )
    if found == 0:
        raise EarVAEError(f"{name}: no samples could be read at {start}")


def _read_blocks(part: AudioPart, name: str, start: int, wanted: int) -> Iterator[Tensor]:
    position = start
    with part.open() as file:
        blocks = _by_seeking(file, part, start, wanted) if file.seekable() else _in_order(file, start, wanted)
        try:
            for block in blocks:
                yield torch.from_numpy(block.T)
                position += len(block)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise EarVAEError(
                f"{name}: damaged or truncated after {position} samples: {first_line(error)}"
            ) from error


def _by_seeking(file: Any, part: AudioPart, start: int, wanted: int) -> Iterator[np.ndarray]:
    longest_run_up = _RUN_UPS.get(file.format, 0)
    # Where libsndfile finds its place at all.
    last_seek = part.num_samples - part.tail - longest_run_up
    position = start
    while position < start + wanted:
        # soundfile seeks after every read, so that each block needs its run-up.
        run_up = position - max(0, min(position - longest_run_up, last_seek))
        if run_up or position == start:
            file.seek(position - run_up)
        block = _read(file, run_up + min(BLOCK_FRAMES, start + wanted - position))[run_up:]
        if not len(block):
            return
        yield block
        position += len(block)


def _in_order(file: Any, start: int, wanted: int) -> Iterator[np.ndarray]:
    position = 0
    while position < start + wanted:
        # What comes before is decoded as well.
        end = start if position < start else start + wanted
        block = _read(file, min(BLOCK_FRAMES, end - position))
        if not len(block):
            return
        if position >= start:
            yield block
        position += len(block)


def _read(file: Any, num_samples: int) -> np.ndarray:
    block: np.ndarray = file.read(num_samples, dtype="float32", always_2d=True)
    return block
