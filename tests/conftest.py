"""Small models and signals that several test modules use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ear_vae import EarVAE, EarVAEConfig

if not torch.cuda.is_available():
    # Without a GPU, Triton's kernels run in its interpreter, which it wants to know before it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with random weights, hop 1024 at 44.1 kHz."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "small"
    EarVAE(EarVAEConfig(channels=4)).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="session")
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What is remembered between runs goes where nobody else reads it."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder
