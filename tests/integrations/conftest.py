"""What the tests of several neighbours use."""

from __future__ import annotations

import pytest
import torch

from ear_vae import EarVAE, EarVAEConfig


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
