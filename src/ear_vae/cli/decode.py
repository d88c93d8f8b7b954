"""The command `ear-vae decode`."""

from __future__ import annotations

import argparse

from ear_vae.cli.files import at_work, each_file
from ear_vae.cli.jobs import AUDIO, LATENTS, Job
from ear_vae.cli.models import fingerprints
from ear_vae.cli.streams import decode_to_file, require_writable_format, source_of
from ear_vae.errors import EarVAEError
from ear_vae.latents import load_latents
from ear_vae.limits import name_in_a_line
from ear_vae.vae import EarVAE


def run_decode(options: argparse.Namespace) -> int:
    """Decodes latent files into audio."""
    weights_sha256 = fingerprints()

    def work(vae: EarVAE, job: Job) -> float:
        latents = load_latents(source_of(job))
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
        require_writable_format(
            job, options, sample_rate=latents.source_sample_rate, channels=latents.audio_channels
        )
        with at_work(options, job, latents.duration_seconds, vae):
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
