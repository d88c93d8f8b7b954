"""What TF32 does to latents and audio, emulated on any device.

    python benchmarks/tf32.py AUDIO [--model ear-vae-tiny] [--seconds 10]

Before every convolution input and weights are rounded to TF32's 10 bits of mantissa, as tensor cores do; sums
stay in float32. Prints the SI-SDR of the latents and of the audio against those without rounding.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ear_vae import EarVAE
from ear_vae.audio import read_audio

CONVOLUTIONS = {"conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d"}
DROPPED_BITS = 13


def rounded(x: Tensor) -> Tensor:
    """float32 to the nearest value with 10 bits of mantissa, ties to even."""
    bits = x.contiguous().view(torch.int32)
    half = (1 << (DROPPED_BITS - 1)) - 1 + ((bits >> DROPPED_BITS) & 1)
    return ((bits + half) & -(1 << DROPPED_BITS)).view(torch.float32).view_as(x)


class Tf32(TorchFunctionMode):
    """Rounds what convolutions multiply."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in CONVOLUTIONS:
            x, weight, *rest = args
            args = rounded(x), rounded(weight), *rest
        return func(*args, **(kwargs or {}))


def si_sdr_db(estimate: Tensor, target: Tensor) -> float:
    """Of all values together."""
    scaled = (estimate * target).sum() / target.square().sum() * target
    return float(10 * torch.log10(scaled.square().sum() / (estimate - scaled).square().sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("audio")
    parser.add_argument("--model", default="ear-vae-tiny")
    parser.add_argument("--seconds", type=float, default=10)
    arguments = parser.parse_args()
    vae = EarVAE.from_pretrained(arguments.model)
    audio, rate = read_audio(arguments.audio)
    audio = audio[:, : int(arguments.seconds * rate)]
    with torch.no_grad():
        latents = vae.encode(audio, rate).mean
        sound = vae.decode(latents)
        with Tf32():
            other_latents = vae.encode(audio, rate).mean
            other_sound = vae.decode(latents)
    print(f"latents {si_sdr_db(other_latents.double(), latents.double()):.1f} dB")
    print(f"audio of equal latents {si_sdr_db(other_sound.double(), sound.double()):.1f} dB")


if __name__ == "__main__":
    main()
