"""Small random models in the forms of the neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ear_vae import EarVAE, EarVAEConfig
from ear_vae.dsp._torchaudio import functional


@pytest.fixture(scope="session")
def narrow_vae() -> EarVAE:
    """A model with a transformer, hop 64, random down to its Snakes."""
    torch.manual_seed(0)
    config = EarVAEConfig(
        channels=8, channel_multipliers=(1, 2, 2), strides=(2, 4, 8), latent_dim=8, transformer_head_dim=4
    )
    vae = EarVAE(config, name="narrow").eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if "log_" in name:
            parameter.normal_(0, 0.3)
    return vae


@pytest.fixture(scope="session")
def oobleck() -> Any:
    """diffusers' own Oobleck, hop 64, random down to its Snakes."""
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
