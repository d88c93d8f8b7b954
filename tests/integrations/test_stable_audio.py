"""In the place of an Oobleck of stable-audio-tools, inside its own pretransform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from documentation import before_and_after
from torch import Tensor

from ear_vae import EarVAE, EarVAEError
from ear_vae.dsp._torchaudio import functional
from ear_vae.integrations.stable_audio import EarVAEAutoencoder

HOP = 64


@pytest.fixture(scope="module")
def pretransform() -> Any:
    """Their class itself."""
    functional()
    return pytest.importorskip("stable_audio_tools.models.pretransforms").AutoencoderPretransform


@pytest.fixture(scope="module")
def audio() -> Tensor:
    return 0.3 * torch.randn(2, 2, HOP * 200, generator=torch.Generator().manual_seed(1))


def straight(vae: EarVAE, audio: Tensor) -> Tensor:
    """The moments by the plain module."""
    with torch.no_grad():
        return vae.encoder(audio)


@pytest.mark.parametrize("options", [{}, {"chunked": True}, {"iterate_batch": True}])
def test_their_pretransform(
    options: dict[str, bool], pretransform: Any, narrow_vae: EarVAE, audio: Tensor
) -> None:
    """Chunks are exact, and latents are divided by the scale."""
    theirs = pretransform(EarVAEAutoencoder(narrow_vae, sample=False), scale=2.0, **options)
    assert (theirs.encoded_channels, theirs.downsampling_ratio, theirs.io_channels) == (8, 64, 2)
    assert (theirs.sample_rate, theirs.is_discrete) == (44_100, False)
    mean = straight(narrow_vae, audio)[:, :8]
    latents = theirs.encode(audio)
    torch.testing.assert_close(latents, mean / 2, rtol=1e-4, atol=1e-5)
    assert narrow_vae.transformer is not None
    with torch.no_grad():
        decoded = narrow_vae.decoder(narrow_vae.transformer(mean))
    torch.testing.assert_close(theirs.decode(latents), decoded, rtol=1e-4, atol=1e-4)


def test_the_pages_pretransform(pretransform: Any, narrow_vae: EarVAE, audio: Tensor, tmp_path: Path) -> None:
    narrow_vae.save_pretrained(tmp_path / "model")
    code = before_and_after("stable-audio.md")[1]
    names: dict[str, Any] = {"audio": audio}
    torch.manual_seed(0)
    exec(code.replace("stabilityai/stable-audio-open-1.0", str(tmp_path / "model")), names)
    torch.manual_seed(0)
    latents = narrow_vae.encode(audio).sample()
    torch.testing.assert_close(2 * names["latents"], latents)
    torch.testing.assert_close(names["rebuilt"], narrow_vae.decode(latents))


def test_model_half_is_refused_with_the_cure(pretransform: Any, narrow_vae: EarVAE, audio: Tensor) -> None:
    model = EarVAEAutoencoder(narrow_vae)
    with pytest.raises(EarVAEError, match="model_half=False"):
        pretransform(model, model_half=True)
    assert narrow_vae.dtype == torch.float32
    half = EarVAEAutoencoder(EarVAE(narrow_vae.config).to(torch.float16))
    for refused in (lambda: half.encode_audio(audio), lambda: half.decode_audio(torch.zeros(1, 8, 3))):
        with pytest.raises(EarVAEError, match="model_half=False"):
            refused()


def test_draws_have_the_posteriors_mean_and_deviation(narrow_vae: EarVAE, audio: Tensor) -> None:
    model = EarVAEAutoencoder(narrow_vae)
    posterior = narrow_vae.encode(audio)
    torch.manual_seed(0)
    draws = torch.stack([model.encode(audio) for _ in range(40)])
    deviation = (draws - posterior.mean) / posterior.std
    assert float(deviation.mean()) == pytest.approx(0, abs=0.01)
    assert float(deviation.std()) == pytest.approx(1, abs=0.01)


def test_moments_and_info(narrow_vae: EarVAE, audio: Tensor) -> None:
    model, expected = EarVAEAutoencoder(narrow_vae), straight(narrow_vae, audio)
    torch.testing.assert_close(model.encode(audio, skip_bottleneck=True), expected, rtol=1e-4, atol=1e-5)
    latents, info = model.encode_audio(audio, return_info=True)
    torch.testing.assert_close(info["pre_bottleneck_latents"], expected, rtol=1e-4, atol=1e-5)
    assert latents.shape == (2, 8, 200)
    assert float(info["kl"]) == pytest.approx(float(narrow_vae.encode(audio).kl().mean()))


def test_dtypes_of_the_input_come_back(narrow_vae: EarVAE, audio: Tensor) -> None:
    model = EarVAEAutoencoder(narrow_vae, sample=False)
    latents = model.encode_audio(audio.half())
    assert latents.dtype == torch.float16
    decoded = model.decode_audio(latents)
    assert decoded.dtype == torch.float16
    torch.testing.assert_close(decoded, narrow_vae.decode(latents.float()).half())


def test_recordings_are_prepared_as_one_batch(narrow_vae: EarVAE) -> None:
    model = EarVAEAutoencoder(narrow_vae)
    stereo, mono = torch.rand(2, 1000), torch.rand(700)
    batch = model.preprocess_audio_list_for_encoder([stereo, mono], 44_100)
    assert batch.shape == (2, 2, 1024)
    assert torch.equal(batch[0, :, :1000], stereo)
    assert torch.equal(batch[1, :, :700], mono.expand(2, -1))
    assert not batch[0, :, 1000:].any()
    assert not batch[1, :, 700:].any()
    assert model.preprocess_audio_for_encoder(stereo[None], 22_050).shape == (1, 2, 2048)
    with pytest.raises(EarVAEError, match="2 recordings and 1 rates; give one rate for each"):
        model.preprocess_audio_list_for_encoder([stereo, mono], [44_100])
    with pytest.raises(EarVAEError, match=r"one recording \[C, T\], got shape \[2, 2, 9\]"):
        model.preprocess_audio_for_encoder(torch.rand(2, 2, 9), 44_100)
