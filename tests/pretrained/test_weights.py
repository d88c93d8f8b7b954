"""Weights on disk: exact round trips, strict loading, safe unpickling, one fingerprint for one model."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ear_vae import EarVAE, EarVAEConfig, EarVAEError
from ear_vae.pretrained import convert
from ear_vae.pretrained.folder import write_folder
from ear_vae.pretrained.layouts.official_state_dict import from_official, to_official

TINY = EarVAEConfig(
    channels=4, channel_multipliers=(1, 2), strides=(2, 4), latent_dim=32, transformer_depth=1
)


@pytest.fixture
def vae() -> EarVAE:
    torch.manual_seed(0)
    return EarVAE(TINY, name="tiny").eval().requires_grad_(False)


@pytest.fixture
def folder(vae: EarVAE, tmp_path: Path) -> Path:
    vae.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Other tensors in the file of a folder, without what our package says of them."""
    path = folder / "model.safetensors"
    state: dict[str, Tensor | None] = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)


def test_save_and_load_are_bit_equal(vae: EarVAE, folder: Path) -> None:
    loaded = EarVAE.from_pretrained(folder)
    assert loaded.config == vae.config
    assert loaded.name == "tiny"
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert set(loaded.state_dict()) == set(vae.state_dict())
    for name, tensor in vae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    audio = torch.randn(2, 300)
    assert torch.equal(loaded.reconstruct(audio), vae.reconstruct(audio))


def test_the_same_object_saved_again_gives_the_same_bytes(vae: EarVAE, tmp_path: Path) -> None:
    for number in range(10):
        vae.save_pretrained(tmp_path / str(number))
    for file in ("model.safetensors", "config.json", "README.md"):
        written = [path.read_bytes() for path in tmp_path.glob(f"*/{file}")]
        assert len(written) == 10
        assert len({hashlib.sha256(content).hexdigest() for content in written}) == 1
    with safe_open(tmp_path / "0/model.safetensors", framework="pt") as file:
        assert file.metadata() == {
            "ear_vae": json.dumps(
                {"format": "ear-vae", "format_version": 1, "weights_sha256": vae.weights_sha256}
            )
        }


def test_nothing_in_pretrained_needs_the_model_class() -> None:
    code = (
        "import importlib, pkgutil, sys, ear_vae.pretrained as room\n"
        "for module in pkgutil.walk_packages(room.__path__, 'ear_vae.pretrained.'):\n"
        "    importlib.import_module(module.name)\n"
        "print('ear_vae.vae' in sys.modules, 'huggingface_hub' in sys.modules, 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.split() == ["False", "False", "True"]


def test_a_config_of_an_unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**TINY.to_dict(), "architecture": "ear_vae_9"}))
    with pytest.raises(
        EarVAEError, match=r"config\.json: .*'ear_vae_9' is unknown; this ear-vae has ear_vae:"
    ):
        EarVAE.from_pretrained(folder)


def test_convert_chooses_the_layout(folder: Path, tmp_path: Path, cache: Path) -> None:
    expected = EarVAE.from_pretrained(folder).weights_sha256
    convert(folder, tmp_path / "a.pyt", dtype=torch.float32)
    assert any(name.endswith("weight_g") for name in torch.load(tmp_path / "a.pyt", weights_only=True))
    convert(folder, tmp_path / "half", dtype=torch.float16)
    assert load_file(tmp_path / "half/model.safetensors")[KEY].dtype == torch.float16
    convert(folder, tmp_path / "official", to="official")
    convert(tmp_path / "official", tmp_path / "back", cache_dir=cache)
    back = EarVAE.from_pretrained(tmp_path / "back")
    torch.testing.assert_close(back.state_dict(), EarVAE.from_pretrained(folder).state_dict())
    with pytest.raises(EarVAEError, match="official weights are float32"):
        convert(folder, tmp_path / "b.pyt", dtype=torch.float16)
    with pytest.raises(EarVAEError, match="would replace the model that is to be converted"):
        convert(folder, folder, overwrite=True)
    assert EarVAE.from_pretrained(folder).weights_sha256 == expected


def test_weights_that_are_not_those_the_file_states_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x08  # of the exponent of the last value, which stays finite
    path.write_bytes(content)
    with pytest.raises(EarVAEError, match=r"model\.safetensors: its weights have .*fetch the file again"):
        EarVAE.from_pretrained(folder)


def test_a_file_of_a_later_version_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    facts = json.dumps({"format": "ear-vae", "format_version": 2})
    save_file(load_file(path), path, metadata={"ear_vae": facts})
    with pytest.raises(EarVAEError, match=r"is 'ear-vae' of version 2, .* of version 1"):
        EarVAE.from_pretrained(folder)


@pytest.mark.parametrize("entry", ["[" * 100_000, "1" * 5000, "{", "3"])
def test_metadata_that_is_damaged(entry: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata={"ear_vae": entry})
    with pytest.raises(EarVAEError, match=r"model\.safetensors: not a readable") as caught:
        EarVAE.from_pretrained(folder)
    assert len(str(caught.value).removeprefix(str(path))) < 200


def test_a_card_escapes_the_name_and_cuts_it(tmp_path: Path) -> None:
    evil = "---\nlicense: mit\n---\r\n# <script>alert(1)</script>"
    EarVAE(TINY, name=evil + 500 * "y" + " [x](http://e) **b** `c` \x1b[31m").save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.count("---\n") == 2
    heading = next(line for line in card.splitlines() if line.startswith("# "))
    assert len(heading) < 250
    assert "<script>" not in card
    assert "\x1b" not in card
    assert "\nlicense" not in card
    assert r"\[x\]\(http" in heading
    assert r"\*\*b\*\* \`c\`" in heading


def test_saving_again_keeps_the_users_card(vae: EarVAE, folder: Path) -> None:
    assert "44100 Hz" in (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text("mine")
    vae.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"


def test_saving_where_nothing_can_be_written(vae: EarVAE, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EarVAEError, match=r"file: cannot write the model"):
        vae.save_pretrained(tmp_path / "file")


def test_half_precision_on_disk(vae: EarVAE, tmp_path: Path) -> None:
    write_folder(tmp_path / "half", vae.config, vae.state_dict(), name="half", dtype=torch.bfloat16)
    loaded = EarVAE.from_pretrained(tmp_path / "half")
    assert loaded.dtype == torch.float32
    for name, tensor in vae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16().float()), name
    assert loaded.weights_sha256 == vae.weights_sha256


KEY = "encoder.conv_in.weight"  # [4, 2, 7]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({KEY: None}, f"missing {KEY}"),
        ({"encoder.extra": torch.zeros(1)}, "unexpected encoder.extra"),
        ({KEY: torch.zeros(4, 2, 5)}, f"{KEY} is [4, 2, 5] instead of [4, 2, 7]"),
        ({KEY: torch.zeros(4, 2, 7, dtype=torch.int32)}, f"{KEY} is torch.int32 instead of float32"),
        ({KEY: torch.zeros(4, 2, 7, dtype=torch.float8_e4m3fn)}, f"{KEY} is torch.float8_e4m3fn instead of"),
        ({KEY: torch.full((4, 2, 7), float("nan"))}, f"{KEY} holds NaN or infinity"),
        ({KEY: torch.full((4, 2, 7), float("inf"))}, f"{KEY} holds NaN or infinity"),
        (
            {KEY: torch.full((4, 2, 7), 1e39, dtype=torch.float64)},
            f"{KEY} holds values beyond the range of float32",
        ),
        ({KEY: torch.zeros(4, 2, 7, dtype=torch.float8_e5m2)}, f"{KEY} is torch.float8_e5m2 instead of"),
        ({KEY: torch.zeros(4, 2, 7, dtype=torch.float8_e8m0fnu)}, f"{KEY} is torch.float8_e8m0fnu instead"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    changes: dict[str, Tensor | None], problem: str, folder: Path
) -> None:
    rewrite(folder, **changes)
    with pytest.raises(EarVAEError) as caught:
        EarVAE.from_pretrained(folder)
    assert problem in str(caught.value)
    assert str(folder / "model.safetensors") in str(caught.value)


def test_many_problems_are_counted(folder: Path) -> None:
    config = EarVAEConfig(**{**TINY.to_dict(), "channels": 8})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(EarVAEError, match=r"do not fit the config: .*; and \d+ more"):
        EarVAE.from_pretrained(folder)


@pytest.mark.parametrize("channels", [10**12, 10**20])
def test_a_config_of_absurd_size(channels: int, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**TINY.to_dict(), "channels": channels}))
    with pytest.raises(EarVAEError, match="channels must be 1 to 4096"):
        EarVAE.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"not safetensors at all", None])
def test_files_that_are_no_safetensors(content: bytes | None, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(EarVAEError, match=r"model\.safetensors: not a readable safetensors file"):
        EarVAE.from_pretrained(folder)


class Payload:
    """Runs a command when unpickled without care."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch '{self.witness}'",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_not_run(
    zipped: bool, folder: Path, tmp_path: Path, cache: Path
) -> None:
    convert(folder, tmp_path / "official", to="official")
    witness, weights = tmp_path / "witness", tmp_path / "official/pretrained_weight/tiny.pyt"
    if zipped:
        state = torch.load(weights, weights_only=True)
        torch.save({**state, "payload": Payload(witness)}, weights)
    else:
        weights.write_bytes(pickle.dumps(Payload(witness), protocol=2))
    with pytest.raises(EarVAEError, match=r"tiny\.pyt: refused, the pickle .* holds more than ten") as caught:
        EarVAE.from_pretrained(tmp_path / "official", cache_dir=cache)
    for advice in ("weights_only", "safe_globals", "two options", "trust the source"):
        assert advice not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not witness.exists()
    assert not cache.exists()
    if zipped:  # the trap was armed
        torch.load(weights, weights_only=False)
        assert witness.exists()


@pytest.mark.parametrize("content", ["empty", "text", "truncated", "zip", "list", "nested"])
def test_official_files_that_are_no_state_dict(
    content: str, folder: Path, tmp_path: Path, cache: Path
) -> None:
    convert(folder, tmp_path / "official", to="official")
    weights = tmp_path / "official/pretrained_weight/tiny.pyt"
    whole = weights.read_bytes()
    if content == "zip":
        with zipfile.ZipFile(weights, "w") as archive:
            archive.writestr("something", "else")
    elif content in ("list", "nested"):
        torch.save([torch.zeros(1)] if content == "list" else {"model": {"a": torch.zeros(1)}}, weights)
    else:
        weights.write_bytes({"empty": b"", "text": b"hello", "truncated": whole[: len(whole) // 2]}[content])
    with pytest.raises(EarVAEError, match=r"tiny\.pyt: (not a readable|refused|expected a flat dict)"):
        EarVAE.from_pretrained(tmp_path / "official", cache_dir=cache)


def test_official_tensors_that_do_not_fit(folder: Path, tmp_path: Path, cache: Path) -> None:
    convert(folder, tmp_path / "official", to="official")
    weights = tmp_path / "official/pretrained_weight/tiny.pyt"
    state = torch.load(weights, weights_only=True)
    key = "encoder.layers.0.weight_v"
    for changed, problem in (
        ({k: v for k, v in state.items() if k != key}, "missing encoder.layers.0.weight"),
        ({**state, key: state[key][:1]}, rf"damaged: {key} is \[1, 2, 7\], .*weight_g is \[4, 1, 1\]"),
        ({**state, key: state[key][:, :1]}, r"layers.0.weight is \[4, 1, 7\] instead of \[4, 2, 7\]"),
        ({**state, "discriminator.weight": torch.zeros(2)}, "unexpected discriminator.weight"),
        (
            {**state, "transformers.layers.0.pre_norm.beta": torch.ones(32)},
            "the transformer has a norm with a bias .*pre_norm.beta",
        ),
        (
            {**state, "transformers.rotary_pos_emb.inv_freq": torch.ones(16)},
            "the transformer has frequencies that the published network has not",
        ),
        ({k: v for k, v in state.items() if "weight_" not in k}, "missing encoder.layers.0.weight"),
    ):
        torch.save(changed, weights)
        with pytest.raises(EarVAEError, match=rf"tiny\.pyt: .*{problem}"):
            EarVAE.from_pretrained(tmp_path / "official", cache_dir=cache)


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize(
    "unusual",
    [
        lambda tensor: tensor.to_sparse(),
        lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        lambda tensor: tensor.to("meta"),
        lambda tensor: tensor.to(torch.float8_e4m3fn),
        lambda tensor: tensor.double() * 1e300,
        lambda tensor: tensor.to(torch.complex64),
    ],
)
def test_official_tensors_of_an_unusual_kind(
    unusual: Callable[[Tensor], Tensor], folder: Path, tmp_path: Path, cache: Path
) -> None:
    convert(folder, tmp_path / "official", to="official")
    weights = tmp_path / "official/pretrained_weight/tiny.pyt"
    state = torch.load(weights, weights_only=True)
    key = "encoder.layers.0.weight_v"
    torch.save({**state, key: unusual(state[key])}, weights)
    with pytest.raises(EarVAEError, match=r"tiny\.pyt: ") as caught:
        EarVAE.from_pretrained(tmp_path / "official", cache_dir=cache)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("part", "field", "value", "problem"),
    [
        ("encoder", "use_snake", False, "encoder.use_snake"),
        ("decoder", "use_nearest_upsample", True, "decoder.use_nearest_upsample"),
        ("decoder", "final_tanh", True, "decoder.final_tanh"),
        ("decoder", "strides", [2, 2], "decoder.strides"),
        ("encoder", "latent_dim", 32, "encoder.latent_dim"),
        ("encoder", "channels", "4", "channels"),
        ("encoder", "c_mults", None, "channel_multipliers must be a list"),
        (None, "encoder", [], "field missing or of the wrong type"),
        (None, "downsampling_ratio", 9, "downsampling_ratio"),
        (None, "latent_dim", None, "official config"),
        (None, "transformer", 3, "field missing or of the wrong type"),
    ],
)
def test_official_configs_that_are_not_supported(
    part: str | None, field: str, value: object, problem: str, folder: Path, tmp_path: Path, cache: Path
) -> None:
    convert(folder, tmp_path / "official", to="official")
    path = tmp_path / "official/config/tiny.json"
    values = json.loads(path.read_text())
    (values[part]["config"] if part else values)[field] = value
    if part == "encoder" and field in ("channels", "c_mults"):
        values["decoder"]["config"][field] = value
    path.write_text(json.dumps(values))
    with pytest.raises(EarVAEError) as caught:
        EarVAE.from_pretrained(tmp_path / "official", cache_dir=cache)
    assert str(path) in str(caught.value)
    assert problem in str(caught.value)


def test_to_the_official_layout_and_back(vae: EarVAE, folder: Path, tmp_path: Path, cache: Path) -> None:
    assert convert(folder, tmp_path / "official", to="official") == tmp_path / "official"
    assert {
        p.relative_to(tmp_path / "official").as_posix() for p in (tmp_path / "official").rglob("*.*")
    } == {
        "config.json",
        "config/tiny.json",
        "pretrained_weight/tiny.pyt",
    }
    convert(tmp_path / "official", tmp_path / "back", cache_dir=cache, to="folder")
    back = EarVAE.from_pretrained(tmp_path / "back")
    assert back.config == vae.config
    audio = torch.randn(2, 300)
    torch.testing.assert_close(back.encode(audio).mean, vae.encode(audio).mean)
    torch.testing.assert_close(back.reconstruct(audio), vae.reconstruct(audio))
    # The pickle holds each tensor's own numbers only.
    numbers = sum(t.nbytes for t in to_official(vae.state_dict(), TINY).values())
    assert (tmp_path / "official/pretrained_weight/tiny.pyt").stat().st_size < 2 * numbers + 200_000


def test_the_official_weight_norm_is_torchs(vae: EarVAE) -> None:
    """Independent of our folding: torch's own weight norm on convolutions of the published shapes."""
    state = to_official(vae.state_dict(), TINY)
    for module, official, ours in (
        (nn.Conv1d(2, 4, 7), "encoder.layers.0", "encoder.conv_in.weight"),
        (
            nn.ConvTranspose1d(8, 4, 8, bias=False),
            "decoder.layers.1.layers.1",
            "decoder.blocks.0.conv.weight",
        ),
    ):
        normed = nn.utils.parametrizations.weight_norm(module)
        scale = torch.linspace(0.5, 2, state[f"{official}.weight_v"].shape[0])[:, None, None]
        parts = state[f"{official}.weight_g"], state[f"{official}.weight_v"] * scale
        normed.parametrizations.weight.original0.data, normed.parametrizations.weight.original1.data = parts
        torch.testing.assert_close(normed.weight, vae.state_dict()[ours])
        state[f"{official}.weight_v"] = parts[1]
        torch.testing.assert_close(from_official(Path("x"), state, TINY)[ours], vae.state_dict()[ours])


def test_kernels_of_zeros_survive_the_official_layout(vae: EarVAE, tmp_path: Path, cache: Path) -> None:
    state = vae.state_dict()
    for name in state:
        if name.endswith("conv_pointwise.weight"):
            state[name].zero_()
    state["encoder.conv_in.weight"][1] = 0
    vae.save_pretrained(tmp_path / "zeros")
    convert(tmp_path / "zeros", tmp_path / "official", to="official")
    back = EarVAE.from_pretrained(tmp_path / "official", cache_dir=cache).state_dict()
    for name, tensor in state.items():
        torch.testing.assert_close(back[name], tensor, msg=name)
        assert torch.equal(back[name] == 0, tensor == 0), name


def test_one_fingerprint_for_one_model(vae: EarVAE, folder: Path, tmp_path: Path, cache: Path) -> None:
    expected = vae.weights_sha256
    loaded = EarVAE.from_pretrained(folder)
    assert loaded.weights_sha256 == expected
    assert loaded.to(torch.bfloat16).weights_sha256 == expected
    assert EarVAE.from_pretrained(folder, dtype=torch.bfloat16).weights_sha256 == expected
    loaded.save_pretrained(tmp_path / "bfloat16")  # half the precision, and still that model
    assert EarVAE.from_pretrained(tmp_path / "bfloat16").weights_sha256 == expected
    rewrite(folder)  # without our metadata
    assert EarVAE.from_pretrained(folder).weights_sha256 == expected
    # Another layout, and a weight norm that is folded exactly: all norms are powers of two here.
    for name, tensor in vae.state_dict().items():
        if tensor.ndim == 3:
            tensor.zero_()[:, 0, 0] = 0.5
            assert tensor.norm(dim=(1, 2)).eq(0.5).all(), name
    vae.save_pretrained(tmp_path / "exact")
    convert(tmp_path / "exact", tmp_path / "official", to="official")
    official = EarVAE.from_pretrained(tmp_path / "official", cache_dir=cache)
    assert official.weights_sha256 == vae.weights_sha256 != expected
    again = EarVAE.from_pretrained(tmp_path / "official", cache_dir=cache)
    assert again.weights_sha256 == vae.weights_sha256


def test_the_fingerprint_follows_changes(folder: Path) -> None:
    vae = EarVAE.from_pretrained(folder)
    before = vae.weights_sha256
    with torch.no_grad():
        vae.decoder.conv_out.weight[0, 0, 0] += 1
    changed = vae.weights_sha256
    assert changed != before
    with torch.no_grad():
        vae.decoder.conv_out.weight[0, 0, 0] -= 1
    vae.load_state_dict(EarVAE.from_pretrained(folder).state_dict())
    assert vae.weights_sha256 == before


def test_existing_destinations_need_overwrite(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    other = EarVAE(TINY, name="other").eval()
    other.save_pretrained(tmp_path / "other")
    for write, name in (
        (partial(convert, to="folder"), "out"),
        (partial(convert, to="official"), "off"),
        (partial(convert, to="official"), "w.pyt"),
    ):
        destination = tmp_path / "new" / name
        if name == "w.pyt":
            destination = tmp_path / name
        write(folder, destination)
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        with pytest.raises(EarVAEError, match=rf"{name}: exists already; remove it, or overwrite it"):
            write(tmp_path / "other", destination)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
        write(tmp_path / "other", destination, overwrite=True)
    written = EarVAE.from_pretrained(tmp_path / "new" / "out")
    assert written.weights_sha256 == other.weights_sha256
    assert set(torch.load(tmp_path / "w.pyt", weights_only=True)) == set(
        to_official(other.state_dict(), TINY)
    )
    assert list(json.loads((tmp_path / "new/off/config.json").read_text())["variants"]) == ["other"]


def test_a_conversion_that_fails_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ear_vae.pretrained.folder.save_file", full)
    monkeypatch.setattr("torch.save", full)
    (tmp_path / "out").mkdir()
    for write, name in (
        (partial(convert, to="folder"), "a"),
        (partial(convert, to="official"), "b"),
        (partial(convert, to="official"), "c.pyt"),
    ):
        with pytest.raises(EarVAEError, match="No space left on device"):
            write(folder, tmp_path / "out" / name)
    assert list((tmp_path / "out").iterdir()) == []


def test_destinations_of_the_wrong_kind(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in (partial(convert, to="folder"), partial(convert, to="official")):
        with pytest.raises(EarVAEError, match=r"file: is a file, expected the path of a folder"):
            write(folder, tmp_path / "file", overwrite=True)
        with pytest.raises(EarVAEError, match=r"below: cannot be written"):
            write(folder, tmp_path / "file" / "below")
    (tmp_path / "x.pyt").mkdir()
    with pytest.raises(EarVAEError, match=r"x\.pyt: is a folder"):
        convert(folder, tmp_path / "x.pyt", overwrite=True, to="official")
