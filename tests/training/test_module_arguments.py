"""Arguments with which a training would run for ever, do nothing, or lose its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ear_vae import EarVAEConfig, EarVAEError
from ear_vae.losses.objective import DEFAULT_LOSS_WEIGHTS
from ear_vae.network.discriminator import DiscriminatorConfig
from ear_vae.training import AudioDataModule, EarVAEModule
from ear_vae.training.data.dataset import Augmentation
from ear_vae.training.module import ObjectiveConfig
from ear_vae.training.optimization import OptimizerConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
SIZES: dict[str, Any] = {
    "channels": 2,
    "channel_multipliers": (1, 2),
    "strides": (2, 4),
    "latent_dim": 4,
    "transformer_depth": 0,
    "transformer_head_dim": 2,
}
CONFIG = EarVAEConfig(**SIZES)
OBJECTIVE = ObjectiveConfig(window_sizes=(64,))
DISCRIMINATOR = DiscriminatorConfig(window_sizes=(64,), channels=2, dilations=(1,))
ONLY_KL = {**dict.fromkeys(set(DEFAULT_LOSS_WEIGHTS) - {"adversarial", "feature_matching"}, 0.0), "kl": 1.0}


def trainer(root: Path, **settings: Any) -> L.Trainer:
    return L.Trainer(
        **{
            "max_steps": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": root,
            **settings,
        }
    )


def segments(scale: float = 0.1, length: int = 256) -> DataLoader:
    audio = scale * torch.randn(4, 2, length, generator=torch.Generator().manual_seed(0))
    return DataLoader(list(audio), batch_size=2)


@pytest.mark.parametrize(
    "name", ["accumulate_grad_batches", "adversarial_after", "max_skipped_steps", "seed"]
)
@pytest.mark.parametrize("value", [1.5, "1", True, -1])
def test_counts_of_the_module_are_integers(name: str, value: Any) -> None:
    """With 1.5 batches to a step, none was ever complete."""
    with pytest.raises(EarVAEError, match=f"{name} must be an integer of [01] or more"):
        EarVAEModule(CONFIG, objective=OBJECTIVE, **{name: value})


@pytest.mark.parametrize("name", ["batch_size", "segments_per_epoch", "num_workers", "seed"])
def test_counts_of_the_data_are_integers(name: str, tmp_path: Path) -> None:
    with pytest.raises(EarVAEError, match=f"{name} must be an integer of [01] or more, got 2.5"):
        AudioDataModule(tmp_path, **{name: 2.5})


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": "1"},
        {"betas": (0.9,)},
        {"betas": (0.9, 0.9, 0.9)},
        {"betas": ("a", "b")},
        {"betas": 0.9},
        {"warmup_steps": 2.5},
        {"algorithm": lambda parameters: None},
        {"schedule": torch.optim.lr_scheduler.StepLR},
    ],
)
def test_optimizers_that_cannot_be_are_refused_in_words(settings: dict[str, Any]) -> None:
    with pytest.raises(EarVAEError):
        OptimizerConfig(**settings)


@pytest.mark.parametrize("settings", [{"channels": 2.5}, {"dilations": (1.5,)}, {"channels": "8"}])
def test_sizes_of_the_discriminator_are_integers(settings: dict[str, Any]) -> None:
    with pytest.raises(EarVAEError, match="must be integers of at least 1"):
        DiscriminatorConfig(**settings)


def test_a_mono_model_is_refused_at_once() -> None:
    with pytest.raises(EarVAEError, match="audio_channels must be 2, got 1"):
        EarVAEModule(EarVAEConfig(**SIZES, audio_channels=1), objective=OBJECTIVE)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_weights_in_few_bits_are_refused(precision: Any, tmp_path: Path) -> None:
    # What such a training would lose: an average that moves by less than half a bit does not move.
    average = torch.ones(1, dtype=torch.bfloat16)
    assert average.lerp(torch.zeros_like(average), 0.001).item() == 1
    model = EarVAEModule(CONFIG, objective=OBJECTIVE)
    with pytest.raises(EarVAEError, match="use precision bf16-mixed, or 32-true"):
        trainer(tmp_path, precision=precision).fit(model, segments())
    with pytest.raises(EarVAEError, match="use precision bf16-mixed, or 32-true"):
        trainer(tmp_path, precision=precision).validate(
            EarVAEModule(CONFIG, objective=OBJECTIVE),
            DataLoader([torch.randn(2, 4096)], batch_size=1),
            verbose=False,
        )


def test_balancing_waits_for_the_terms_of_the_discriminator(tmp_path: Path) -> None:
    objective = ObjectiveConfig(weights=ONLY_KL, window_sizes=(64,), balanced=True)
    model = EarVAEModule(CONFIG, objective=objective, discriminator=DISCRIMINATOR, adversarial_after=1)
    assert model.balancer is not None
    fitted = trainer(tmp_path, max_steps=3)
    fitted.fit(model, segments())
    assert fitted.global_step == 3
    assert model.balancer.updates.tolist() == [2, 2]


def test_there_must_be_something_to_balance() -> None:
    with pytest.raises(EarVAEError, match="nothing to balance: only kl has a weight"):
        EarVAEModule(CONFIG, objective=ObjectiveConfig(weights=ONLY_KL, balanced=True))


def test_a_model_that_has_diverged_is_said_to_have(tmp_path: Path) -> None:
    model = EarVAEModule(CONFIG, objective=OBJECTIVE, ema_decay=0)
    with torch.no_grad():
        model.vae.decoder.snake_out.log_beta.fill_(-1e30)
        model.vae.decoder.snake_out.log_alpha.fill_(1e30)
    with pytest.raises(EarVAEError, match="training has diverged; go on from an earlier checkpoint"):
        trainer(tmp_path).validate(model, DataLoader([torch.randn(2, 4096)], batch_size=1), verbose=False)


def test_the_speed_is_never_beyond_what_was_asked_for() -> None:
    with pytest.raises(EarVAEError, match=r"speed must be 0, or from 0\.01"):
        Augmentation(speed=0.001)
    for speed, highest in ((0.015, 1), (0.29, 29), (0.5, 50)):
        drawn = {
            Augmentation(speed=speed).speed_percent(np.random.default_rng(seed))
            for seed in range(40 * highest)
        }
        assert min(drawn) == 100 - highest
        assert max(drawn) == 100 + highest
