"""In the place of the authors' class, against what their code computed and against the plain network."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from documentation import before_and_after, blocks
from safetensors.torch import load_file
from torch import Tensor, nn

from ear_vae import EarVAE, EarVAEConfig, EarVAEError
from ear_vae.cli import main
from ear_vae.integrations import authors
from ear_vae.integrations.authors import EAR_VAE
from ear_vae.latents import load_latents
from ear_vae.pretrained import convert

FILES = {"ear_vae_44k": "model_config.json", "ear_vae_v2_48k": "ear_vae_v2.json"}


def official(folder: Path, config: EarVAEConfig) -> tuple[dict[str, Any], dict[str, Tensor], EarVAE]:
    """A config and a state dict in the authors' layout, and the model that they are of."""
    torch.manual_seed(0)
    vae = EarVAE(config).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if "log_" in name:
            parameter.normal_(0, 0.3)
    vae.save_pretrained(folder / "model")
    convert(folder / "model", folder / "official", to="official")
    values = json.loads((folder / "official/config/model.json").read_text())
    state = torch.load(folder / "official/pretrained_weight/model.pyt", weights_only=True)
    return values, dict(state), vae


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Tensor], EarVAE]:
    """Of a network with a transformer and the published hop."""
    config = EarVAEConfig(channels=4, channel_multipliers=(1, 2, 2, 2, 2))
    return official(tmp_path_factory.mktemp("official"), config)


@pytest.fixture(scope="module")
def audio() -> Tensor:
    return 0.3 * torch.randn(1, 2, 30 * 1024, generator=torch.Generator().manual_seed(1))


def loaded(values: dict[str, Any], state: dict[str, Tensor], **options: Any) -> EAR_VAE:
    model = EAR_VAE(model_config=values, **options)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("floor", [False, True])
@pytest.mark.parametrize("variant", FILES)
def test_what_the_authors_code_computed(variant: str, floor: bool, parity: Path) -> None:
    values = json.loads((parity / "config" / FILES[variant]).read_text())
    state = torch.load(parity / "pretrained_weight" / f"{variant}.pyt", weights_only=True)
    model = loaded(values, state, floor=floor)
    expected = load_file(parity / f"{variant}.expected.safetensors")
    torch.manual_seed(0)
    rebuilt, kl = model(expected["audio"])
    assert rebuilt.shape == expected["audio"].shape
    for name, found in {
        "mean": model.encode(expected["audio"], use_sample=False),
        "kl": kl[None],
        "decoded": model.decode(expected["mean"]),
        "decoded_latents": model.decode(expected["latents"]),
    }.items():
        tolerance = 1e-4 * max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(found, expected[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("samples", [1024, 1025, 5 * 1024 + 1023, 23 * 1024 + 7, 30 * 1024 - 1])
def test_floor_is_the_straight_network_on_the_unpadded_audio(
    samples: int, at_once: bool, files: Any, audio: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, where rounding does not hide a wrong frame; the network drops what is over by itself."""
    values, state, _ = files
    model = loaded(values, state, floor=True).double()
    if not at_once:
        monkeypatch.setattr(authors, "_MOST_AT_ONCE", 0)
    x = audio[..., :samples].double()
    with torch.no_grad():
        expected = model.encoder(x)[:, :64]
    assert expected.shape[-1] == samples // 1024
    found = model.encode(x, use_sample=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert model.inference(x).shape[-1] == samples // 1024 * 1024
    if at_once:
        single = model.float().encode(audio[..., :samples], use_sample=False)
        torch.testing.assert_close(single, expected.float(), rtol=1e-4, atol=1e-4)


def test_padding_keeps_what_floor_drops(files: Any, audio: Tensor) -> None:
    values, state, vae = files
    x = audio[..., : 9 * 1024 + 300]
    padded, floored = loaded(values, state), loaded(values, state, floor=True)
    latents = padded.encode(x, use_sample=False)
    torch.testing.assert_close(latents, vae.encode(x).mean)
    assert (latents.shape[-1], floored.encode(x).shape[-1]) == (10, 9)
    assert padded.inference(x).shape == x.shape
    difference = (latents[..., :9] - floored.encode(x, use_sample=False)).abs().amax(dim=(0, 1))
    assert difference[0] < 1e-5 < difference[-1]
    assert padded.encode(x[0], use_sample=False).shape == (64, 10)
    with pytest.raises(EarVAEError, match="audio has 1023 samples, with floor=True it needs 1024 or more"):
        floored.encode(x[..., :1023])


def test_draws_are_those_of_torchs_generator(files: Any, audio: Tensor) -> None:
    values, state, vae = files
    model = loaded(values, state)
    torch.manual_seed(3)
    drawn = model.encode(audio)
    posterior = vae.encode(audio)
    torch.manual_seed(3)
    torch.testing.assert_close(drawn, posterior.mean + posterior.std * torch.randn(1, 64, 30))
    torch.manual_seed(3)
    torch.testing.assert_close(model.inference(audio), vae.decode(drawn))
    torch.manual_seed(3)
    rebuilt, kl = model(audio)
    torch.testing.assert_close(rebuilt, vae.decode(drawn))
    assert float(kl) == pytest.approx(float(posterior.kl().mean()), rel=1e-5)


def test_the_parts_are_the_convolutions(files: Any, audio: Tensor) -> None:
    """Some call the encoder itself: mean ‖ scale of whole frames."""
    values, state, vae = files
    model = loaded(values, state)
    with torch.no_grad():
        mean, scale = model.encoder(audio).chunk(2, dim=1)
        torch.testing.assert_close(mean, vae.encode(audio).mean, rtol=1e-4, atol=1e-4)
        assert scale.shape == mean.shape
        assert vae.transformer is not None
        decoded = model.decoder(vae.transformer(mean))
    torch.testing.assert_close(decoded, vae.decode(mean), rtol=1e-4, atol=1e-4)


def test_the_weights_decide_about_the_transformer(files: Any, audio: Tensor) -> None:
    values, state, vae = files
    bare = {name: tensor for name, tensor in state.items() if not name.startswith("transformers.")}
    model = loaded(values, bare)
    assert (model.vae.transformer, model.vae.config.transformer_depth) == (None, 0)
    latents = torch.randn(1, 64, 5)
    with torch.no_grad():
        torch.testing.assert_close(model.decode(latents), vae.decoder(latents), rtol=1e-4, atol=1e-4)
    without = {name: value for name, value in values.items() if name != "transformer"}
    torch.testing.assert_close(loaded(without, state).decode(latents), vae.decode(latents))
    # The network that is made anew stays what the old one was.
    trained = EAR_VAE(values).double()
    trained.load_state_dict(bare)
    assert (trained.vae.dtype, trained.training) == (torch.float64, True)
    assert all(parameter.requires_grad for parameter in trained.parameters())
    assert EAR_VAE().vae.config == EarVAEConfig(transformer_depth=0)


def test_state_dicts_go_there_and_back(files: Any, audio: Tensor) -> None:
    values, state, vae = files
    model = loaded(values, state)
    written = model.state_dict()
    assert set(written) == set(state)
    assert all(written[name].shape == tensor.shape for name, tensor in state.items())
    again = EAR_VAE(values)
    assert again.load_state_dict({"state_dict": written}).missing_keys == []  # type: ignore[dict-item]
    for name, tensor in vae.state_dict().items():
        torch.testing.assert_close(again.vae.state_dict()[name], tensor, msg=name)
    # Inside a larger module, and as a copy.
    parent = nn.ModuleDict({"codec": EAR_VAE(values), "head": nn.Linear(2, 2)})
    target = copy.deepcopy(parent)
    parent["codec"].load_state_dict(state)
    assert {name.partition(".")[2] for name in parent.state_dict() if name.startswith("codec.")} == set(state)
    target.load_state_dict(parent.state_dict())
    assert torch.equal(target["head"].weight, parent["head"].weight)
    encoded = target.eval()["codec"].encode(audio, use_sample=False)
    torch.testing.assert_close(encoded, vae.encode(audio).mean, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_audio_and_the_weights(files: Any, audio: Tensor) -> None:
    values, state, _ = files
    model = EAR_VAE(values, floor=True)
    model.load_state_dict(state)
    x = audio[..., :2500].clone().requires_grad_(True)
    rebuilt, kl = model(x)
    (rebuilt.square().mean() + kl).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"encoder": {}}, "model_config must be the content of the authors' config file, a dict; got"),
        ("config/model_config.json", "a dict; got 'config/model_config.json'"),
    ],
)
def test_configs_that_are_none(values: Any, problem: str) -> None:
    with pytest.raises(EarVAEError, match=problem):
        EAR_VAE(values)


def test_configs_and_weights_of_other_networks(files: Any) -> None:
    values, state, _ = files
    other = copy.deepcopy(values)
    other["encoder"]["config"]["use_snake"] = False
    with pytest.raises(EarVAEError, match=r"values of encoder\.use_snake"):
        EAR_VAE(other)
    other = copy.deepcopy(values)
    for half in ("encoder", "decoder"):
        other[half]["config"]["strides"] = [2, 4, 4, 8, 4]
    with pytest.raises(
        EarVAEError, match=r"strides \[2, 4, 4, 8, 4\] are of no published model; add sample_rate"
    ):
        EAR_VAE(other)
    assert EAR_VAE({**other, "sample_rate": 32_000}).vae.sample_rate == 32_000
    model = EAR_VAE(values)
    before = model.vae.weights_sha256
    with pytest.raises(EarVAEError, match="the state dict: the weights do not fit the config: missing"):
        model.load_state_dict({name: t for name, t in state.items() if "encoder.layers.6" not in name})
    with pytest.raises(EarVAEError, match=r"the state dict: has no tensors of an εar-VAE"):
        model.load_state_dict({"x": torch.zeros(1)})
    assert model.vae.weights_sha256 == before
    with pytest.raises(EarVAEError, match="float16, which is not supported"):
        loaded(values, state, floor=True).half().encode(torch.zeros(1, 2, 2000))


@pytest.fixture
def clone(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone of the authors' repository, of small weights, as the current folder."""
    values, state, _ = files
    for folder in ("config", "pretrained_weight"):
        (tmp_path / folder).mkdir()
    (tmp_path / "config" / "model_config.json").write_text(json.dumps(values))
    torch.save(state, tmp_path / "pretrained_weight" / "ear_vae_44k.pyt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hub"))
    return tmp_path


def test_the_page_in_python(clone: Path, files: Any, audio: Tensor) -> None:
    vae = files[2]
    for number in (0, 1):
        names: dict[str, Any] = {"audio": audio, "torch": torch}
        exec(before_and_after("authors.md", number)[1], names)
        torch.testing.assert_close(names["latents"], vae.encode(audio).mean)
        torch.testing.assert_close(names["rebuilt"], vae.decode(names["latents"]))
    assert names["same"].weights_sha256 == names["vae"].weights_sha256
    np.save(clone / "latents.npy", vae.encode(audio).mean.numpy())
    exec(before_and_after("authors.md", 2)[1], {})
    latents = load_latents(clone / "latents.safetensors")
    torch.testing.assert_close(latents.mean, vae.encode(audio).mean[0])
    assert (latents.model_name, latents.weights_sha256) == ("ear_vae_44k", names["vae"].weights_sha256)


def test_the_page_on_the_command_line(
    clone: Path, files: Any, audio: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = files[2]
    (clone / "music").mkdir()
    soundfile.write(clone / "music" / "a.wav", audio[0].T.numpy(), 44_100, subtype="FLOAT")
    np.save(clone / "latents.npy", vae.encode(audio).mean.numpy())
    lines = [line.split() for block in blocks("authors.md", "sh") for line in block.splitlines()]
    assert [line[1] for line in lines] == ["reconstruct", "info", "convert", "decode"]
    for program, *arguments in lines:
        assert program == "ear-vae"
        assert main(arguments) == 0, capsys.readouterr().err
    rebuilt = vae.reconstruct(audio)[0].T.numpy()
    for file in ("rebuilt/a.wav", "rebuilt.wav"):
        np.testing.assert_allclose(soundfile.read(clone / file)[0], rebuilt, atol=1e-4)
    assert EarVAE.from_pretrained(clone / "my-model").config == vae.config
