"""Whether a model runs better in bfloat16 here: found out by running it."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from ear_vae.dsp.si_sdr import scale_invariant_sdr_db
from ear_vae.inference.runner import Runner
from ear_vae.network import Autoencoder

PROMISED_DB = 45.0
"""SI-SDR against float32, encoded and decoded, below which bfloat16 is not chosen."""
# What is less may be the noise of the clock.
_WORTHWHILE_RATIO = 1.15
_TRIAL_SECONDS = 0.5
_TRIALS = 2


class DtypeChoice(NamedTuple):
    """A dtype to compute in, and why."""

    dtype: torch.dtype
    reason: str


def cast_if_better(model: Autoencoder) -> DtypeChoice:
    """Casts a float32 model to bfloat16 where that is faster here and as exact as promised.

    Processors differ in whether they multiply bfloat16, and models in how much of their time goes into
    products: the model encodes and decodes half a second of a made-up chord three times in both dtypes. A GPU
    that has bfloat16 gets it untimed.

    Args:
        model: Model in float32, on the device where it will run. It stays in float32, with the same weights,
            where that is chosen.

    Returns:
        The dtype that the model is in now, and the reason in a few words.
    """
    device = model.device
    if device.type == "cuda":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            return DtypeChoice(torch.float32, "this GPU has no bfloat16")
        model.cast(torch.bfloat16)
        return DtypeChoice(torch.bfloat16, "this GPU has it")
    if device.type != "cpu":
        return DtypeChoice(torch.float32, f"bfloat16 is not tried on {device.type}")
    audio = _chord(model.config.sample_rate, model.config.audio_channels)
    weights = dict(model.state_dict())
    exact, exact_seconds = _timed(model, audio)
    model.cast(torch.bfloat16)
    rounded, seconds = _timed(model, audio)
    error_db = float(scale_invariant_sdr_db(rounded, exact).mean())
    ratio = exact_seconds / seconds
    measured = f"bfloat16 is {ratio:.2f} times as fast here, {error_db:.1f} dB from float32"
    if ratio >= _WORTHWHILE_RATIO and error_db >= PROMISED_DB:
        return DtypeChoice(torch.bfloat16, measured)
    model.load_state_dict(weights, assign=True)
    return DtypeChoice(torch.float32, measured)


@torch.no_grad()
def _timed(model: Autoencoder, audio: Tensor) -> tuple[Tensor, float]:
    """What a model rebuilds, and the least of the times that this took after the first."""
    runner, times = Runner(model), []
    # The first has kernels generated.
    for _ in range(1 + _TRIALS):
        start = time.perf_counter()
        rebuilt = runner.decode(runner.encode(audio).chunk(2, dim=1)[0])
        times.append(time.perf_counter() - start)
    return rebuilt, min(times[1:])


def _chord(sample_rate: int, channels: int) -> Tensor:
    """Plucked notes with overtones and some noise, [1, C, T], the same each time."""
    seconds = torch.arange(round(_TRIAL_SECONDS * sample_rate)) / sample_rate
    noise = torch.randn(channels, len(seconds), generator=torch.Generator().manual_seed(0))
    audio = 0.003 * noise
    for number, pitch in enumerate((110.0, 164.8, 220.0, 277.2, 659.3)):
        for overtone in range(1, 13):
            angle = 2 * math.pi * pitch * overtone * seconds + number * overtone
            audio = audio + 0.1 / overtone * torch.exp(-3 * overtone**0.5 * seconds) * angle.sin()
    return audio.unsqueeze(0)
