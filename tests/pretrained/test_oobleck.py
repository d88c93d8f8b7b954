"""Oobleck's weights, as diffusers and stable-audio-tools keep them, give what diffusers makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ear_vae import EarVAE, EarVAEError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
HOP, FRAMES = 64, 40


@pytest.fixture(scope="module")
def audio() -> Tensor:
    return 0.3 * torch.randn(2, 2, HOP * FRAMES, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hub"))


def stable_audio_state(oobleck: Any) -> dict[str, Tensor]:
    """Its tensors under the names that stable-audio-tools gives them, written down from its class."""
    unit = ["snake1", "conv1", "snake2", "conv2"]
    encoder_block = ["res_unit1", "res_unit2", "res_unit3", "snake1", "conv1"]
    decoder_block = ["snake1", "conv_t1", "res_unit1", "res_unit2", "res_unit3"]
    state: dict[str, Tensor] = {}
    for name, tensor in oobleck.state_dict().items():
        half, *path, parameter = name.split(".")
        block = encoder_block if half == "encoder" else decoder_block
        places: list[int]
        if path[0] == "block":
            places = [int(path[1]) + 1, block.index(path[2])]
            places += [unit.index(part) for part in path[3:]]
        else:
            places = [{"conv1": 0, "snake1": 4, "conv2": 5}[path[0]]]
        value = tensor.flatten() if parameter in ("alpha", "beta") else tensor
        state[".".join([half, *(f"layers.{place}" for place in places), parameter])] = value.clone()
    return state


def stable_audio_config() -> dict[str, Any]:
    shared = {"channels": 8, "c_mults": [1, 2, 2], "strides": [2, 4, 8], "use_snake": True}
    return {
        "model_type": "autoencoder",
        "sample_rate": 44_100,
        "sample_size": 65_536,
        "audio_channels": 2,
        "model": {
            "encoder": {"type": "oobleck", "config": {"in_channels": 2, "latent_dim": 8, **shared}},
            "decoder": {
                "type": "oobleck",
                "config": {"out_channels": 2, "latent_dim": 4, "final_tanh": False, **shared},
            },
            "bottleneck": {"type": "vae"},
            "latent_dim": 4,
            "downsampling_ratio": HOP,
            "io_channels": 2,
        },
    }


def as_diffusers(oobleck: Any, folder: Path) -> None:
    oobleck.save_pretrained(folder)


def as_pipeline(oobleck: Any, folder: Path) -> None:
    oobleck.save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text("{}")


def as_stable_audio(oobleck: Any, folder: Path) -> None:
    folder.mkdir()
    (folder / "model_config.json").write_text(json.dumps(stable_audio_config()))
    save_file(stable_audio_state(oobleck), folder / "model.safetensors")


def as_checkpoint(oobleck: Any, folder: Path) -> None:
    as_stable_audio(oobleck, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": stable_audio_state(oobleck)}, folder / "model.ckpt")


def as_diffusion_model(oobleck: Any, folder: Path) -> None:
    """The autoencoder inside of a diffusion model, whose own tensors are none of ours."""
    as_stable_audio(oobleck, folder)
    config = stable_audio_config()
    inner = {"type": "autoencoder", "iterate_batch": True, "config": config["model"]}
    values = {**config, "model_type": "diffusion_cond", "model": {"pretransform": inner, "io_channels": 64}}
    (folder / "model_config.json").write_text(json.dumps(values))
    state = {f"pretransform.model.{name}": tensor for name, tensor in stable_audio_state(oobleck).items()}
    save_file({**state, "model.model.to_timestep.weight": torch.zeros(3)}, folder / "model.safetensors")


FORMS = [as_diffusers, as_pipeline, as_stable_audio, as_checkpoint, as_diffusion_model]


@pytest.mark.parametrize("save", FORMS)
def test_what_diffusers_computes(
    save: Callable[[Any, Path], None], oobleck: Any, audio: Tensor, tmp_path: Path
) -> None:
    save(oobleck, tmp_path / "model")
    vae = EarVAE.from_pretrained(tmp_path / "model")
    assert (vae.name, vae.sample_rate, vae.downsampling_ratio) == ("model", 44_100, HOP)
    with torch.no_grad():
        expected = oobleck.encode(audio).latent_dist
        decoded = oobleck.decode(expected.mean).sample
    posterior = vae.encode(audio)
    torch.testing.assert_close(posterior.mean, expected.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(posterior.std, expected.std, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vae.decode(posterior.mean), decoded, rtol=1e-5, atol=1e-5)
    [streamed] = vae.encode_stream([audio], tile_frames=FRAMES)
    torch.testing.assert_close(streamed.std, expected.std, rtol=1e-5, atol=1e-5)
    tiles = torch.cat(list(vae.decode_stream([posterior.mean], tile_frames=7)), dim=-1)
    torch.testing.assert_close(tiles, decoded, rtol=1e-5, atol=1e-5)


def test_the_floor_of_the_standard_deviation(oobleck: Any, audio: Tensor, tmp_path: Path) -> None:
    """A scale of −50 has a softplus of 0: what is left is the floor of 1e-4."""
    as_diffusers(oobleck, tmp_path / "model")
    vae = EarVAE.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        vae.encoder.conv_out.weight.zero_()
        assert vae.encoder.conv_out.bias is not None
        vae.encoder.conv_out.bias.fill_(-50)
    assert vae.encode(audio).std.unique().tolist() == pytest.approx([1e-4])


def test_saved_and_loaded_in_our_layout(oobleck: Any, audio: Tensor, tmp_path: Path) -> None:
    as_diffusers(oobleck, tmp_path / "model")
    vae = EarVAE.from_pretrained(tmp_path / "model")
    vae.save_pretrained(tmp_path / "ours")
    values = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (values["snakes_per_residual_unit"], values["min_std"]) == (2, 1e-4)
    loaded = EarVAE.from_pretrained(tmp_path / "ours")
    assert torch.equal(loaded.encode(audio).std, vae.encode(audio).std)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"_class_name": "AutoencoderKL"}, "is the config of 'AutoencoderKL'; expected AutoencoderOobleck"),
        ({"decoder_channels": 16}, "unsupported or inconsistent values of decoder_channels"),
        ({"decoder_input_channels": 8}, "inconsistent values of encoder_hidden_size"),
        ({"downsampling_ratios": [2, 3, 8]}, "strides must be even"),
        ({"channel_multiples": [1, 2, 3]}, r"the weights do not fit the config: .* instead of"),
        ({"channel_multiples": None}, "channel_multipliers must be a list of integers, got None"),
    ],
)
def test_a_config_of_diffusers_that_does_not_fit(
    changes: dict[str, Any], problem: str, oobleck: Any, tmp_path: Path
) -> None:
    as_diffusers(oobleck, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(EarVAEError, match=problem):
        EarVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda v: v["model"]["decoder"]["config"].pop("final_tanh"), "values of decoder.final_tanh"),
        (lambda v: v["model"].update(bottleneck={"type": "tanh"}), "values of bottleneck.type"),
        (lambda v: v["model"]["encoder"].update(type="dac"), "its autoencoder is 'dac, oobleck'"),
        (lambda v: v["model"].pop("latent_dim"), "field missing or of the wrong type: .*latent_dim"),
        (lambda v: v.update(model_type="lm", model={}), "field missing or of the wrong type: .*pretransform"),
    ],
)
def test_a_config_of_stable_audio_tools_that_does_not_fit(
    change: Callable[[Any], None], problem: str, oobleck: Any, tmp_path: Path
) -> None:
    as_stable_audio(oobleck, tmp_path / "model")
    values = stable_audio_config()
    change(values)
    (tmp_path / "model" / "model_config.json").write_text(json.dumps(values))
    with pytest.raises(EarVAEError, match=rf"model_config\.json: .*{problem}"):
        EarVAE.from_pretrained(tmp_path / "model")


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (Path("ran"), "it ran"))


def test_weights_that_do_not_fit(oobleck: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    as_checkpoint(oobleck, tmp_path / "model")
    path = tmp_path / "model" / "model.ckpt"
    torch.save({"state_dict": _Runs()}, path)
    with pytest.raises(EarVAEError, match=r"model\.ckpt: refused, the pickle is damaged or holds more"):
        EarVAE.from_pretrained(tmp_path / "model")
    assert not Path("ran").exists()
    torch.save({"state_dict": {"transformer.weight": torch.zeros(3)}}, path)
    with pytest.raises(EarVAEError, match=r"has no tensors of an autoencoder, but \['transformer\.weight'\]"):
        EarVAE.from_pretrained(tmp_path / "model")
    state = stable_audio_state(oobleck)
    del state["encoder.layers.0.weight_g"]
    torch.save({"state_dict": state}, path)
    with pytest.raises(EarVAEError, match=r"encoder\.layers\.0\.weight_v is .*weight_g is missing"):
        EarVAE.from_pretrained(tmp_path / "model")

    as_diffusers(oobleck, tmp_path / "other")
    weights = tmp_path / "other" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EarVAEError, match="not a readable safetensors file"):
        EarVAE.from_pretrained(tmp_path / "other")
    weights.write_bytes(whole)
    tensors = load_file(weights)
    tensors.pop("encoder.conv2.bias")
    save_file({**tensors, "more": torch.zeros(1)}, weights)
    with pytest.raises(EarVAEError, match=r"missing encoder\.conv2\.bias; unexpected more"):
        EarVAE.from_pretrained(tmp_path / "other")
    weights.unlink()
    with pytest.raises(EarVAEError, match=r"diffusion_pytorch_model\.safetensors: the file is missing"):
        EarVAE.from_pretrained(tmp_path / "other")
    with pytest.raises(EarVAEError, match="holds one model and no variants"):
        EarVAE.from_pretrained(tmp_path / "other", variant="x")
