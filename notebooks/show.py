"""How the notebooks draw and play: one look for all figures, spectrograms, players."""

from itertools import pairwise

import matplotlib as mpl
import numpy as np
import torch
from IPython.display import HTML, Audio, display
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from torch import Tensor

# Okabe and Ito's colours, which all kinds of colour vision tell apart.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
_LOWEST_HZ = 40
_ROWS = 200
_COLUMNS = 420
_WINDOW = 4096


def use_style() -> None:
    """Sets the look of all figures that follow."""
    mpl.rcParams.update(
        {
            "figure.figsize": (9.5, 3.2),
            "figure.dpi": 90,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#dddddd",
            "axes.prop_cycle": mpl.cycler(color=[BLUE, RED, GREEN, ORANGE, SKY, PINK, BLACK]),
            "legend.frameon": False,
        }
    )


def play(sample_rate: int, **signals: Tensor) -> None:
    """Shows a player for each signal [C, T], under its name, at the level that it has."""
    for name, audio in signals.items():
        display(HTML(f"<b>{name.replace('_', ' ')}</b>"))
        display(Audio(audio.detach().clamp(-1, 1).numpy(), rate=sample_rate, normalize=False))


def loudest(audio: Tensor, sample_rate: int, seconds: float) -> Tensor:
    """Cuts out the loudest stretch of a song [C, T]; shorter songs come back whole."""
    length = round(seconds * sample_rate)
    if audio.shape[1] <= length:
        return audio
    energy = audio.double().square().sum(dim=0).cumsum(dim=0)
    start = int((energy[length:] - energy[:-length])[:: sample_rate // 10].argmax()) * (sample_rate // 10)
    return audio[:, start : start + length]


def spectrogram(
    axes: Axes,
    audio: Tensor,
    sample_rate: int,
    *,
    title: str = "",
    floor_db: float = -100,
) -> AxesImage:
    """Draws the level over time and logarithmic frequency of a signal [C, T], its channels averaged in power.

    Levels are those of a sine: one at full scale is at 0 dB.
    """
    hann = torch.hann_window(_WINDOW)
    hop = max(_WINDOW // 8, audio.shape[1] // _COLUMNS)
    spectra = torch.stft(audio, _WINDOW, hop, window=hann, return_complex=True)
    power = (spectra.abs() * 2 / hann.sum()).square().mean(dim=0)
    highest = 0.48 * sample_rate
    edges = np.geomspace(_LOWEST_HZ, highest, _ROWS + 1)
    bins = edges * _WINDOW / sample_rate
    rows = []
    for low, high in pairwise(bins):
        # Several bins to a row at the top, several rows to a bin at the bottom.
        first, last = int(low + 0.5), max(int(low + 0.5) + 1, int(high + 0.5))
        rows.append(power[first:last].amax(dim=0))
    level = 10 * torch.stack(rows).clamp(min=1e-14).log10()
    seconds = audio.shape[1] / sample_rate
    image = axes.imshow(
        level,
        aspect="auto",
        origin="lower",
        cmap="magma",
        vmin=floor_db,
        vmax=-20,
        extent=(0, seconds, 0, _ROWS),
        interpolation="nearest",
    )
    ticks = [hz for hz in (50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000) if hz < highest]
    axes.set_yticks(
        [_ROWS * np.log(hz / _LOWEST_HZ) / np.log(highest / _LOWEST_HZ) for hz in ticks],
        [f"{hz // 1000}k" if hz >= 1_000 else str(hz) for hz in ticks],
    )
    axes.set(title=title, xlabel="seconds", ylabel="Hz")
    axes.grid(False)
    return image
