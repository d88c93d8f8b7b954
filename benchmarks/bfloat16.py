"""How far bfloat16 is from float32 on music, encoded and decoded, and decoded alone.

    python benchmarks/bfloat16.py MUSIC [--model ear-vae-tiny] [--start 20] [--seconds 6]

Prints for each file the SI-SDR, in dB, of what a model gives in bfloat16 against what it gives in float32.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from ear_vae import EarVAE
from ear_vae.audio import find_audio_files, read_audio
from ear_vae.dsp.si_sdr import scale_invariant_sdr_db


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("music", type=Path)
    parser.add_argument("--model", default="ear-vae-tiny")
    parser.add_argument("--start", type=float, default=20.0, help="seconds")
    parser.add_argument("--seconds", type=float, default=6.0)
    arguments = parser.parse_args()
    exact, reduced = (
        EarVAE.from_pretrained(arguments.model, dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    print("| track | encoded and decoded, dB | decoded alone, dB |\n|---|---|---|")
    rows = []
    for path in find_audio_files(arguments.music):
        audio, rate = read_audio(path)
        audio = audio[:, round(arguments.start * rate) :][:, : round(arguments.seconds * rate)]
        if not audio.shape[-1]:
            print(f"| {path.stem} | shorter than --start | |")
            continue
        with torch.inference_mode():
            latents = exact.encode(audio, rate).mean
            target = exact.decode(latents)
            estimates = reduced.decode(reduced.encode(audio, rate).mean), reduced.decode(latents)
        rows.append([float(scale_invariant_sdr_db(found, target).mean()) for found in estimates])
        print(f"| {path.stem} | {rows[-1][0]:.1f} | {rows[-1][1]:.1f} |")
    if rows:
        both, alone = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"| **median** | {both:.1f} | {alone:.1f} |")


if __name__ == "__main__":
    main()
