"""What `reconstruct`, `encode` and `decode` share: going through files with one model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ear_vae.audio.folders import Found, find_files
from ear_vae.audio.formats import AUDIO_EXTENSIONS
from ear_vae.cli.jobs import STREAM, Job, make_plan, progress, run_jobs
from ear_vae.cli.models import load_model
from ear_vae.cli.streams import require_free, require_writable_format
from ear_vae.cli.terminal import is_watched
from ear_vae.vae import EarVAE

LATENT_EXTENSION = "safetensors"


def each_file(
    options: argparse.Namespace,
    work: Callable[[EarVAE, Job], float],
    *,
    find: Callable[[Path], Found],
    extension: str,
) -> int:
    """Plans, refuses what is bound to fail, then loads the model once and works on every file."""
    what = make_plan(options.input, options.output, find=find, extension=extension, overwrite=options.force)
    for job in what.jobs[:1]:
        if extension != LATENT_EXTENSION:
            require_writable_format(job, options)
        if not job.relative and job.destination != STREAM:
            require_free(job.destination, overwrite=options.force)
    return run_jobs(what, lambda: load_model(options), work, quiet=options.quiet, debug=options.debug)


@contextmanager
def at_work(options: argparse.Namespace, job: Job, audio_seconds: float, vae: EarVAE) -> Iterator[None]:
    """The networks at work on one file: no gradients, and a bar for those who watch."""
    shown = options.progress or (is_watched() and not options.quiet)
    with torch.inference_mode(), progress(job.source_name, audio_seconds, vae.latent_rate, shown=shown):
        yield


def find_audio(folder: Path) -> Found:
    """The audio files of a folder."""
    return find_files(folder, AUDIO_EXTENSIONS)


def find_latents(folder: Path) -> Found:
    """The latent files of a folder."""
    return find_files(folder, {f".{LATENT_EXTENSION}"})
