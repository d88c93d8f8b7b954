"""What a model does with the statistics of its latents, and what silence is to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ear_vae import EarVAE, EarVAEConfig, EarVAEError
from ear_vae.pretrained.layouts.oobleck import CLASS_KEY, OUR_CLASS, config_for_diffusers, config_of_diffusers


@pytest.fixture(scope="module")
def vae() -> EarVAE:
    torch.manual_seed(0)
    return EarVAE(EarVAEConfig(channels=4, transformer_depth=0)).eval().requires_grad_(False)


def with_statistics() -> EarVAE:
    vae = EarVAE(EarVAEConfig(channels=4, latent_dim=4, transformer_depth=0), name="mine")
    vae.set_latent_statistics([1.0, -2.0, 0.0, 3.0], np.array([1.0, 2.0, 4.0, 0.5]))
    return vae


def test_normalize_by_hand() -> None:
    vae = with_statistics()
    latents = torch.tensor([[3.0], [2.0], [2.0], [2.0]])
    expected = torch.tensor([[2.0], [2.0], [0.5], [-2.0]])
    assert torch.equal(vae.normalize(latents), expected)
    assert torch.equal(vae.denormalize(expected), latents)
    assert torch.equal(vae.normalize(latents.numpy()), expected)
    assert torch.equal(vae.normalize(latents.expand(5, 4, 3)), expected.expand(5, 4, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_normalize_keeps_dtype_and_gradients(dtype: torch.dtype) -> None:
    vae = with_statistics()
    latents = torch.ones(2, 4, 3, dtype=dtype, requires_grad=True)
    normal = vae.normalize(latents)
    assert normal.dtype == dtype
    normal.sum().backward()
    expected = 1 / torch.tensor([1.0, 2.0, 4.0, 0.5])
    assert latents.grad is not None
    assert torch.equal(latents.grad, expected[:, None].expand(2, 4, 3).to(dtype))


def test_statistics_are_saved_and_loaded(tmp_path: Path) -> None:
    vae = with_statistics()
    before = EarVAE(EarVAEConfig(channels=4, latent_dim=4, transformer_depth=0))
    before.load_state_dict(vae.state_dict())
    vae.save_pretrained(tmp_path / "model")
    loaded = EarVAE.from_pretrained(tmp_path / "model")
    latents = torch.randn(4, 7)
    assert torch.equal(loaded.normalize(latents), vae.normalize(latents))
    assert loaded.weights_sha256 == before.weights_sha256


def test_a_model_without_statistics_says_where_they_come_from(vae: EarVAE) -> None:
    with pytest.raises(EarVAEError, match=r"unnamed has no latent statistics .*ear-vae statistics DATASET"):
        vae.normalize(torch.zeros(64, 1))
    with pytest.raises(EarVAEError, match="no latent statistics"):
        vae.denormalize(torch.zeros(64, 1))
    with pytest.raises(EarVAEError, match=r"latents have shape \[3, 1\]"):
        with_statistics().normalize(torch.zeros(3, 1))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.0], [1.0] * 4, "latents_mean must be a list of 4 finite numbers"),
        ([0.0, 0.0, 0.0, float("nan")], [1.0] * 4, "latents_mean must be a list of 4 finite numbers"),
        ([0.0] * 4, [1.0, 1.0, 1.0, 0.0], "latents_std must be a list of 4 finite numbers above 0"),
        ([0.0] * 4, ["a"] * 4, "must be 4 numbers each"),
        (None, [1.0] * 4, "must be 4 numbers each"),
    ],
)
def test_statistics_that_are_refused(mean: Any, std: Any, message: str) -> None:
    with pytest.raises(EarVAEError, match=message):
        with_statistics().set_latent_statistics(mean, std)


def test_diffusers_has_them_under_the_same_names() -> None:
    """And a config without any goes there and back as well."""
    config = with_statistics().config
    values = config_for_diffusers(config)
    assert values["latents_std"] == [1.0, 2.0, 4.0, 0.5]
    assert config_of_diffusers({CLASS_KEY: OUR_CLASS, **values}) == config
    values = config_for_diffusers(EarVAEConfig())
    unknown = {"latents_mean": None, "latents_std": None}
    assert config_of_diffusers({CLASS_KEY: OUR_CLASS, **values, **unknown}) == EarVAEConfig()


def test_mean_and_std_go_together() -> None:
    with pytest.raises(EarVAEError, match="latents_std is given alone"):
        EarVAEConfig(latents_std=(1.0,) * 64)


@pytest.mark.parametrize("frames", [1, 5, 9, 10, 18, 19, 20, 60])
def test_silence_is_silence_encoded(vae: EarVAE, frames: int) -> None:
    expected = vae.encode(torch.zeros(2, frames * vae.downsampling_ratio)).mode()
    silence = vae.silence(frames)
    assert silence.shape == (64, frames)
    assert (silence - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert silence.abs().max() > 1e-3


def test_silence_of_a_day_costs_no_more_than_that_of_a_second(vae: EarVAE) -> None:
    assert vae.silence(24 * 3600 * 43).shape == (64, 24 * 3600 * 43)
    with pytest.raises(EarVAEError, match="num_frames must be an integer of 1 or more, got 0"):
        vae.silence(0)


def test_silence_of_a_double_precision_model_that_is_trained() -> None:
    vae = EarVAE(EarVAEConfig(channels=4, transformer_depth=0)).double()
    silence = vae.silence(30)
    assert silence.dtype == torch.float64
    assert not silence.requires_grad
