"""In what dtype the runner computes."""

from __future__ import annotations

from pathlib import Path

import torch

from ear_vae import EarVAE
from ear_vae.inference.runner import Runner


def test_the_transformer_computes_in_float32_whatever_the_weights(small_model: Path) -> None:
    half = EarVAE.from_pretrained(small_model, dtype=torch.bfloat16)
    latents = torch.randn(1, 64, 50, generator=torch.Generator().manual_seed(0))
    expected = half.float().transformer(latents)
    found = Runner(EarVAE.from_pretrained(small_model, dtype=torch.bfloat16)).transform(latents)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
