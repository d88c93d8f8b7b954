"""How much faster training on a CPU is when it is compiled and in bfloat16, and whether it learns the same.

    python benchmarks/training_cpu.py --config tiny --data.folder MUSIC [--steps 200] [OPTIONS OF ear-vae fit]

Trains from the same weights on the same segments several times: as `ear-vae fit` does by default, compiled,
and compiled with bfloat16 autocast. Prints the median time of a step, the ratio to the default, and the mean
total loss of each quarter of the steps. Configs and options are those of `ear-vae fit`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

import lightning as L
import torch
from training_step import train

VARIANTS = {
    "as by default": ["--model.compiled=false", "--trainer.precision=32-true"],
    "compiled": ["--model.compiled=true", "--trainer.precision=32-true"],
    "compiled, bf16-mixed": ["--model.compiled=true", "--trainer.precision=bf16-mixed"],
}
WARMUP = 3


class Steps(L.Callback):
    """Notes when each step ended, and its loss."""

    def __init__(self) -> None:
        self.ended: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes both."""
        self.losses.append(float(trainer.callback_metrics["train/total"]))
        self.ended.append(time.perf_counter())
        self.audio_seconds = batch.shape[0] * batch.shape[-1] / pl_module.vae.sample_rate

    @property
    def seconds_a_step(self) -> float:
        """Median over the steps behind the first ones."""
        return statistics.median(b - a for a, b in itertools.pairwise(self.ended[WARMUP:]))

    def quarters(self) -> list[float]:
        """Mean loss of each quarter of the steps."""
        length = max(1, len(self.losses) // 4)
        return [statistics.fmean(self.losses[i * length : (i + 1) * length]) for i in range(4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", action="append", required=True, help="shipped config or file")
    parser.add_argument("--steps", type=int, default=200)
    arguments, options = parser.parse_known_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.steps} steps")
    plain = 0.0
    for name, own in VARIANTS.items():
        noted = Steps()
        train(arguments.config, [*options, "--trainer.accelerator=cpu", *own], arguments.steps, noted)
        seconds, audio = noted.seconds_a_step, noted.audio_seconds
        plain = plain or seconds
        print(
            f"{name:22} {1000 * seconds:7.0f} ms a step, {audio / seconds:5.2f} s of audio per second, "
            f"{plain / seconds:.2f} times as fast; loss by quarter: "
            + " ".join(f"{loss:.3f}" for loss in noted.quarters()),
            flush=True,
        )


if __name__ == "__main__":
    main()
