"""What `reconstruct`, `encode` and `decode` share: working through files with one model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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
from ear_vae.inference.compiling import CompileWhenItPays
from ear_vae.inference.tiling import observe_tiles
from ear_vae.latents import is_latent_file


class ModelAtWork:
    """The model of a command, and what its work on the files has in common.

    Args:
        options: Parsed options.
        num_files: Number of files to work on.

    Attributes:
        vae: The model.
    """

    def __init__(self, options: argparse.Namespace, num_files: int) -> None:
        self._options, self._following = options, num_files
        self.vae = load_model(options)
        # Where it was asked for it has been done, and elsewhere than on a CPU there is nothing to compile.
        unasked = options.optimize is None and self.vae.device.type == "cpu"
        self._compiling = CompileWhenItPays(self.vae) if unasked else None

    def next_file(self) -> None:
        """Says that the work on another file begins, whether or not it can be read."""
        self._following -= 1

    @contextmanager
    def on(self, job: Job, audio_seconds: float) -> Iterator[None]:
        """Turns off gradients for the work on one file, shows its progress, and compiles where that pays.

        Args:
            job: The job whose file it is.
            audio_seconds: Seconds of audio that the networks will process, counted once for encoding and once
                for decoding.
        """
        shown = self._options.progress or (is_watched() and not self._options.quiet)
        if self._compiling is not None:
            self._compiling.begin_file(audio_seconds, self._following)
        with (
            torch.inference_mode(),
            progress(job.source_name, audio_seconds, self.vae.latent_rate, shown=shown),
            nullcontext() if self._compiling is None else observe_tiles(self._compiling.tile_done),
        ):
            yield


def each_file(
    options: argparse.Namespace,
    work: Callable[[ModelAtWork, Job], float],
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

    def work_on_next(model: ModelAtWork, job: Job) -> float:
        model.next_file()
        return work(model, job)

    return run_jobs(
        what,
        lambda: ModelAtWork(options, len(what.jobs)),
        work_on_next,
        quiet=options.quiet,
        debug=options.debug,
    )


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
            f"{path}: has the extension of audio, and decode takes latent files; ear-vae encode makes them "
            "from audio, and ear-vae reconstruct goes from audio to audio"
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
