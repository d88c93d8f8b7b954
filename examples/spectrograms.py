"""Draws the spectrogram of a song above that of what a model makes of it.

pip install ".[notebooks]"
python examples/spectrograms.py SONG PICTURE.webp [--model ear-vae-tiny] [--seconds 10]
"""

import argparse

import numpy as np
import torch
from torch import Tensor

from ear_vae import EarVAE
from ear_vae.audio import read_audio
from ear_vae.evaluation import measure

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:
    raise SystemExit('this needs matplotlib: pip install ".[notebooks]" in the clone') from None

WINDOW, HOP, LOWEST_HZ, RANGE_DB = 4096, 512, 60, 90


def level_db(audio: Tensor) -> np.ndarray:
    """Power of the mean of all channels in dB, [frequencies, frames]; a full-scale sine is at 0."""
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(audio.mean(dim=0), WINDOW, HOP, window=window, return_complex=True)
    return (20 * (spectrum.abs() * 2 / window.sum()).clamp_min(1e-9).log10()).numpy()


def main() -> None:
    """Reads the command line and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("song", help="audio file")
    parser.add_argument("picture", help="image to write; the extension chooses the format")
    parser.add_argument("--model", default="ear-vae-tiny")
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()

    audio, rate = read_audio(arguments.song)
    vae = EarVAE.from_pretrained(arguments.model)
    rebuilt = vae.reconstruct(audio, sample_rate=rate)
    figures = measure(rebuilt, audio, sample_rate=rate, names=("si_sdr_db", "mel_distance"))
    near = f"SI-SDR {figures['si_sdr_db']:.1f} dB, mel distance {figures['mel_distance']:.2f}"

    plt.rcParams.update({"font.size": 11, "axes.titlelocation": "left"})
    figure, panels = plt.subplots(2, 1, figsize=(9, 6), sharex=True, sharey=True, layout="constrained")
    frequencies = np.fft.rfftfreq(WINDOW, 1 / rate)
    names = ("original", f"through {vae.name}: {near}")
    for panel, signal, name in zip(panels, (audio, rebuilt), names, strict=True):
        levels = level_db(signal[:, : round(arguments.seconds * rate)])
        times = np.arange(levels.shape[1]) * HOP / rate
        image = panel.pcolormesh(
            times, frequencies[1:], levels[1:], vmin=-RANGE_DB - 20, vmax=-20, cmap="magma", rasterized=True
        )
        panel.set(title=name, yscale="log", ylim=(LOWEST_HZ, rate / 2), ylabel="frequency (Hz)")
        panel.set_yticks([100, 1000, 10_000], ["100", "1 k", "10 k"])
    panels[-1].set_xlabel("time (s)")
    figure.colorbar(image, ax=panels, label="level (dB)", shrink=0.7)
    figure.savefig(arguments.picture, dpi=100)


if __name__ == "__main__":
    main()
