"""What `reconstruct`, `encode` and `decode` share: working through files with one model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ear_vae._atomic import require_free
from ear_vae.audio.formats import AUDIO_EXTENSIONS, WRITTEN_FORMATS
from ear_vae.cli.jobs import (
    AUDIO,
    LATENT_EXTENSION,
    LATENTS,
    STREAM,
    Job,
    Kind,
    make_plan,
    progress,
    run_jobs,
)
from ear_vae.cli.models import load_model
from ear_vae.cli.streams import require_writable_format
from ear_vae.cli.terminal import is_watched
from ear_vae.errors import EarVAEError
from ear_vae.latents import is_latent_file
from ear_vae.vae import EarVAE


def each_file(
    options: argparse.Namespace,
    work: Callable[[EarVAE, Job], float],
    *,
    reads: Kind,
    writes: Kind,
) -> int:
    """Pairs inputs with outputs, refuses what is bound to fail, then runs the model on every file."""
    extension = LATENT_EXTENSION if writes is LATENTS else f".{options.format or 'wav'}"
    _require_kind(Path(options.input), reads)
    what = make_plan(options.input, options.output, reads=reads, extension=extension, overwrite=options.force)
    for job in what.jobs[:1]:
        if not job.relative and job.destination != STREAM:
            _require_extension(Path(job.destination), writes, None if writes is LATENTS else options.format)
        if writes is AUDIO:
            require_writable_format(job, options)
        if not job.relative and job.destination != STREAM:
            require_free(job.destination, overwrite=options.force)
    return run_jobs(what, lambda: load_model(options), work, quiet=options.quiet, debug=options.debug)


@contextmanager
def at_work(options: argparse.Namespace, job: Job, audio_seconds: float, vae: EarVAE) -> Iterator[None]:
    """Turns off gradients for the work on one file, and shows its progress on a terminal."""
    shown = options.progress or (is_watched() and not options.quiet)
    with torch.inference_mode(), progress(job.source_name, audio_seconds, vae.latent_rate, shown=shown):
        yield


def _require_kind(path: Path, kind: Kind) -> None:
    """Refuses latents where audio is read and the reverse, and names the command for them."""
    if not path.is_file():
        return  # make_plan refuses it, and a pipe can be read only once
    extension = path.suffix.lower()
    if kind is AUDIO and is_latent_file(path):
        raise EarVAEError(f"{path}: is a latent file; ear-vae decode turns it into audio")
    if kind is AUDIO and extension == LATENT_EXTENSION:
        raise EarVAEError(f"{path}: is a {LATENT_EXTENSION} file, expected audio")
    if kind is LATENTS and extension in AUDIO_EXTENSIONS and not is_latent_file(path):
        raise EarVAEError(
            f"{path}: is audio, and decode takes latent files; ear-vae encode makes them from audio, and "
            "ear-vae reconstruct goes from audio to audio"
        )


def _require_extension(output: Path, kind: Kind, format: str | None) -> None:
    """Refuses an output whose extension contradicts what is to be in it, or that has none."""
    extension = output.suffix.lower()
    if kind is LATENTS and extension != LATENT_EXTENSION:
        raise EarVAEError(
            f"{output}: latent files are in the safetensors format; call it "
            f"{output.with_suffix(LATENT_EXTENSION).name}"
        )
    if kind is AUDIO and format is None and not extension:
        choices = ", ".join(f".{format}" for format in WRITTEN_FORMATS)
        raise EarVAEError(
            f"{output}: has no extension that tells the format; call it {output.name}.wav (or "
            f"another of {choices}), or choose one with --format"
        )
    if format is not None and extension[1:] in WRITTEN_FORMATS and extension != f".{format}":
        raise EarVAEError(
            f"{output}: is named {extension}, but --format asks for {format}; make them agree or leave out "
            "--format"
        )
