"""Small models and signals that several test modules use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ear_vae import EarVAE, EarVAEConfig


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with random weights, hop 1024 at 44.1 kHz."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "small"
    EarVAE(EarVAEConfig(channels=4)).save_pretrained(folder)
    return folder
