"""Weights in every form that people hold them in: with or without a config, wrapped, folded, cloned."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ear_vae import EarVAE, EarVAEConfig, EarVAEError
from ear_vae.cli import main
from ear_vae.pretrained import convert

State = dict[str, Tensor]


@dataclass(frozen=True)
class Held:
    """A model as somebody holds it, and what it computes.

    `state` and `config` are the authors' own where `expected` comes from their code.
    """

    name: str
    state: State
    config: dict[str, Any]
    audio: Tensor
    mean: Tensor
    decoded: Tensor

    def check(self, vae: EarVAE) -> None:
        assert vae.sample_rate == {1024: 44_100, 960: 48_000}[vae.downsampling_ratio]
        for found, expected in (
            (vae.encode(self.audio).mean, self.mean),
            (vae.decode(self.mean), self.decoded),
        ):
            tolerance = 1e-4 * max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="module", params=["ours", "ear_vae_44k", "ear_vae_v2_48k"])
def held(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Held:
    if request.param == "ours":
        return _of_ours(request.getfixturevalue("tiny_config"), tmp_path_factory.mktemp("ours"))
    parity: Path = request.getfixturevalue("parity")
    entry = json.loads((parity / "config.json").read_text())["variants"][request.param]
    expected = load_file(parity / f"{request.param}.expected.safetensors")
    return Held(
        request.param,
        dict(torch.load(parity / entry["weights"], weights_only=True)),
        json.loads((parity / entry["config"]).read_text()),
        expected["audio"],
        expected["mean"],
        expected["decoded"],
    )


def _of_ours(config: EarVAEConfig, folder: Path) -> Held:
    torch.manual_seed(0)
    vae = EarVAE(config).eval().requires_grad_(False)
    vae.save_pretrained(folder / "model")
    convert(folder / "model", folder / "official", to="official")
    audio = 0.3 * torch.randn(1, 2, 5 * 1024)
    mean = vae.encode(audio).mean
    state = torch.load(folder / "official/pretrained_weight/model.pyt", weights_only=True)
    values = json.loads((folder / "official/config/model.json").read_text())
    return Held("ours", dict(state), values, audio, mean, vae.decode(mean))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hub"))
    return tmp_path / "hub"


def preset(held: Held) -> str:
    return "ear_vae_v2_48k" if held.config["downsampling_ratio"] == 960 else "ear_vae_44k"


def without_weight_norm(state: State) -> State:
    plain = {}
    for name, tensor in state.items():
        if name.endswith("weight_v"):
            norm = tensor.flatten(1).norm(dim=1)[:, None, None]
            plain[name.removesuffix("_v")] = tensor * state[name.removesuffix("v") + "g"] / norm
        elif not name.endswith("weight_g"):
            plain[name] = tensor
    return plain


def with_torchs_parametrization(state: State) -> State:
    parts = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    renamed = {}
    for name, tensor in state.items():
        prefix, _, last = name.rpartition(".")
        renamed[f"{prefix}.{parts.get(last, last)}"] = tensor
    return renamed


def averaged(state: State) -> dict[str, Any]:
    decoy = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    own = {"initted": torch.tensor(True), "step": torch.tensor(7)}
    return {"gen_ema": {**own, **{f"ema_model.{n}": t for n, t in state.items()}}, "gen": decoy, "step": 7}


FORMS: dict[str, Callable[[State], Any]] = {
    "alone": dict,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {}}},
    "model": lambda state: {"model": state},
    "nested": lambda state: {"model": {"state_dict": state}},
    "gen_ema": averaged,
    "gen": lambda state: {"gen": state, "step": 100},
    "a prefix": lambda state: {f"module.vae.{name}": tensor for name, tensor in state.items()},
    "no weight norm": without_weight_norm,
    "torch's weight norm": with_torchs_parametrization,
}


@pytest.mark.parametrize(
    ("form", "held"),
    [*((form, name) for form in FORMS for name in ("ours", "ear_vae_44k")), ("alone", "ear_vae_v2_48k")],
    indirect=["held"],
)
def test_state_dicts_that_tell_all(form: str, held: Held, tmp_path: Path) -> None:
    path = tmp_path / "finetuned.pyt"
    torch.save(FORMS[form](held.state), path)
    vae = EarVAE.from_pretrained(path)
    assert vae.name == "finetuned"
    held.check(vae)


def beside(held: Held, folder: Path) -> Any:
    (folder / "weights.json").write_text(json.dumps(held.config))


def file_elsewhere(held: Held, folder: Path) -> Any:
    (folder / "elsewhere.json").write_text(json.dumps(held.config))
    return folder / "elsewhere.json"


CONFIGS: dict[str, Callable[[Held, Path], Any]] = {
    "beside": beside,
    "file": file_elsewhere,
    "dict": lambda held, folder: held.config,
    "preset": lambda held, folder: preset(held),
    "part": lambda held, folder: {"sample_rate": 44_100 if preset(held) == "ear_vae_44k" else 48_000},
}


@pytest.mark.parametrize("given", CONFIGS)
def test_configs_of_every_kind(given: str, held: Held, tmp_path: Path) -> None:
    torch.save(held.state, tmp_path / "weights.pt")
    config = CONFIGS[given](held, tmp_path)
    held.check(EarVAE.from_pretrained(tmp_path / "weights.pt", config=config))
    if given == "beside":  # it is read: with another channel count it does not fit
        held.config["encoder"]["config"]["channels"] += 2
        try:
            beside(held, tmp_path)
        finally:
            held.config["encoder"]["config"]["channels"] -= 2
        with pytest.raises(EarVAEError, match=r"weights\.json: .*inconsistent values of decoder\.channels"):
            EarVAE.from_pretrained(tmp_path / "weights.pt")


def test_safetensors_and_our_own_names(held: Held, tmp_path: Path) -> None:
    save_file(
        {name: t.contiguous().clone() for name, t in held.state.items()}, tmp_path / "theirs.safetensors"
    )
    vae = EarVAE.from_pretrained(tmp_path / "theirs.safetensors")
    held.check(vae)
    torch.save(vae.state_dict(), tmp_path / "ours.pt")
    held.check(EarVAE.from_pretrained(str(tmp_path / "ours.pt"), config=vae.config))
    fields = {"sample_rate": vae.sample_rate, "transformer_head_dim": vae.config.transformer_head_dim}
    held.check(EarVAE.from_pretrained(str(tmp_path / "ours.pt"), config=fields))
    vae.save_pretrained(tmp_path / "folder")
    held.check(EarVAE.from_pretrained(tmp_path / "folder" / "model.safetensors"))


def test_converted_from_a_bare_file(held: Held, tmp_path: Path) -> None:
    torch.save({"state_dict": held.state}, tmp_path / "weights.pyt")
    assert (
        main(["convert", str(tmp_path / "weights.pyt"), str(tmp_path / "out"), "--config", preset(held)]) == 0
    )
    held.check(EarVAE.from_pretrained(tmp_path / "out"))


def clone(parity: Path, folder: Path) -> Path:
    """What git clones, with the weights fetched: there is no config.json."""
    for name in ("config", "pretrained_weight"):
        shutil.copytree(parity / name, folder / name)
    (folder / "README.md").write_text("# a clone")
    return folder


@pytest.mark.parametrize("variant", ["ear_vae_44k", "ear_vae_v2_48k"])
def test_a_clone_of_the_authors_repository(variant: str, parity: Path, tmp_path: Path) -> None:
    vae = EarVAE.from_pretrained(clone(parity, tmp_path / "EAR_VAE"), variant=variant)
    expected = EarVAE.from_pretrained(parity, variant=variant)
    assert (vae.name, vae.config) == (variant, expected.config)
    assert vae.weights_sha256 == expected.weights_sha256


def test_what_a_clone_may_lack(parity: Path, tmp_path: Path) -> None:
    folder = clone(parity, tmp_path / "EAR_VAE")
    with pytest.raises(
        EarVAEError, match="holds several models; choose one of 'ear_vae_44k', 'ear_vae_v2_48k'"
    ):
        EarVAE.from_pretrained(folder)
    with pytest.raises(EarVAEError, match="has no variant 'x'; it has 'ear_vae_44k'"):
        EarVAE.from_pretrained(folder, variant="x")
    (folder / "pretrained_weight" / "ear_vae_44k.pyt").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0362dc7e\nsize 600000000\n"
    )
    with pytest.raises(EarVAEError, match=r"ear_vae_44k\.pyt: is not the weights, .*git lfs pull"):
        EarVAE.from_pretrained(folder, variant="ear_vae_44k")
    (folder / "pretrained_weight" / "ear_vae_44k.pyt").unlink()
    assert EarVAE.from_pretrained(folder).sample_rate == 48_000
    (folder / "config" / "ear_vae_v2.json").unlink()
    (folder / "config" / "third.json").write_text((folder / "config" / "model_config.json").read_text())
    (folder / "pretrained_weight" / "more.pyt").write_bytes(
        (folder / "pretrained_weight" / "ear_vae_v2_48k.pyt").read_bytes() + b"\0"
    )
    with pytest.raises(EarVAEError, match=r"model_config\.json, .*third\.json: do not fit its tensors; name"):
        EarVAE.from_pretrained(folder, variant="more")
    assert EarVAE.from_pretrained(folder, variant="more", config="ear_vae_v2_48k").latent_rate == 50


def test_a_folder_with_a_file_and_its_config(held: Held, tmp_path: Path) -> None:
    """As bundles of other programs hold it; the config tells another rate than the strides do."""
    torch.save(held.state, tmp_path / "mine.pyt")
    (tmp_path / "mine.json").write_text(json.dumps({**held.config, "sample_rate": 32_000}))
    vae = EarVAE.from_pretrained(tmp_path)
    assert (vae.name, vae.sample_rate) == ("mine", 32_000)


def test_unpickled_once(held: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(held.state, tmp_path / "weights.pyt")
    first = EarVAE.from_pretrained(tmp_path / "weights.pyt", config={"sample_rate": 32_000})
    assert first.sample_rate == 32_000
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("unpickled again"))
        again = EarVAE.from_pretrained(tmp_path / "weights.pyt", config={"sample_rate": 32_000})
    assert again.weights_sha256 == first.weights_sha256
    # Another config is another model.
    assert (
        EarVAE.from_pretrained(tmp_path / "weights.pyt", config={"sample_rate": 22_050}).sample_rate == 22_050
    )


@pytest.fixture
def state(tiny_config: EarVAEConfig, tmp_path: Path) -> State:
    torch.manual_seed(0)
    EarVAE(tiny_config).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "source.pyt")
    return dict(torch.load(tmp_path / "source.pyt", weights_only=True))


def with_two_snakes(state: State) -> State:
    name = "decoder.layers.2.layers.3.layers.2.alpha"
    return {**state, name: state[name] + 1}


TAPS = "encoder.layers.2.layers.4.weight_v"
REFUSED: dict[str, tuple[Callable[[State], Any], str]] = {
    "a list": (lambda state: [torch.zeros(1)], "expected a state dict, found a list"),
    "an empty dict": (lambda state: {}, "found an empty dict"),
    "a deep dict": (lambda state: {"weights": {"a": torch.zeros(1)}}, r"found weights: a dict"),
    "another network": (
        lambda state: {"conv.weight": torch.zeros(1), "conv.bias": torch.zeros(1)},
        r"has no tensors of an εar-VAE, but \['conv.bias', 'conv.weight'\]",
    ),
    "two of them": (
        lambda state: {f"{prefix}.{name}": t for prefix in ("a", "b") for name, t in state.items()},
        r"holds several autoencoders, under \['a\.', 'b\.'\]",
    ),
    "a discriminator": (
        lambda state: {"d.conv.weight": torch.zeros(1), **{f"g.{n}": t for n, t in state.items()}},
        r"holds more than the autoencoder under 'g\.': 1 tensors such as \['d\.conv\.weight'\]",
    ),
    "an extra tensor": (lambda state: {**state, "x": torch.zeros(1)}, "unexpected x"),
    "a missing tensor": (
        lambda state: {n: t for n, t in state.items() if n != "decoder.layers.7.weight_g"},
        r"decoder\.layers\.7\.weight_v is .*weight_g is missing",
    ),
    "no strided convolution": (
        lambda state: {n: t for n, t in state.items() if "encoder.layers.1.layers.4.weight" not in n},
        r"not the weights of an εar-VAE: encoder\.layers\.2\.weight is missing",
    ),
    "NaN": (lambda state: {**state, TAPS: state[TAPS] * torch.nan}, f"damaged: {TAPS} holds NaN"),
    "other strides": (
        lambda state: {**state, TAPS: state[TAPS][..., :4]},
        r"neither the tensors nor a config tell sample_rate; give .*\(config=\.\.\.\)",
    ),
    "two Snakes": (with_two_snakes, "weights of an Oobleck of stable-audio-tools"),
    "a checkpoint of ours": (
        lambda state: {"pytorch-lightning_version": "2.6", "ear_vae": {}, "state_dict": state},
        "is a training checkpoint of ear-vae fit; ear-vae release makes a model of it",
    ),
    "εar-VAE2": (
        lambda state: {"gen": {"window": torch.zeros(1), "refiner_window": torch.zeros(1)}},
        "these are weights of εar-VAE2, another network",
    ),
    "diffusers' names": (
        lambda state: {"encoder.conv1.bias": torch.zeros(1)},
        "weights of diffusers' AutoencoderOobleck, .*give its config.json",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_files_are_refused_by_what_they_hold(
    case: str, state: State, tmp_path: Path, cache: Path
) -> None:
    change, problem = REFUSED[case]
    torch.save(change(state), tmp_path / "weights.pt")
    with pytest.raises(EarVAEError, match=rf"weights\.pt: .*{problem}") as caught:
        EarVAE.from_pretrained(tmp_path / "weights.pt")
    assert "\n" not in str(caught.value)
    assert not list(cache.rglob("*.safetensors"))


def test_the_authors_second_network_is_refused(repository: Path) -> None:
    weights = repository.parent / "shared" / "parity2" / "weights"
    if not weights.is_dir():
        pytest.skip("needs the parity fixtures of another network in ../shared")
    for path in weights.glob("*.pt"):
        with pytest.raises(
            EarVAEError, match=rf"{path.name}: these are weights of εar-VAE2, another network"
        ):
            EarVAE.from_pretrained(path)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            "nothing.json",
            r"nothing\.json: no such file; the config of weights is a JSON file, or one of ear_vae",
        ),
        (3, "config must be a file, a dict"),
        ({"sample_rate": "44100"}, "sample_rate must be an integer"),
        ({"sampling_rate": 44_100}, r"unknown \['sampling_rate'\]"),
        ({"channels": 8}, "the weights do not fit the config"),
        ({"format_version": 2}, "format version 2, this ear-vae reads 1"),
        ({"encoder": {}}, "field missing or of the wrong type"),
        ({"variants": {}}, "is one of several models; give their folder"),
        ({"model": {"gen": {}}}, "is one of another network"),
        ({"_class_name": "AutoencoderKL"}, "is the config of 'AutoencoderKL'"),
        ({"model_type": "autoencoder"}, "field missing or of the wrong type: .*model"),
        ("ear_vae_v2_48k", r"the weights do not fit the config: .* instead of"),
    ],
)
def test_configs_that_do_not_fit(config: Any, problem: str, state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "weights.pyt")
    with pytest.raises(EarVAEError, match=problem):
        EarVAE.from_pretrained(tmp_path / "weights.pyt", config=config)


def test_half_a_file_and_one_with_code(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pyt"
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(EarVAEError, match=r"weights\.pyt: not a readable PyTorch file"):
        EarVAE.from_pretrained(path)

    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch '{tmp_path / 'ran'}'",)

    for content in (pickle.dumps(Runs(), protocol=2), None):
        if content is None:
            torch.save({**state, "x": Runs()}, path)
        else:
            path.write_bytes(content)
        with pytest.raises(EarVAEError, match=r"weights\.pyt: refused, the pickle .*holds more than tensors"):
            EarVAE.from_pretrained(path)
    assert not (tmp_path / "ran").exists()


def test_tensors_that_claim_more_than_the_file_holds(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pyt"
    name = next(name for name in state if name.endswith("weight_v"))
    torch.save({**state, name: torch.zeros(1).expand(10**5, 10**5, 100)}, path)
    with pytest.raises(EarVAEError, match=r"weights\.pyt: damaged: 4 bytes for a tensor of shape \[100000, "):
        EarVAE.from_pretrained(path)


def test_a_weight_beside_its_direction_and_norm(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pyt"
    name = next(name for name in state if name.endswith("weight_v"))
    torch.save({**state, name.removesuffix("_v"): state[name]}, path)
    with pytest.raises(EarVAEError, match=r"damaged: \S+ has a weight beside its direction and norm"):
        EarVAE.from_pretrained(path)


def test_options_that_are_of_other_models(state: State, small_model: Path, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "weights.pyt")
    with pytest.raises(EarVAEError, match=r"variants are of repositories; leave it out \(variant='x'\)"):
        EarVAE.from_pretrained(tmp_path / "weights.pyt", variant="x")
    with pytest.raises(EarVAEError, match="revisions are for Hub repositories only"):
        EarVAE.from_pretrained(tmp_path / "weights.pyt", revision="main")
    for name in (small_model, "ear-vae-tiny"):
        with pytest.raises(EarVAEError, match=r"has its own config; .*leave it out"):
            EarVAE.from_pretrained(name, config="ear_vae_44k")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("ear_vae_tiny", "ear-vae-tiny"),
        ("EAR-VAE-Tiny", "ear-vae-tiny"),
        ("ear-vae-44k", "ear_vae_44k"),
        ("ear_vae_48k", "ear_vae_44k or ear_vae_v2_48k"),
        ("encodec", None),
        ("./ear_vae", None),
    ],
)
def test_names_close_to_one_that_is_known(name: str, meant: str | None) -> None:
    with pytest.raises(EarVAEError) as caught:
        EarVAE.from_pretrained(name)
    assert ("did you mean" in str(caught.value)) == (meant is not None)
    assert meant is None or f"{name}: is no folder or file that exists; did you mean {meant}?" in str(
        caught.value
    )


def test_info_says_what_a_bare_file_is(
    state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(state, "tiny.pyt")
    torch.save(state, "tiny.pt")
    save_file({n: t.clone() for n, t in state.items()}, "tiny.safetensors")
    for name in ("tiny.pyt", "tiny.pt", "tiny.safetensors"):
        assert main(["info", name, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["kind"], facts["name"], facts["strides"]) == ("model", "tiny", [2, 4, 4, 4, 8])
        assert facts["sample_rate"] == 44_100
    assert main(["info", "tiny.pyt", "--config", "nothing.json"]) == 1
    assert capsys.readouterr().err.endswith("or one of ear_vae_44k, ear_vae_v2_48k (--config nothing.json)\n")
    Path("tiny.pyt").write_bytes(b"half")
    assert main(["info", "tiny.pyt"]) == 1
    assert "tiny.pyt: not a readable PyTorch file" in capsys.readouterr().err
