"""How long a training step takes, and where the time goes.

    python benchmarks/training_step.py --config tiny --data.folder MUSIC [--steps 10] [--fused-sums]
        [--sine reduced] [OPTIONS OF ear-vae fit]

Runs the module of a config on its data as `ear-vae fit` would, without checkpoints, logs and validation:
first steps that are not counted, then steps that are timed as a whole, then as many whose parts are timed (a
GPU is waited for at the borders of the parts, which costs some overlap). Then times the reconstruction terms
on the last batch, forward and backward, all together as in training and each alone from scratch.
Configs and options are those of `ear-vae fit`.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import lightning as L
import torch
from lightning.pytorch.profilers import Profiler
from torch import Tensor

from ear_vae._atomic import atomic_path
from ear_vae.cli.fit import shipped_configs
from ear_vae.cli.lightning_cli import FitCLI
from ear_vae.losses import ReconstructionObjective
from ear_vae.losses.objective import ADVERSARIAL_TERMS
from ear_vae.network.snake_common import Sine, switches
from ear_vae.training import AudioDataModule, EarVAEModule

DATA = "data: waiting for the batch"
GENERATOR, GENERATOR_BACK = "generator: forward", "generator: backward"
LOSSES, LOSSES_BACK = "reconstruction losses: forward", "reconstruction losses: backward"
JUDGE, JUDGE_BACK = "discriminator's own step: forward", "discriminator's own step: backward"
FEEDBACK, FEEDBACK_BACK = "adversarial terms: forward", "adversarial terms: backward"
BALANCER = "balancer: gradient of each term"
OPTIMIZERS, AVERAGE = "optimizers, clipping", "average of the weights"
REST = "rest: Lightning, logging"
PARTS = (
    *(DATA, GENERATOR, GENERATOR_BACK, LOSSES, LOSSES_BACK, JUDGE, JUDGE_BACK),
    *(FEEDBACK, FEEDBACK_BACK, BALANCER, OPTIMIZERS, AVERAGE, REST),
)
NOT_OF_AUDIO = ("kl", *ADVERSARIAL_TERMS)
# Lightning's names for getting a batch.
DATA_ACTIONS = ("train_dataloader_next", "batch_to_device")


class Ledger:
    """Sums up time by part; what a part calls that is a part itself is not counted in the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.running = False
        self._parts = [REST]
        self._since = 0.0

    def start(self) -> None:
        self.running, self._since = True, now()

    def stop(self) -> None:
        self._book()
        self.running = False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Books the time within to `name`."""
        self._book()
        self._parts.append(name)
        try:
            yield
        finally:
            self._book()
            self._parts.pop()

    def turn(self, before: str, after: str) -> None:
        """Books what follows to `after` where it would be booked to `before`."""
        if self._parts[-1] == before:
            self._book()
            self._parts[-1] = after

    def _book(self) -> None:
        if self.running:
            moment = now()
            self.seconds[self._parts[-1]] += moment - self._since
            self._since = moment


class PartsOfAStep:
    """Times the parts of a module's own training step, by wrapping what it calls.

    Gradients come to the rebuilt audio from the adversarial terms first, which were computed last, then from
    the reconstruction terms; hooks on views of it mark where one ends and the next begins.
    """

    def __init__(self, module: EarVAEModule, ledger: Ledger) -> None:
        self.ledger = ledger
        self.balanced = module.balancer is not None
        self.adversarial = False
        self._replace(module, "_backward", self._backward_of)
        self._time(module, "_clip", OPTIMIZERS)
        self._time(module, "_step_if_finite", OPTIMIZERS)
        self._time(module, "_step", OPTIMIZERS)
        self._replace(module, "manual_backward", self._backward)
        self._replace(module.objective, "terms", self._terms)
        self._replace(module, "_adversarial_terms", self._adversarial_terms)
        self._time(module, "_reconstruct_draw", GENERATOR)
        self._time(module, "_balanced", BALANCER)
        if module.ema is not None:
            self._time(module.ema, "update", AVERAGE)
        if module.discriminator is not None:
            self._replace(module.discriminator, "forward", self._judge)

    def _time(self, owner: Any, name: str, part: str) -> None:
        def timed(original: Callable[..., Any], *arguments: Any) -> Any:
            with self.ledger.part(part):
                return original(*arguments)

        self._replace(owner, name, timed)

    @staticmethod
    def _replace(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, lambda *arguments: wrapper(original, *arguments))

    def _judge(self, original: Callable[..., Any], audio: Tensor) -> Any:
        with self.ledger.part(FEEDBACK if self.adversarial else JUDGE):
            return original(audio)

    def _terms(self, original: Callable[..., Any], estimate: Tensor, *arguments: Any) -> Any:
        with self.ledger.part(LOSSES):
            return original(self._marked(estimate, LOSSES_BACK, GENERATOR_BACK), *arguments)

    def _adversarial_terms(self, original: Callable[..., Any], estimate: Tensor, target: Tensor) -> Any:
        self.adversarial = True
        with self.ledger.part(FEEDBACK):
            terms = original(self._marked(estimate, FEEDBACK_BACK, LOSSES_BACK), target)
        self.adversarial = bool(terms)
        return terms

    def _marked(self, estimate: Tensor, before: str, after: str) -> Tensor:
        """The same audio, whose gradient, once complete, turns from one part to the next."""
        view = estimate.view_as(estimate)
        view.register_hook(lambda gradient: self.ledger.turn(before, after))
        return view

    def _backward_of(self, original: Callable[..., Any], loss: Tensor, what: str) -> None:
        if what == "discriminator":
            self.first = JUDGE_BACK
        elif self.balanced:
            self.first = GENERATOR_BACK
        else:
            self.first = FEEDBACK_BACK if self.adversarial else LOSSES_BACK
        original(loss, what)
        if what == "vae":
            self.adversarial = False

    def _backward(self, original: Callable[..., Any], loss: Tensor) -> None:
        with self.ledger.part(self.first):
            original(loss)


class DataTime(Profiler):
    """Lets Lightning say when it waits for a batch."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self._open: dict[str, Any] = {}

    def start(self, action_name: str) -> None:
        if action_name.endswith(DATA_ACTIONS):
            self._open[action_name] = self.ledger.part(DATA)
            self._open[action_name].__enter__()

    def stop(self, action_name: str) -> None:
        if action_name in self._open:
            self._open.pop(action_name).__exit__(None, None, None)


class Measure(L.Callback):
    """Counts off the steps: some to warm up, `steps` as they are, `steps` by part."""

    def __init__(self, ledger: Ledger, warmup: int, steps: int) -> None:
        self.ledger, self.warmup, self.steps = ledger, warmup, steps
        self.plain_seconds = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Starts and stops the clocks."""
        step = trainer.global_step
        if step == self.warmup:
            reset_peak()
            self.plain_seconds = -now()
        elif step == self.warmup + self.steps:
            self.plain_seconds += now()
            self.peak = peak_bytes(batch)
            assert isinstance(pl_module, EarVAEModule)
            PartsOfAStep(pl_module, self.ledger)
            self.ledger.start()
        elif step == self.warmup + 2 * self.steps:
            self.ledger.stop()
            self.batch = batch


def now() -> float:
    """The time, once a GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def together_and_alone(module: EarVAEModule, target: Tensor, repeats: int) -> tuple[float, dict[str, float]]:
    """Seconds of all reconstruction terms at once, and of each with its own filter and transforms.

    Forward and backward to the rebuilt audio, medians of turns.
    """
    used = module.objective
    weights = {name: weight for name, weight in used.weights.items() if weight and name not in NOT_OF_AUDIO}
    absent = dict.fromkeys(used.weights, 0.0)
    objectives = [
        ReconstructionObjective(
            used.sample_rate,
            weights=absent | chosen,
            window_sizes=used.stft.window_sizes,
            weighting=used.weighting,
            magnitude_channels=used.magnitude_channels,
        ).to(target.device)
        for chosen in (weights, *({name: weight} for name, weight in weights.items()))
    ]
    # Lightning takes it off the GPU when training is over.
    module.to(target.device)
    posterior = module.vae.encode(target)
    estimate = module.vae.decode(posterior.mean, num_samples=target.shape[-1]).detach().requires_grad_(True)
    seconds: list[list[float]] = [[] for _ in objectives]
    for _ in range(repeats):
        for found, objective in zip(seconds, objectives, strict=True):
            start = now()
            objective(estimate, target, posterior).backward()
            found.append(now() - start)
    together, *alone = (statistics.median(found[1:]) for found in seconds)
    return together, dict(zip(weights, alone, strict=True))


def train(
    configs: list[str],
    options: list[str],
    steps: int,
    *callbacks: L.Callback,
    profiler: Profiler | None = None,
    processes: int = 1,
) -> EarVAEModule:
    """Trains as `ear-vae fit` does with these configs and options, and writes nothing; returns the module.

    Several processes share the batch, which must divide among them; they start from the same command line.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    shipped = shipped_configs()
    named = [f"--config={shipped.get(name, name)}" for name in ("base", *configs)]
    cli = FitCLI(EarVAEModule, AudioDataModule, args=[*named, *options], run=False, seed_everything_default=0)
    settings = cli.config["trainer"]
    if cli.datamodule.batch_size % processes:
        raise SystemExit(
            f"a batch of {cli.datamodule.batch_size} does not divide among {processes} processes"
        )
    cli.datamodule.batch_size //= processes
    L.Trainer(
        accelerator=settings["accelerator"],
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        precision=settings["precision"],
        deterministic=settings["deterministic"],
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        profiler=profiler,
    ).fit(cli.model, datamodule=cli.datamodule)
    return cli.model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", action="append", required=True, help="shipped config or file")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--fused-sums", action="store_true", help="as ear_vae.network.snake_common.switches")
    parser.add_argument("--sine", choices=get_args(Sine), default="exact", help="as there")
    parser.add_argument("--json", type=Path)
    arguments, options = parser.parse_known_args()
    switches.fused_sums, switches.sine = arguments.fused_sums, arguments.sine
    ledger = Ledger()
    measure = Measure(ledger, arguments.warmup, arguments.steps)
    steps = arguments.warmup + 2 * arguments.steps
    module = train(arguments.config, options, steps, measure, profiler=DataTime(ledger))
    report(module, measure)
    if arguments.json:
        parts = {part: seconds / measure.steps for part, seconds in measure.ledger.seconds.items()}
        result = {
            "batch": list(measure.batch.shape),
            "switches": asdict(switches),
            "seconds_a_step": measure.plain_seconds / measure.steps,
            "peak_bytes": measure.peak,
            "seconds_by_part": parts,
        }
        with atomic_path(arguments.json, overwrite=True) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def reset_peak() -> None:
    """What was held before, such as by making the first weights, is not a step's."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(target: Tensor) -> int | None:
    """The most memory that has been held in the counted steps; None where the system does not tell."""
    if target.is_cuda:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    kilobytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(kilobytes) * 1024


def report(module: EarVAEModule, measure: Measure) -> None:
    """Prints all that was measured."""
    target, steps = measure.batch, measure.steps
    device = torch.cuda.get_device_name() if target.is_cuda else f"CPU, {torch.get_num_threads()} threads"
    audio_seconds = target.shape[0] * target.shape[-1] / module.vae.sample_rate
    each = measure.plain_seconds / steps
    millions = [sum(p.numel() for p in n.parameters()) / 1e6 for n in module._networks().values()]
    print(f"{device}; torch {torch.__version__}; VAE {millions[0]:.1f} M parameters", end="")
    print(f", discriminator {millions[1]:.1f} M" if len(millions) > 1 else ", no discriminator")
    print(f"batch {list(target.shape)}: {audio_seconds:.2f} s of audio a step")
    speed = f"{1 / each:.3g} steps/s, {1000 * each:.1f} ms a step"
    print(f"{speed}, {audio_seconds / each:.3g} s of audio per second")
    if peak := measure.peak:
        print(f"{peak / 1e6:.0f} MB at most, {'on the GPU' if target.is_cuda else 'of the whole process'}")
    total = sum(measure.ledger.seconds.values())
    print(f"\nparts of {steps} more steps, {1000 * total / steps:.1f} ms each:")
    for part in PARTS:
        if seconds := measure.ledger.seconds.get(part):
            print(f"{1000 * seconds / steps:9.1f} ms {100 * seconds / total:5.1f} %  {part}")
    together, alone = together_and_alone(module, target, max(3, steps))
    print("\nreconstruction terms, forward and backward:")
    for name, seconds in alone.items():
        print(f"{1000 * seconds:9.1f} ms  {name} alone")
    print(f"{1000 * sum(alone.values()):9.1f} ms  their sum")
    print(f"{1000 * together:9.1f} ms  together: {sum(alone.values()) / together:.2f} times as fast")


if __name__ == "__main__":
    main()
