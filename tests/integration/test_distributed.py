"""Two processes on the CPU against one with the summed batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ear_vae import EarVAEConfig
from ear_vae.network.discriminator import DiscriminatorConfig
from ear_vae.training import AudioDataModule, EarVAEModule
from ear_vae.training.module import ObjectiveConfig
from ear_vae.training.optimization import OptimizerConfig

TINY = EarVAEConfig(channels=4, channel_multipliers=(1, 2, 2, 2, 2))
STEPS, BATCH = 3, 4
# Of the way a tensor went, in float64: the sums over the batch are taken in another order, and AdamW makes so
# much of a gradient that is nearly zero that in float32 no bound would hold on every processor.
TOLERANCE = 1e-6


class Record(L.Callback):
    """The terms of every step, of this process."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % module.accumulate_grad_batches:
            return
        metrics = trainer.callback_metrics
        self.steps.append({name: float(v) for name, v in metrics.items() if name.startswith("train/")})


def train(root: Path, processes: int, case: str) -> None:
    """Writes the weights and the terms of each process."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    parts = 2 if case == "accumulated" and processes > 1 else 1
    torch.manual_seed(rank)
    module = EarVAEModule(
        TINY,
        discriminator=DiscriminatorConfig(window_sizes=(512, 128), channels=4),
        objective=ObjectiveConfig(balanced=case == "balanced"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0),
        discriminator_optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0),
        accumulate_grad_batches=parts,
    )
    module.load_state_dict(torch.load(root / "start.pt", weights_only=True))
    generator = torch.Generator().manual_seed(1)
    items: list[Tensor] = [0.1 * torch.randn(2, 4096, generator=generator) for _ in range(STEPS * BATCH)]
    if case == "NaN":
        # Of the second step, and of the second process if there are two.
        items[BATCH + 1][:] = torch.nan
    record = Record()
    trainer = L.Trainer(
        use_distributed_sampler=case == "files",
        accelerator="cpu",
        devices=processes,
        precision="64-true",
        strategy="ddp_find_unused_parameters_true" if processes > 1 else "auto",
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[record],
    )
    batch_size = BATCH // processes // parts
    if case == "files":
        data = AudioDataModule(
            root / "music",
            segment_seconds=0.1,
            batch_size=batch_size,
            segments_per_epoch=STEPS * BATCH,
            num_workers=1,
        )
        trainer.fit(module, datamodule=data)
    else:
        trainer.fit(module, DataLoader(items[rank::processes], batch_size=batch_size))
    name = f"{processes}-{trainer.global_rank}"
    torch.save(module.state_dict(), root / f"{name}.pt")
    (root / f"{name}.json").write_text(json.dumps(record.steps))


SCRIPT = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
from test_distributed import train
train(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
"""


def launch(root: Path, processes: int, case: str) -> str:
    script = root / "train.py"
    script.write_text(SCRIPT)
    arguments = [Path(__file__).parent, root, processes, case]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stderr


@pytest.fixture
def music(tmp_path: Path) -> Path:
    """Two good files, and one whose header is all that is good about it."""
    folder = tmp_path / "music"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in ("a.wav", "b.flac", "c.flac"):
        soundfile.write(folder / name, 0.1 * random.standard_normal((44_100, 2)), 44_100)
    content = (folder / "c.flac").read_bytes()
    (folder / "c.flac").write_bytes(content[:1000] + bytes(len(content) - 1000))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ["sum", "NaN", *(pytest.param(n, marks=pytest.mark.slow) for n in ("balanced", "files", "accumulated"))],
)
def test_two_processes_do_what_one_does(tmp_path: Path, case: str, music: Path) -> None:
    """Also where two batches of each make one step.

    Also where one of them alone gets a NaN: both leave the step out, and none waits for the other.

    Also with files, of which one is bad: others are drawn in its place, the same ones by all.
    """
    torch.manual_seed(0)
    start = EarVAEModule(
        TINY,
        discriminator=DiscriminatorConfig(window_sizes=(512, 128), channels=4),
        objective=ObjectiveConfig(balanced=case == "balanced"),
    )
    torch.save(start.state_dict(), tmp_path / "start.pt")
    said = [launch(tmp_path, processes, case) for processes in (1, 2)]
    assert all(("c.flac" in text) == (case == "files") for text in said)
    one, *both = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    for name, tensor in both[0].items():
        assert torch.equal(tensor, both[1][name]), name
        if not tensor.is_floating_point():
            assert torch.equal(tensor, one[name]), name
            continue
        moved = (one[name] - start.state_dict()[name]).norm()
        assert moved > 0, name
        assert (tensor - one[name]).norm() < TOLERANCE * moved, name
    alone, *parts = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert len(alone) == STEPS
    for step, whole in enumerate(alone):
        assert whole["train/skipped_steps"] == (2.0 if case == "NaN" and step else 0.0)
        if case == "NaN" and step == 1:
            continue
        for name, value in whole.items():
            mean = (parts[0][step][name] + parts[1][step][name]) / 2
            assert mean == pytest.approx(value, rel=1e-6), (step, name)
