"""Other codecs through their own libraries, with small random weights in each library's own format."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from huggingface_hub import constants, file_download
from torch import Tensor

from ear_vae import EarVAEError
from ear_vae.cli import main
from ear_vae.dsp._torchaudio import functional
from ear_vae.evaluation.systems import codecs
from ear_vae.evaluation.systems.base import rebuild
from ear_vae.evaluation.systems.codecs import CODECS, CodecSystem
from ear_vae.evaluation.systems.loading import load_system

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
CPU = torch.device("cpu")
Saved = tuple[Path, Any]


def dac(folder: Path, seed: int = 0) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.DacConfig(
        encoder_hidden_size=4, decoder_hidden_size=64, downsampling_ratios=[2, 4, 8, 8], sampling_rate=44_100
    )
    return saved(transformers.DacModel(config), folder)


def encodec(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.EncodecConfig(
        sampling_rate=48_000,
        audio_channels=2,
        normalize=True,
        chunk_length_s=1.0,
        overlap=0.01,
        num_filters=4,
        hidden_size=16,
        codebook_size=64,
        use_causal_conv=False,
        norm_type="time_group_norm",
        target_bandwidths=[3.0, 6.0],
    )
    return saved(transformers.EncodecModel(config), folder)


def sao(folder: Path) -> Any:
    pytest.importorskip("transformers")
    functional()
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderOobleck(
        encoder_hidden_size=4, decoder_channels=4, decoder_input_channels=2, channel_multiples=[1] * 5
    )
    return saved(model, folder / "vae")


def agc(folder: Path) -> Any:
    pytest.importorskip("transformers")
    package = pytest.importorskip("agc")
    torch.manual_seed(0)
    config = sys.modules["agc.model"].AGCConfig(
        continuous=True, vae=True, encoder_dim=4, decoder_dim=64, latent_dim=8, encoder_rates=[2, 4, 5, 12]
    )
    config.decoder_rates = [12, 5, 4, 2]
    return saved(package.AGC(config), folder)


def saved(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return model.eval()


@torch.inference_mode()
def dac_directly(model: Any, audio: Tensor) -> Tensor:
    return torch.cat([model(channel[None, None]).audio_values for channel in audio])


@torch.inference_mode()
def sao_directly(model: Any, audio: Tensor) -> Tensor:
    return model.decode(model.encode(audio[None]).latent_dist.mean).sample[0]


@torch.inference_mode()
def encodec_directly(model: Any, audio: Tensor) -> Tensor:
    """Chunk by chunk: normalised, coded, scaled back, and faded into the next by a triangle."""
    stride, length = model.config.chunk_stride, model.config.chunk_length
    total = torch.zeros(2, stride * 8 + length)
    weights = torch.zeros(stride * 8 + length)
    ramp = torch.linspace(0, 1, length + 2)[1:-1]
    triangle = 0.5 - (ramp - 0.5).abs()
    padded = torch.nn.functional.pad(audio, (0, stride * 8))
    for start in range(0, audio.shape[1], stride):
        chunk = padded[None, :, start : start + length]
        valid = max(0, min(length, audio.shape[1] - start))
        mono = chunk[0, :, :].mean(0)
        scale = (mono.square().mean().sqrt() + 1e-8) if valid else torch.tensor(1.0)
        codes = model.quantizer.encode(model.encoder(chunk / scale), 6.0)
        rebuilt = model.decoder(model.quantizer.decode(codes))[0] * scale
        total[:, start : start + length] += triangle * rebuilt
        weights[start : start + length] += triangle
    return (total / weights.clamp(min=1e-9))[:, : audio.shape[1]]


def noise(channels: int, num_samples: int) -> Tensor:
    return 0.1 * torch.randn(channels, num_samples, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("name", "make", "directly", "rate", "channels", "hop"),
    [
        ("dac", dac, dac_directly, 44_100, 1, 512),
        ("sao", sao, sao_directly, 44_100, 2, 2048),
        ("encodec", encodec, encodec_directly, 48_000, 2, None),
    ],
)
def test_it_is_what_the_library_does(
    name: str,
    make: Callable[[Path], Any],
    directly: Callable[[Any, Tensor], Tensor],
    rate: int,
    channels: int,
    hop: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also in many tiles, and for lengths that are no whole number of frames."""
    model = make(tmp_path / "model")
    system = load_system(f"{name}={tmp_path / 'model'}", device=CPU)
    assert (system.name, system.sample_rate, system.channels) == (
        f"{name}={tmp_path / 'model'}",
        rate,
        channels,
    )
    whole = noise(channels, 3 * (hop or 512) * 50)
    expected = directly(model, whole)
    torch.testing.assert_close(system.reconstruct(whole), expected, rtol=1e-4, atol=1e-5)
    assert system.reconstruct(whole[:, :50_001]).shape == (channels, 50_001)
    if hop is not None:
        long = noise(channels, 5 * rate // hop * hop)
        expected = directly(model, long)
        monkeypatch.setattr(codecs, "_TILE_SECONDS", 1)
        monkeypatch.setattr(codecs, "_CONTEXT_SECONDS", 1)
        again = load_system(f"{name}={tmp_path / 'model'}", device=CPU)
        torch.testing.assert_close(again.reconstruct(long), expected, rtol=1e-4, atol=1e-5)
    assert rebuild(system, noise(2, 30_000), 48_000).shape == (2, 30_000)
    assert rebuild(system, noise(1, 30_000), 32_000).shape == (1, 30_000)


def test_agc_draws_the_same_each_time(tmp_path: Path) -> None:
    model = agc(tmp_path / "model")
    system = load_system(f"agc={tmp_path / 'model'}", device=CPU)
    audio = noise(2, 48_000)
    kept = audio.clone()
    torch.manual_seed(0)
    with torch.inference_mode():
        expected = model.decode(model.encode(audio[None].clone()))[0]
    torch.manual_seed(1)
    for _ in range(2):
        torch.testing.assert_close(system.reconstruct(audio), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(audio, kept)
    assert (system.sample_rate, system.channels) == (48_000, 2)


def test_other_weights_are_another_identity(tmp_path: Path) -> None:
    for seed in (0, 1):
        dac(tmp_path / str(seed), seed)
    one, other, same = (load_system(f"dac={tmp_path / n}", device=CPU) for n in ("0", "1", "0"))
    assert one.identity == same.identity != other.identity


def test_evaluate_with_a_codec(tmp_path: Path, small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dac(tmp_path / "dac")
    (tmp_path / "music").mkdir()
    soundfile.write(tmp_path / "music" / "a.wav", noise(2, 48_000).T.numpy(), 48_000)
    codec, out = f"dac={tmp_path / 'dac'}", tmp_path / "out.json"
    arguments = ["evaluate", tmp_path / "music", "--model", codec, "--model", small_model, "--json", out]
    assert main([str(argument) for argument in arguments]) == 0
    rows = json.loads(out.read_text())["files"]
    assert [row["system"] for row in rows] == [codec, str(small_model)]
    assert codec in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(CODECS))
def test_a_missing_library_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("transformers", "diffusers", "agc"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        EarVAEError, match=rf"{name} needs {CODECS[name].library}: pip install \"ear-vae\[codecs\]\""
    ):
        load_system(name, device=CPU)


def test_what_cannot_be_loaded_says_so_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(EarVAEError, match=r"dac=.*: cannot be loaded from .*nowhere: ") as raised:
        CodecSystem("dac=nowhere", str(tmp_path / "nowhere"), CODECS["dac"], CPU)
    assert "\n" not in str(raised.value)


def test_without_a_connection_no_library_asks_the_hub_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their clients would try for half a minute; what is in the cache loads all the same."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"  # nobody listens there
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waited"))
    asked: list[bool] = []

    def build(source: str, device: torch.device, *, local_files_only: bool) -> Any:
        asked.append(local_files_only)
        if source == "someone/new":
            raise OSError("couldn't connect")
        return torch.nn.Linear(1, 1), 44_100, 1, lambda audio: audio

    codec = codecs.Codec("someone/cached", "a library", build)
    assert CodecSystem("dac", "someone/cached", codec, CPU).sample_rate == 44_100
    with pytest.raises(
        EarVAEError, match=r"someone/new: couldn't connect; the Hub cannot be asked .*=FOLDER"
    ):
        CodecSystem("dac=someone/new", "someone/new", codec, CPU)
    assert asked == [True, True]


def test_other_names_are_models(tmp_path: Path) -> None:
    for name in ("dac=", "mp3=folder", "./dac"):
        assert codecs.load_codec(name, device=CPU) is None
