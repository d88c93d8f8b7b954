"""Small models, signals and folders that several test modules use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ear_vae import EarVAE, EarVAEConfig
from ear_vae.dsp._torchaudio import functional
from ear_vae.network.discriminator import DiscriminatorConfig

if not torch.cuda.is_available():
    # Without a GPU, Triton's kernels run in its interpreter, which it wants to know before it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout, or the unpacked source distribution."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def piece(repository: Path) -> Path:
    """Twenty seconds of music, stereo at 44.1 kHz."""
    return repository / "examples" / "piece.ogg"


def beside(repository: Path, name: str, what: str) -> Path:
    """A folder of what may be used here and not be published."""
    folder = repository.parent / "shared" / name
    if not folder.is_dir():
        pytest.skip(f"needs {what} in ../shared")
    return folder


@pytest.fixture(scope="session")
def parity(repository: Path) -> Path:
    """Weights in the official layout, and what the official code makes of them."""
    return beside(repository, "parity", "the parity fixtures")


@pytest.fixture(scope="session")
def training_music(repository: Path) -> Path:
    return beside(repository, "music/train", "the licensed music")


@pytest.fixture(scope="session")
def tiny_config() -> EarVAEConfig:
    """The smallest network with the published hop of 1024."""
    return EarVAEConfig(channels=4, channel_multipliers=(1, 2, 2, 2, 2))


@pytest.fixture(scope="session")
def least_config() -> EarVAEConfig:
    """A network of a few hundred numbers, hop 8, without a transformer."""
    return EarVAEConfig(
        channels=2,
        channel_multipliers=(1, 2),
        strides=(2, 4),
        latent_dim=4,
        transformer_depth=0,
        transformer_head_dim=2,
    )


@pytest.fixture(scope="session")
def tiny_discriminator() -> DiscriminatorConfig:
    return DiscriminatorConfig(window_sizes=(512, 128), channels=4)


@pytest.fixture(scope="session")
def noise() -> Callable[..., torch.Tensor]:
    """`noise(*shape, seed=0, level=0.1)`: Gaussian, with that standard deviation."""

    def make(*shape: int, seed: int = 0, level: float = 0.1) -> torch.Tensor:
        return level * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with random weights, hop 1024 at 44.1 kHz."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "small"
    EarVAE(EarVAEConfig(channels=4)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def oobleck() -> Any:
    """diffusers' own Oobleck, hop 64, every tensor random, so that no two Snakes are alike."""
    functional()
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        decoder_channels=8,
        decoder_input_channels=4,
        channel_multiples=[1, 2, 2],
        downsampling_ratios=[2, 4, 8],
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("alpha", "beta")):
                parameter.normal_(0, 0.3)
    return model


@pytest.fixture(autouse=True, scope="session")
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What is remembered between runs goes where nobody else reads it."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder
