"""Files and standard streams at either end of a command."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ear_vae.audio import write_audio, write_audio_stream
from ear_vae.cli.beside import write_behind
from ear_vae.cli.jobs import STREAM, Job
from ear_vae.dsp.resampling import resample_stream
from ear_vae.errors import EarVAEError
from ear_vae.vae import EarVAE


class CountedBlocks:
    """Passes on blocks of audio, and counts their samples.

    Args:
        blocks: Blocks [C, T_i].

    Attributes:
        num_samples: Number of samples per channel so far.
    """

    def __init__(self, blocks: Iterable[torch.Tensor]) -> None:
        self._blocks = blocks
        self.num_samples = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for block in self._blocks:
            self.num_samples += block.shape[-1]
            yield block


def source_of(job: Job) -> Any:
    """Returns the path of a job's input, or what came out of a pipe."""
    return content_of_pipe(job.source) if is_pipe(job.source) else job.source


def is_pipe(source: str) -> bool:
    """Whether a source is standard input or a named pipe, such as the shell's `<(…)`: readable only once."""
    return source == STREAM or Path(source).is_fifo()


def content_of_pipe(source: str) -> NamedBytes:
    """Reads a pipe to its end, because decoders seek and pipes cannot.

    Raises:
        OSError: It cannot be read.
    """
    content = NamedBytes(sys.stdin.buffer.read() if source == STREAM else Path(source).read_bytes())
    content.name = "standard input" if source == STREAM else source
    return content


def flush() -> None:
    """Flushes standard output.

    Raises:
        EarVAEError: It cannot be written to.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        raise EarVAEError(f"standard output: could not be written: {error.strerror or error}") from error


def decode_to_file(
    vae: EarVAE,
    latents: list[torch.Tensor],
    job: Job,
    options: argparse.Namespace,
    *,
    num_samples: int,
    channels: int,
    sample_rate: int,
    source_num_samples: int,
) -> None:
    """Decodes latents into an audio file with the rate, channels and length of the source.

    Args:
        vae: Model that decodes.
        latents: Latents in pieces, each [D, n].
        job: Job whose output is written.
        options: Parsed options: `format`, `subtype`, `peak` and `force`.
        num_samples: Length in samples at the rate of the model.
        channels: Channels of the source, 1 or 2.
        sample_rate: Sample rate of the source in Hz.
        source_num_samples: Length in samples at that rate.
    """

    def decoded() -> Iterator[torch.Tensor]:
        for audio in _first_samples(vae.decode_stream(latents), num_samples):
            yield audio.mean(dim=0, keepdim=True) if channels == 1 else audio

    to_stream = job.destination == STREAM

    def write(audio: Iterator[torch.Tensor]) -> None:
        write_audio_stream(
            sys.stdout.buffer if to_stream else job.destination,
            _first_samples(resample_stream(audio, vae.sample_rate, sample_rate), source_num_samples),
            sample_rate,
            channels=channels,
            num_samples=source_num_samples,
            format=format_of(job, options),
            subtype=options.subtype,
            peak=options.peak,
            overwrite=options.force,
        )

    write_behind(decoded(), write)
    if to_stream:
        flush()


def _first_samples(blocks: Iterable[torch.Tensor], num_samples: int) -> Iterator[torch.Tensor]:
    for block in blocks:
        if block[..., :num_samples].shape[-1]:
            yield block[..., :num_samples]
        num_samples = max(0, num_samples - block.shape[-1])


def require_writable_format(
    job: Job, options: argparse.Namespace, *, sample_rate: int = 48_000, channels: int = 2
) -> None:
    """Refuses a format and subtype that cannot be written, by writing a little of it to nowhere.

    Args:
        job: The job whose output it is.
        options: Parsed options: `format` and `subtype`.
        sample_rate: Rate of the output in Hz; the default is one that every format takes.
        channels: Channels of the output.

    Raises:
        EarVAEError: The output's format is unknown, or cannot hold the subtype or the rate.
    """
    trial = NamedBytes()
    trial.name = job.destination_name
    silence = torch.zeros(channels, 4096)
    write_audio(trial, silence, sample_rate, format=format_of(job, options), subtype=options.subtype)


class NamedBytes(io.BytesIO):
    """Bytes in memory, with a name for error messages.

    Attributes:
        name: Name in error messages.
    """

    name = ""


def format_of(job: Job, options: argparse.Namespace) -> str:
    """Returns the audio format of a job's output: that of the options, else that of its extension."""
    named = "wav" if job.destination == STREAM else Path(job.destination).suffix[1:]
    return str(options.format or named)
