"""How much faster training on a CPU is compiled, in bfloat16 or in two processes, and what it learns then.

    python benchmarks/training_cpu.py --config tiny --data.folder MUSIC [--steps 200] [OPTIONS OF ear-vae fit]

Trains from the same weights on the same segments several times, each in a process of its own: as `ear-vae
fit` does by default, compiled, compiled with bfloat16 autocast, and compiled in two processes that share the
batch and the cores. Prints the median time of a step, the ratio to the default, and the mean total loss of
each quarter of the steps. Configs and options are those of `ear-vae fit`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import lightning as L
import torch
from training_step import train

SHARED = ", two processes"
VARIANTS = {
    "as by default": ["--model.compiled=false", "--trainer.precision=32-true"],
    "compiled": ["--model.compiled=true", "--trainer.precision=32-true"],
    "compiled, bf16-mixed": ["--model.compiled=true", "--trainer.precision=bf16-mixed"],
    "compiled" + SHARED: ["--model.compiled=true", "--trainer.precision=32-true"],
    "compiled, bf16-mixed" + SHARED: ["--model.compiled=true", "--trainer.precision=bf16-mixed"],
}
WARMUP = 3


class Steps(L.Callback):
    """Notes when each step ended, and its loss."""

    def __init__(self) -> None:
        self.ended: list[float] = []
        self.losses: list[float] = []
        self.audio_seconds = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes both."""
        # Of the whole batch, whatever share of it this process has.
        self.losses.append(
            float(trainer.strategy.reduce(trainer.callback_metrics["train/total"], reduce_op="mean"))
        )
        self.ended.append(time.perf_counter())
        self.audio_seconds = trainer.world_size * batch.shape[0] * batch.shape[-1] / pl_module.vae.sample_rate

    @property
    def seconds_a_step(self) -> float:
        """Median over the steps behind the first ones."""
        return statistics.median(b - a for a, b in itertools.pairwise(self.ended[WARMUP:]))

    def quarters(self) -> list[float]:
        """Mean loss of each quarter of the steps."""
        length = max(1, len(self.losses) // 4)
        return [statistics.fmean(self.losses[i * length : (i + 1) * length]) for i in range(4)]


class Result(L.Callback):
    """Prints what `Steps` noted, as JSON, at the end and in one of the processes alone."""

    def __init__(self, noted: Steps) -> None:
        self.noted = noted

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints it."""
        if trainer.is_global_zero:
            noted = self.noted
            print(json.dumps([noted.seconds_a_step, noted.audio_seconds, noted.quarters()]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", action="append", required=True, help="shipped config or file")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--only", choices=VARIANTS, help="one of them, in this process, with its result as JSON"
    )
    arguments, options = parser.parse_known_args()
    if arguments.only:
        noted = Steps()
        options = [*options, "--trainer.accelerator=cpu", *VARIANTS[arguments.only]]
        processes = 2 if arguments.only.endswith(SHARED) else 1
        train(arguments.config, options, arguments.steps, noted, Result(noted), processes=processes)
        return
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.steps} steps")
    plain = 0.0
    for name in VARIANTS:
        command = [sys.executable, *sys.argv, "--only", name]
        lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
        seconds, audio, quarters = json.loads(lines[-1])
        plain = plain or seconds
        print(
            f"{name:35} {1000 * seconds:7.0f} ms a step, {audio / seconds:5.2f} s of audio per second, "
            f"{plain / seconds:.2f} times as fast; loss by quarter: "
            + " ".join(f"{loss:.3f}" for loss in quarters),
            flush=True,
        )


if __name__ == "__main__":
    main()
