"""The command `ear-vae encode`."""

from __future__ import annotations

import argparse
import hashlib
import sys

import torch

from ear_vae.audio import stream_audio
from ear_vae.cli.beside import read_ahead
from ear_vae.cli.files import ModelAtWork, each_file
from ear_vae.cli.jobs import AUDIO, LATENTS, STREAM, Job
from ear_vae.cli.models import fingerprints
from ear_vae.cli.streams import CountedBlocks, flush, source_of
from ear_vae.dsp.resampling import resample_stream
from ear_vae.latents import Latents, save_latents
from ear_vae.posterior import Posterior


def run_encode(options: argparse.Namespace) -> int:
    """Encodes audio into latent files."""
    if options.seed is not None and not options.sample:
        options.refuse("--seed is for --sample; without it nothing is drawn")
    weights_sha256 = fingerprints()

    def work(model: ModelAtWork, job: Job) -> float:
        vae = model.vae
        with stream_audio(source_of(job)) as (info, blocks):
            counted = CountedBlocks(blocks)
            means, stds = [], []
            with (
                model.on(job, info.duration_seconds),
                read_ahead(resample_stream(counted, info.sample_rate, vae.sample_rate)) as audio,
            ):
                for part in vae.encode_stream(audio):
                    # A view would keep the memory that mean and standard deviation came in together.
                    means.append(part.mean.clone())
                    if options.std or options.sample:
                        stds.append(part.std)
        num_samples, sample_rate = counted.num_samples, info.sample_rate
        mean = torch.cat(means, dim=-1)
        std = torch.cat(stds, dim=-1) if stds else None
        means, stds = [], []
        if options.sample:
            assert std is not None
            mean = Posterior(mean, std).sample(_generator(options.seed, job))
        latents = Latents(
            mean=mean,
            std=std if options.std else None,
            sample_rate=vae.sample_rate,
            downsampling_ratio=vae.downsampling_ratio,
            num_samples=-(-num_samples * vae.sample_rate // sample_rate),
            audio_channels=info.channels,
            source_sample_rate=sample_rate,
            source_num_samples=num_samples,
            model_name=vae.name,
            weights_sha256=weights_sha256(vae),
            sampled=options.sample,
        )
        if job.destination == STREAM:
            save_latents(sys.stdout.buffer, latents)
            flush()
        else:
            save_latents(job.destination, latents, overwrite=options.force)
        return num_samples / sample_rate

    return each_file(options, work, reads=AUDIO, writes=LATENTS)


def _generator(seed: int | None, job: Job) -> torch.Generator | None:
    """Returns the generator of a file's draw: with the seed itself, or in a folder with one for each file."""
    if seed is None:
        return None
    if job.relative:
        # Depends on the seed and the file only, not on what else is in the folder, or was done before.
        digest = hashlib.sha256(f"{seed} {job.relative}".encode(errors="surrogateescape")).digest()
        seed = int.from_bytes(digest[:7], "big")
    return torch.Generator().manual_seed(seed)
