"""In what dtype the runner computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ear_vae import EarVAE
from ear_vae.inference import precision
from ear_vae.inference.runner import Runner


def test_the_transformer_computes_in_float32_whatever_the_weights(small_model: Path) -> None:
    half = EarVAE.from_pretrained(small_model, dtype=torch.bfloat16)
    latents = torch.randn(1, 64, 50, generator=torch.Generator().manual_seed(0))
    expected = half.float().transformer(latents)
    found = Runner(EarVAE.from_pretrained(small_model, dtype=torch.bfloat16)).transform(latents)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "promised_db", "chosen"),
    [(0.0, -1000.0, torch.bfloat16), (1e9, -1000.0, torch.float32), (0.0, 1000.0, torch.float32)],
    ids=["faster and exact", "no faster", "not exact"],
)
def test_bfloat16_is_chosen_where_it_is_faster_and_exact_enough(
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ratio: float,
    promised_db: float,
    chosen: torch.dtype,
) -> None:
    # How fast this machine is, is not what is tested.
    monkeypatch.setattr(precision, "_WORTHWHILE_RATIO", ratio)
    monkeypatch.setattr(precision, "PROMISED_DB", promised_db)
    with caplog.at_level("INFO", "ear_vae"):
        vae = EarVAE.from_pretrained(small_model, dtype="auto")
    expected = EarVAE.from_pretrained(small_model, dtype=chosen).state_dict()
    assert vae.dtype == chosen
    assert all(torch.equal(weight, expected[name]) for name, weight in vae.state_dict().items())
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert f"computes in {chosen}" in caplog.text
    assert "times as fast here" in caplog.text
