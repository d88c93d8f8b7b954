"""The command `ear-vae decode`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ear_vae.cli.files import ModelAtWork, each_file
from ear_vae.cli.jobs import AUDIO, LATENTS, Job
from ear_vae.cli.models import fingerprints
from ear_vae.cli.streams import decode_to_file, require_writable_format, source_of
from ear_vae.errors import EarVAEError
from ear_vae.latents import Latents, is_raw, load_latents, load_raw_latents
from ear_vae.limits import name_in_a_line
from ear_vae.vae import EarVAE


def run_decode(options: argparse.Namespace) -> int:
    """Decodes latent files into audio."""
    weights_sha256 = fingerprints()

    def work(model: ModelAtWork, job: Job) -> float:
        vae = model.vae
        latents = _latents(vae, job, options, weights_sha256)
        require_writable_format(
            job, options, sample_rate=latents.source_sample_rate, channels=latents.audio_channels
        )
        with model.on(job, latents.duration_seconds):
            decode_to_file(
                vae,
                [latents.mean],
                job,
                options,
                num_samples=latents.num_samples,
                channels=latents.audio_channels,
                sample_rate=latents.source_sample_rate,
                source_num_samples=latents.source_num_samples,
            )
        return latents.duration_seconds

    return each_file(options, work, reads=LATENTS, writes=AUDIO)


def _latents(
    vae: EarVAE, job: Job, options: argparse.Namespace, weights_sha256: Callable[[EarVAE], str]
) -> Latents:
    """The latents of a job that the model may decode.

    Raises:
        EarVAEError: They cannot be read, are of another model, or are raw and no model is named.
    """
    source = source_of(job)
    if is_raw(source):
        return _raw_latents(vae, source, job, options)
    if options.time_first:
        raise EarVAEError(f"{job.source_name}: is no raw latents, which --time-first is for; leave it out")
    latents = load_latents(source)
    maker = name_in_a_line(latents.model_name)
    facts = (latents.sample_rate, latents.downsampling_ratio, latents.mean.shape[0])
    if facts != (vae.sample_rate, vae.downsampling_ratio, vae.latent_dim):
        raise EarVAEError(
            f"{job.source_name}: made by '{maker}' at {facts[0]} Hz with {facts[2]} channels every "
            f"{facts[1]} samples, which '{vae.name}' cannot decode; choose its model with --model"
        )
    if latents.weights_sha256 != weights_sha256(vae) and not options.force:
        raise EarVAEError(
            f"{job.source_name}: made by {maker} (weights {latents.weights_sha256[:12]}), "
            f"not by {vae.name} ({weights_sha256(vae)[:12]}); choose its model with --model, or --force"
        )
    return latents


def _raw_latents(vae: EarVAE, source: Any, job: Job, options: argparse.Namespace) -> Latents:
    if not options.model_is_named:
        raise EarVAEError(
            f"{job.source_name}: raw latents do not tell which model made them; name it with --model"
        )
    mean = load_raw_latents(source, time_first=options.time_first)
    if mean.shape[0] != vae.latent_dim == mean.shape[1]:
        turned = "leave out --time-first" if options.time_first else "add --time-first"
        raise EarVAEError(f"{job.source_name}: its latents have time first and channels last; {turned}")
    return Latents.from_mean(mean, vae)
