"""The published code's own results, from the published layout, through every way a model can take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ear_vae import EarVAE
from ear_vae.pretrained.conversion import convert

PARITY = Path(__file__).parents[3] / "shared" / "parity"
VARIANTS = ("ear_vae_44k", "ear_vae_v2_48k")

pytestmark = pytest.mark.skipif(not PARITY.is_dir(), reason="the parity fixtures are not here")


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def vae(variant: str, tmp_path: Path) -> EarVAE:
    return EarVAE.from_pretrained(PARITY, variant=variant, cache_dir=tmp_path / "cache")


def assert_parity(vae: EarVAE, variant: str) -> None:
    expected = load_file(PARITY / f"{variant}.expected.safetensors")
    posterior = vae.encode(expected["audio"])
    results = {
        "mean": posterior.mean,
        "std": posterior.std,
        "kl": posterior.kl(),
        "decoded": vae.decode(expected["mean"]),
        "decoded_latents": vae.decode(expected["latents"]),
    }
    for name, result in results.items():
        tolerance = 1e-4 * max(1.0, expected[name].abs().max().item())
        torch.testing.assert_close(
            result, expected[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_from_the_official_layout(vae: EarVAE, variant: str) -> None:
    assert_parity(vae, variant)
    assert vae.name == variant
    assert (vae.sample_rate, vae.downsampling_ratio) == {
        "ear_vae_44k": (44_100, 1024),
        "ear_vae_v2_48k": (48_000, 960),
    }[variant]
    # The weights of the second hold no transformer.
    assert (vae.transformer is None) == (variant == "ear_vae_v2_48k")


def test_from_the_cache_of_conversions(
    vae: EarVAE, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("unpickled again"))
    assert_parity(EarVAE.from_pretrained(PARITY, variant=variant, cache_dir=tmp_path / "cache"), variant)


def test_after_saving_in_our_layout(vae: EarVAE, variant: str, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "saved")
    assert_parity(EarVAE.from_pretrained(tmp_path / "saved"), variant)


def test_after_conversion_to_a_folder_and_back_to_the_official_layout(variant: str, tmp_path: Path) -> None:
    convert(PARITY, tmp_path / "ours", variant=variant, cache_dir=tmp_path / "cache", to="folder")
    assert_parity(EarVAE.from_pretrained(tmp_path / "ours"), variant)
    convert(tmp_path / "ours", tmp_path / "official", to="official")
    assert_parity(EarVAE.from_pretrained(tmp_path / "official", cache_dir=tmp_path / "cache"), variant)


def test_the_pyt_has_the_published_names_and_shapes(vae: EarVAE, variant: str, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "weights.pyt", to="official")
    published = torch.load(PARITY / "pretrained_weight" / f"{variant}.pyt", weights_only=True)
    written = torch.load(tmp_path / "weights.pyt", weights_only=True)
    assert set(written) == set(published)
    for name, tensor in published.items():
        assert written[name].shape == tensor.shape, name
        assert written[name].dtype == tensor.dtype, name
        if not name.endswith(("weight_g", "weight_v")):
            torch.testing.assert_close(written[name], tensor, rtol=1e-6, atol=1e-7, msg=name)
