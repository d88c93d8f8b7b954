"""The command `ear-vae reconstruct`."""

from __future__ import annotations

import argparse

from ear_vae.audio import stream_audio
from ear_vae.cli.beside import read_ahead
from ear_vae.cli.files import ModelAtWork, each_file
from ear_vae.cli.jobs import AUDIO, Job
from ear_vae.cli.streams import CountedBlocks, decode_to_file, require_writable_format, source_of
from ear_vae.dsp.resampling import resample_stream


def run_reconstruct(options: argparse.Namespace) -> int:
    """Rebuilds audio through the model."""

    def work(model: ModelAtWork, job: Job) -> float:
        vae = model.vae
        with stream_audio(source_of(job)) as (info, blocks):
            require_writable_format(job, options, sample_rate=info.sample_rate, channels=info.channels)
            seconds = info.num_samples / info.sample_rate
            with model.on(job, 2 * seconds):
                counted = CountedBlocks(blocks)
                with read_ahead(resample_stream(counted, info.sample_rate, vae.sample_rate)) as audio:
                    # Latents are a thousandth of the audio: they are held, it is not.
                    latents = [posterior.mean for posterior in vae.encode_stream(audio)]
                num_samples = -(-counted.num_samples * vae.sample_rate // info.sample_rate)
                decode_to_file(
                    vae,
                    latents,
                    job,
                    options,
                    num_samples=num_samples,
                    channels=info.channels,
                    sample_rate=info.sample_rate,
                    source_num_samples=counted.num_samples,
                )
        return counted.num_samples / info.sample_rate

    return each_file(options, work, reads=AUDIO, writes=AUDIO)
