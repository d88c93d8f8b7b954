"""Gradients of several batches make one step, whatever optimizer takes it, with one wait for the device."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from ear_vae import EarVAEConfig, EarVAEError
from ear_vae.training import (
    AudioDataModule,
    DiscriminatorConfig,
    EarVAEModule,
    ObjectiveConfig,
    OptimizerConfig,
)
from ear_vae.training.callbacks import Checkpoints

TINY = EarVAEConfig(channels=4, channel_multipliers=(1, 2, 2, 2, 2))
SMALL = DiscriminatorConfig(window_sizes=(512, 128), channels=4)
FAST = OptimizerConfig(learning_rate=1e-3, warmup_steps=0)
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def batches(count: int, size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list((0.1 * torch.randn(count * size, 2, 4096, generator=generator)).split(size))


def fit(module: EarVAEModule, data: list[Tensor], **settings: Any) -> L.Trainer:
    settings = {"max_steps": len(data), **settings}
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, DataLoader(data, batch_size=None))
    return trainer


@pytest.mark.parametrize(
    "discriminator", [None, pytest.param(SMALL, marks=pytest.mark.slow)], ids=["alone", "adversarial"]
)
def test_two_halves_are_one_batch(discriminator: DiscriminatorConfig | None) -> None:
    """To one millionth of the way that each tensor went, in float64."""
    ends, logged = [], []
    for size, parts in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        module = EarVAEModule(
            TINY,
            discriminator=discriminator,
            optimizer=FAST,
            discriminator_optimizer=FAST,
            accumulate_grad_batches=parts,
        ).double()
        start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        data = [batch.double() for batch in batches(8 // size, size)]
        trainer = fit(module, data, max_steps=2, precision="64-true")
        assert trainer.global_step == 2
        ends.append(module.state_dict())
        logged.append({n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("train/")})
    for name, whole in ends[0].items():
        way = (whole - start[name]).abs().max()
        assert (whole - ends[1][name]).abs().max() <= 1e-6 * way, name
    assert logged[0] == pytest.approx(logged[1], rel=1e-6)


class Stop(L.Callback):
    """Terminates the process after its third batch, which is the first of the second step."""

    def __init__(self) -> None:
        self.seen = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen += 1
        if self.seen == 3:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("discriminator", [None, SMALL], ids=["alone", "adversarial"])
def test_resumed_in_the_middle_of_a_step(discriminator: DiscriminatorConfig | None, tmp_path: Path) -> None:
    """Bit for bit; an epoch has five batches, so that a step goes over its end."""
    music = tmp_path / "music"
    music.mkdir()
    noise = 0.1 * np.random.default_rng(0).standard_normal((44_100, 2))
    soundfile.write(music / "a.wav", noise, 44_100)

    def train(root: Path, *callbacks: L.Callback, parts: int = 2, resume: bool = False) -> dict[str, Any]:
        torch.manual_seed(0)
        module = EarVAEModule(
            TINY, discriminator=discriminator, optimizer=FAST, accumulate_grad_batches=parts
        )
        data = AudioDataModule(music, segment_seconds=0.1, batch_size=1, segments_per_epoch=5, num_workers=0)
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=3,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=root,
            callbacks=[*callbacks, Checkpoints(every_n_steps=10)],
        )
        checkpoint = root / "checkpoints" / "last.ckpt"
        trainer.fit(module, data, ckpt_path=checkpoint if resume else None, weights_only=True)
        return dict(torch.load(checkpoint, weights_only=True))

    whole = train(tmp_path / "whole")
    with pytest.raises(SystemExit):
        train(tmp_path / "parts", Stop())
    stopped = torch.load(tmp_path / "parts" / "checkpoints" / "last.ckpt", weights_only=True)
    assert stopped["global_step"] == 1
    with pytest.raises(EarVAEError, match="in the middle of a step, after 1 of its batches"):
        train(tmp_path / "parts", parts=1, resume=True)
    resumed = train(tmp_path / "parts", resume=True)
    assert resumed["global_step"] == whole["global_step"] == 3
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name


def test_what_accumulation_cannot_do() -> None:
    with pytest.raises(EarVAEError, match="accumulate_grad_batches must be an integer of 1"):
        EarVAEModule(TINY, accumulate_grad_batches=0)
    with pytest.raises(EarVAEError, match="balanced takes the gradients of a whole batch"):
        EarVAEModule(TINY, objective=ObjectiveConfig(balanced=True), accumulate_grad_batches=2)


class CountReads(TorchDispatchMode):
    """Counts how often a value of a tensor goes to Python, for which a GPU would have to be waited for."""

    reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_waits_once_for_the_device() -> None:
    """With fused optimizers, which are those of a GPU; the one that is left reads all norms together."""
    fused = OptimizerConfig(warmup_steps=0, algorithm=partial(torch.optim.AdamW, lr=1e-3, fused=True))
    module = EarVAEModule(TINY, discriminator=SMALL, optimizer=fused, discriminator_optimizer=fused)
    mode = CountReads()

    class Watch(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            mode.__enter__()

        def on_train_batch_end(self, *_: Any) -> None:
            mode.__exit__(None, None, None)

    trainer = fit(module, batches(2, 1), callbacks=[Watch()])
    assert trainer.global_step == 2
    assert mode.reads <= 2


def test_a_broken_step_is_left_out_on_the_device_too() -> None:
    fused = OptimizerConfig(warmup_steps=0, algorithm=partial(torch.optim.AdamW, lr=1e-3, fused=True))
    ends = []
    for broken in (True, False):
        torch.manual_seed(0)
        module = EarVAEModule(TINY, discriminator=SMALL, optimizer=fused, discriminator_optimizer=fused)
        data = batches(3, 2)
        if broken:
            data[1][0, 0, 100] = torch.nan
        else:
            del data[1]
        trainer = fit(module, data, max_steps=2)
        assert float(trainer.callback_metrics["train/skipped_steps"]) == (2 if broken else 0)
        ends.append((module.state_dict(), [o.state_dict()["state"] for o in trainer.optimizers]))
    for name, tensor in ends[0][0].items():
        assert torch.equal(tensor, ends[1][0][name]), name
    for one, other in zip(ends[0][1], ends[1][1], strict=True):
        for index, moments in one.items():
            assert all(torch.equal(value, other[index][name]) for name, value in moments.items())


def test_another_optimizer_and_schedule_with_warm_up_and_clipping() -> None:
    """Rates and the length of a step of plain gradient descent, in closed form."""
    settings = OptimizerConfig(
        warmup_steps=2,
        gradient_clip=1e-3,
        algorithm=partial(torch.optim.SGD, lr=0.5),
        schedule=partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.1),
    )
    module = EarVAEModule(TINY, optimizer=settings)
    rates, ways = [], []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            self.before = [p.detach().clone() for p in module.vae.parameters()]
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        def on_train_batch_end(self, *_: Any) -> None:
            now = [p.detach() for p in module.vae.parameters()]
            ways.append(
                float(torch.stack([(a - b).norm() for a, b in zip(self.before, now, strict=True)]).norm())
            )

    fit(module, batches(6, 1), callbacks=[Watch()])
    assert rates == pytest.approx([0.25, 0.5, 0.5, 0.5, 0.05, 0.05])
    assert ways == pytest.approx([1e-3 * rate for rate in rates], rel=1e-2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": torch.optim.LBFGS}, "LBFGS evaluates the loss several times"),
        (
            {"algorithm": partial(torch.optim.SGD, lr=-1)},
            "the optimizer cannot be made: Invalid learning rate",
        ),
        ({"schedule": torch.optim.lr_scheduler.ReduceLROnPlateau}, "needs a metric every step"),
    ],
)
def test_optimizers_that_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EarVAEError, match=message):
        OptimizerConfig(**settings)
