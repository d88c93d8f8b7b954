"""The parts of a model side by side, and the family that they come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ear_vae import EarVAE, EarVAEConfig, EarVAEError
from ear_vae.network import ARCHITECTURES, Autoencoder, Decoder, Encoder, LatentTransformer
from ear_vae.network.autoencoder import Family

TINY = EarVAEConfig(
    channels=4, channel_multipliers=(1, 2), strides=(2, 4), latent_dim=32, transformer_depth=1
)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_model_has_the_tensors_of_its_parts_and_no_others(depth: int) -> None:
    config = EarVAEConfig(**{**TINY.to_dict(), "transformer_depth": depth})
    parts: dict[str, nn.Module] = {"encoder": Encoder(config), "decoder": Decoder(config)}
    if depth:
        parts["transformer"] = LatentTransformer(config)
    expected = {
        f"{name}.{key}": tensor.shape
        for name, part in parts.items()
        for key, tensor in part.state_dict().items()
    }
    for model in (Autoencoder(config), EarVAE(config)):
        assert {key: tensor.shape for key, tensor in model.state_dict().items()} == expected


def test_an_unknown_architecture() -> None:
    with pytest.raises(EarVAEError, match="architecture 'other' is unknown; this ear-vae has ear_vae:"):
        EarVAE(EarVAEConfig(architecture="other"))


class LoudDecoder(Decoder):
    """Another family: with a tensor of its own, and louder."""

    def __init__(self, config: EarVAEConfig) -> None:
        super().__init__(config)
        self.gain = nn.Parameter(torch.full((), 3.0))
        self.conv_out.register_forward_hook(lambda module, given, result: self.gain * result)


def test_a_second_family_takes_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is built, run in tiles, saved and loaded like the first."""
    monkeypatch.setitem(ARCHITECTURES, "loud", Family(Encoder, LatentTransformer, LoudDecoder))
    torch.manual_seed(0)
    loud = EarVAE(EarVAEConfig(**{**TINY.to_dict(), "architecture": "loud"})).eval().requires_grad_(False)
    plain = EarVAE(TINY).eval().requires_grad_(False)
    plain.load_state_dict({key: value for key, value in loud.state_dict().items() if "gain" not in key})
    latents = torch.randn(32, 50)
    torch.testing.assert_close(loud.decode(latents), 3 * plain.decode(latents))
    loud.save_pretrained(tmp_path / "loud")
    loaded = EarVAE.from_pretrained(tmp_path / "loud")
    assert isinstance(loaded.decoder, LoudDecoder)
    assert torch.equal(loaded.decode(latents), loud.decode(latents))
