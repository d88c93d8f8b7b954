"""What the parts of the objective and of the model buy, in the manner of the paper's ablation.

    python benchmarks/ablation.py --data MUSIC --validation OTHER_MUSIC \
        [--steps 300] [--seeds 0 1 2] [--variants NAME ...] [--results ablation.jsonl]

Trains one narrow model per variant and seed, without a discriminator, and prints the paper's metrics on
one excerpt of each validation file as Markdown: mean ± standard deviation over seeds, then the differences
from the base with the same seed. A seed fixes the initial weights, the segments and their order and the
draws from the posterior, alike for all variants. Finished trainings are appended to the results file and
not repeated; an interrupted one starts again.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

from ear_vae import EarVAE, EarVAEConfig, EarVAEError
from ear_vae.evaluation import measure
from ear_vae.training import AudioDataModule, EarVAEModule
from ear_vae.training.module import ObjectiveConfig
from ear_vae.training.optimization import OptimizerConfig

BASE = "base"
UNTRAINED = "base, untrained"
# Wide enough below for the filter bank, which fills 128 channels, and for some that carry nothing yet.
CONFIG = {"channels": 8, "channel_multipliers": [1, 2, 6, 20, 24]}
OPTIMIZER = {"learning_rate": 5e-4, "warmup_steps": 20, "final_fraction": 0.02, "gradient_clip": 1.0}
SEGMENT_SECONDS, BATCH_SIZE = 0.37, 2

# What each variant has that the base has not.
VARIANTS: dict[str, dict[str, Any]] = {
    UNTRAINED: {"steps": 0},
    BASE: {},
    "no weighting": {"objective": {"weighting": "none"}},
    "A-weighting": {"objective": {"weighting": "a"}},
    "without correlation": {"objective": {"weights": {"correlation": 0.0}}},
    "without IF and GD": {"objective": {"weights": {"instantaneous_frequency": 0.0, "group_delay": 0.0}}},
    "LR only": {"objective": {"magnitude_channels": "lr"}},
    "without transformer": {"config": CONFIG | {"transformer_depth": 0}},
    "random start": {"initialization": "random"},
}


class Metric(NamedTuple):
    """A column of the table: its name, the arrow of what is better, and its decimals."""

    title: str
    decimals: int


METRICS = {
    "si_sdr_db": Metric("SI-SDR dB ↑", 2),
    "mel_distance": Metric("mel ↓", 3),
    "stft_distance": Metric("STFT ↓", 3),
    "icpc": Metric("ICPC % ↑", 2),
    "ccpc": Metric("CCPC % ↑", 2),
    "true_peak_distance_db": Metric("dBTP ↓", 2),
    "loudness_distance_lu": Metric("LU ↓", 2),
}
PERCENT = ("icpc", "ccpc")


def settings_of(variant: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """All that decides the result of one training, as JSON-ready values."""
    base = {
        "steps": arguments.steps,
        "seed": seed,
        "config": CONFIG,
        "objective": {},
        "initialization": "filter_bank",
        "optimizer": OPTIMIZER,
        "data": arguments.data,
        "validation": arguments.validation,
        "segment_seconds": SEGMENT_SECONDS,
        "batch_size": BATCH_SIZE,
    }
    return base | VARIANTS[variant]


def train(settings: Mapping[str, Any]) -> tuple[EarVAE, AudioDataModule]:
    """The model that these settings give, and the data it was trained on."""
    L.seed_everything(settings["seed"], verbose=False)
    module = EarVAEModule(
        EarVAEConfig(**settings["config"]),
        objective=ObjectiveConfig(**settings["objective"]),
        optimizer=OptimizerConfig(**settings["optimizer"]),
        initialization=settings["initialization"],
        ema_decay=0,
        seed=settings["seed"],
    )
    data = AudioDataModule(
        settings["data"],
        settings["validation"],
        segment_seconds=settings["segment_seconds"],
        batch_size=settings["batch_size"],
        segments_per_epoch=max(1, settings["steps"]) * settings["batch_size"],
        num_workers=0,
        seed=settings["seed"],
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=settings["steps"],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return module.folded(), data


def evaluate(vae: EarVAE, data: AudioDataModule) -> dict[str, float]:
    """Each metric, averaged over the validation excerpts for which it is defined."""
    found: dict[str, list[float]] = {name: [] for name in METRICS}
    with torch.inference_mode():
        for (target,) in data.val_dataloader():
            estimate = vae.reconstruct(target)
            for name, value in measure(
                estimate, target, sample_rate=vae.sample_rate, names=tuple(METRICS)
            ).items():
                if name in found and math.isfinite(value):
                    found[name].append(float(value) * (100 if name in PERCENT else 1))
    return {name: statistics.fmean(values) for name, values in found.items()}


def finished(path: Path) -> list[dict[str, Any]]:
    """The records of a results file, none if there is no file yet.

    Raises:
        EarVAEError: A line is not what this script writes.
    """
    if not path.exists():
        return []
    return [
        record_of(line, f"{path}: line {number}")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    ]


def record_of(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        return {"settings": record["settings"], "metrics": record["metrics"]}
    except (ValueError, KeyError, TypeError):
        raise EarVAEError(f"{where} is no result of this script; delete the line") from None


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a line in one write, so that several processes may share the file."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(handle, (json.dumps(record) + "\n").encode())
    finally:
        os.close(handle)


def spread(values: Sequence[float], decimals: int, *, signed: bool = False) -> str:
    """mean ± standard deviation over seeds; a signed mean beyond twice the deviation is bold."""
    mean, sign = statistics.fmean(values), "+" if signed else ""
    if len(values) == 1:
        return f"{mean:{sign}.{decimals}f}"
    deviation = statistics.stdev(values)
    text = f"{mean:{sign}.{decimals}f} ± {deviation:.{decimals}f}"
    return f"**{text}**" if signed and abs(mean) > 2 * deviation else text


def tables(results: Mapping[str, Mapping[int, Mapping[str, float]]]) -> str:
    """The figures of each variant and their differences from the base, as two Markdown tables.

    Args:
        results: Metrics by variant and seed.
    """
    rule = "|---" * (len(METRICS) + 1) + "|"
    head = "| {} | " + " | ".join(metric.title for metric in METRICS.values()) + " |\n" + rule
    lines = [head.format("variant")]
    for variant, seeds in results.items():
        cells = [spread([m[n] for m in seeds.values()], metric.decimals) for n, metric in METRICS.items()]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    base = results.get(BASE, {})
    differences = []
    for variant, seeds in results.items():
        shared = sorted(seeds.keys() & base.keys())
        if variant == BASE or not shared:
            continue
        cells = [
            spread([seeds[s][n] - base[s][n] for s in shared], metric.decimals, signed=True)
            for n, metric in METRICS.items()
        ]
        differences.append(f"| {variant} | {' | '.join(cells)} |")
    if differences:
        lines += ["", head.format("difference from base"), *differences]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of training music")
    parser.add_argument("--validation", required=True, help="folder of other music")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--results", type=Path, default=Path("ablation.jsonl"))
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    done = finished(arguments.results)
    results: dict[str, dict[int, dict[str, float]]] = {variant: {} for variant in arguments.variants}
    # Seeds outside: what a run that is cut short has finished can be compared.
    for seed in arguments.seeds:
        for variant in arguments.variants:
            settings = settings_of(variant, seed, arguments)
            known = [record["metrics"] for record in done if record["settings"] == settings]
            if not known:
                start = time.perf_counter()
                known = [evaluate(*train(settings))]
                append(arguments.results, {"variant": variant, "settings": settings, "metrics": known[0]})
                seconds = time.perf_counter() - start
                print(f"{variant}, seed {seed}: {seconds:.0f} s", file=sys.stderr, flush=True)
            results[variant][seed] = known[0]
    print(tables(results))


if __name__ == "__main__":
    main()
