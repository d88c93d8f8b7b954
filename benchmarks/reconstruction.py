"""How well a model rebuilds a folder of music.

    python benchmarks/reconstruction.py FOLDER [--model ear-vae-tiny] [--json OUT.json]

For every file, whole and at its own rate, prints the scale-invariant signal-to-distortion ratio (dB),
the log-magnitude error (mean |ln|X| - ln|Y|| of the training objective: K-weighted mid, side, left and
right, window sizes 2048 to 128) and the energy above 5 kHz relative to the original's (dB); then their
medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor

from ear_vae import EarVAE
from ear_vae.audio import find_audio_files, read_audio
from ear_vae.dsp.distortion import si_sdr_db
from ear_vae.dsp.spectral import MultiResolutionSTFT
from ear_vae.dsp.stereo import mid_side_left_right
from ear_vae.dsp.weighting import k_weight
from ear_vae.losses.objective import DEFAULT_WINDOW_SIZES
from ear_vae.losses.spectral import log_magnitude

TREBLE_HZ = 5_000
# The log-magnitude error is averaged over blocks of this length: a spectrogram of a whole song at
# five resolutions would take gigabytes.
BLOCK_SECONDS = 10


def treble_db(audio: Tensor, sample_rate: int) -> float:
    """Energy above `TREBLE_HZ` in dB, of audio [C, T]."""
    power = torch.fft.rfft(audio.double()).abs().square()
    first = int(TREBLE_HZ / sample_rate * audio.shape[-1])
    return float(10 * power[..., first:].sum().clamp(min=1e-20).log10())


def mean_log_magnitude(estimate: Tensor, target: Tensor, sample_rate: int) -> float:
    """The objective's log-magnitude term, averaged over blocks and window sizes."""
    stft = MultiResolutionSTFT(DEFAULT_WINDOW_SIZES)
    length = BLOCK_SECONDS * sample_rate
    values = []
    for start in range(0, max(1, target.shape[-1] - length + 1), length):
        x, y = (
            stft(k_weight(audio[None, :, start : start + length], sample_rate))
            for audio in (estimate, target)
        )
        values += [
            float(log_magnitude(mid_side_left_right(a, dim=1), mid_side_left_right(b, dim=1)))
            for a, b in zip(x, y, strict=True)
        ]
    return statistics.mean(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="ear-vae-tiny")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    vae = EarVAE.from_pretrained(arguments.model)
    rows = []
    print(f"{'SI-SDR dB':>9}  {'log-mag':>7}  {'>5 kHz dB':>9}  file")
    for path in find_audio_files(arguments.folder):
        audio, sample_rate = read_audio(path)
        target = audio.expand(2, -1)
        with torch.inference_mode():
            estimate = vae.reconstruct(target, sample_rate=sample_rate)
            row = {
                "file": str(path.relative_to(arguments.folder)),
                "si_sdr_db": float(si_sdr_db(estimate, target)),
                "log_magnitude": mean_log_magnitude(estimate, target, sample_rate),
                "treble_difference_db": treble_db(estimate, sample_rate) - treble_db(target, sample_rate),
            }
        rows.append(row)
        print_row(row)
    names = ("si_sdr_db", "log_magnitude", "treble_difference_db")
    print_row({"file": "median"} | {name: statistics.median(row[name] for row in rows) for name in names})
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def print_row(row: dict[str, float | str]) -> None:
    figures = f"{row['si_sdr_db']:9.2f}  {row['log_magnitude']:7.3f}  {row['treble_difference_db']:9.2f}"
    print(f"{figures}  {row['file']}", flush=True)


if __name__ == "__main__":
    main()
