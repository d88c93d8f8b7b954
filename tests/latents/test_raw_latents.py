"""Latents as other programs store them: arrays in files of theirs, without a word about the model."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file
from torch import Tensor

from ear_vae import EarVAE, EarVAEError
from ear_vae.cli import main
from ear_vae.latents import Latents, is_raw, load_latents, load_raw_latents, save_latents

LATENTS = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def vae(small_model: Path) -> EarVAE:
    return EarVAE.from_pretrained(small_model)


def npy(path: Path, z: Tensor) -> None:
    np.save(path, z.numpy())


def npy_of_another_byte_order(path: Path, z: Tensor) -> None:
    np.save(path, np.asfortranarray(z.numpy().astype(">f4")))


def npz(path: Path, z: Tensor) -> None:
    np.savez(path, z.numpy())


def npz_beside_others(path: Path, z: Tensor) -> None:
    np.savez_compressed(path, prompt=np.array(["a song"], dtype=object), mean=z.numpy(), std=z.numpy())


def tensor(path: Path, z: Tensor) -> None:
    torch.save(z, path)


def dictionary(path: Path, z: Tensor) -> None:
    torch.save({"latents": z, "seconds": 3.0}, path)


def old_tensor(path: Path, z: Tensor) -> None:
    torch.save(z, path, _use_new_zipfile_serialization=False)


def safetensors(path: Path, z: Tensor) -> None:
    save_file({"anything": z.contiguous()}, path)


FORMS: dict[Callable[[Path, Tensor], None], str] = {
    npy: ".npy",
    npy_of_another_byte_order: ".npy",
    npz: ".npz",
    npz_beside_others: ".npz",
    tensor: ".pt",
    dictionary: ".pt",
    old_tensor: ".pt",
    safetensors: ".safetensors",
}


@pytest.mark.parametrize("write", FORMS)
def test_arrays_of_every_form(write: Callable[[Path, Tensor], None], tmp_path: Path) -> None:
    path = tmp_path / f"z{FORMS[write]}"
    for stored, time_first in (
        (LATENTS, False),
        (LATENTS[None], False),
        (LATENTS.T, True),
        (LATENTS.T[None], True),
    ):
        write(path, stored)
        assert is_raw(path)
        assert torch.equal(load_raw_latents(path, time_first=time_first), LATENTS)
        stream = io.BytesIO(path.read_bytes())
        assert is_raw(stream) == (write is not old_tensor)  # which has no mark to be known by
        assert torch.equal(load_raw_latents(stream, time_first=time_first), LATENTS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_dtype_stays(dtype: torch.dtype, tmp_path: Path) -> None:
    npy(tmp_path / "z.npy", LATENTS.to(dtype))
    assert load_raw_latents(tmp_path / "z.npy").dtype == dtype


def two_arrays(path: Path) -> None:
    content = io.BytesIO()
    np.savez(content, a=np.zeros(3), b=np.zeros(3))
    path.write_bytes(content.getvalue())


def script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is on its way out
        torch.jit.script(torch.nn.Identity()).save(str(path))


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (Path("ran"), "it ran")


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (
            lambda path: npy(path, torch.zeros(2, 64, 5)),
            r"a batch of 2, shape \[2, 64, 5\]; give each by itself",
        ),
        (
            lambda path: npy(path, torch.zeros(5)),
            r"has shape \[5\]; expected latents \[D, N\] or \[1, D, N\]",
        ),
        (lambda path: npy(path, torch.zeros(64, 0)), r"has shape \[64, 0\]"),
        (
            lambda path: npy(path, torch.zeros(64, 5, dtype=torch.int64)),
            "holds torch.int64; latents are float32",
        ),
        (lambda path: np.save(path, np.array(["a"])), "which are no numbers for latents"),
        (lambda path: np.save(path, np.array([Runs()]), allow_pickle=True), "not a readable latent file"),
        (
            two_arrays,
            r"holds \['a', 'b'\]; expected",
        ),
        (lambda path: torch.save({"z": Runs()}, path), "refused, the pickle is damaged or holds more"),
        (script, "refused, a TorchScript archive holds code; save tensors alone$"),
        (
            lambda path: torch.save(torch.zeros(1).expand(64, 10**10), path),
            r"damaged: 4 bytes for a tensor of shape \[64, 10000000000\]$",
        ),
        (lambda path: torch.save({"seconds": 3.0}, path), "holds a float; expected an array of numbers"),
        (lambda path: torch.save([1.0], path), "holds a list; expected an array of numbers"),
        (lambda path: path.write_bytes(b""), r"is empty \(0 bytes\)"),
        (
            lambda path: path.write_bytes(b"\x93NUMPY\x01\x00half"),
            "not a readable latent file, perhaps truncated",
        ),
        (lambda path: path.write_bytes(b"PK\x03\x04half"), "not a readable latent file, perhaps truncated"),
        (lambda path: path.mkdir(), "cannot be read: Is a directory"),
        (lambda path: None, "cannot be read: No such file"),
    ],
)
def test_files_that_hold_something_else(
    write: Callable[[Path], Any], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "z.npy")
    with pytest.raises(EarVAEError, match=rf"z\.npy: .*{problem}") as caught:
        load_raw_latents(tmp_path / "z.npy")
    assert "\n" not in str(caught.value)
    assert not Path("ran").exists()


def test_latents_of_a_model(vae: EarVAE, tmp_path: Path) -> None:
    for given in (LATENTS, LATENTS[None], LATENTS.numpy(), LATENTS.half()):
        latents = Latents.from_mean(given, vae)
        assert latents.mean.shape == (64, 5)
        assert (latents.num_samples, latents.source_num_samples, latents.sampled) == (5120, 5120, False)
        assert (latents.model_name, latents.weights_sha256) == (vae.name, vae.weights_sha256)
    save_latents(tmp_path / "z.safetensors", Latents.from_mean(LATENTS, vae, num_samples=5000))
    assert not is_raw(tmp_path / "z.safetensors")
    read = load_latents(tmp_path / "z.safetensors")
    assert torch.equal(read.mean, LATENTS)
    assert (read.num_samples, read.duration_seconds) == (5000, 5000 / 44_100)
    with pytest.raises(
        EarVAEError, match=r"latents have shape \[5, 64\]; 'small' has \[64, N\]; they have time"
    ):
        Latents.from_mean(LATENTS.T, vae)
    with pytest.raises(EarVAEError, match=r"latents have shape \[32, 5\]; 'small' has \[64, N\]$"):
        Latents.from_mean(LATENTS[:32], vae)
    with pytest.raises(EarVAEError, match="latents: holds a batch of 2"):
        Latents.from_mean(torch.zeros(2, 64, 5), vae)
    with pytest.raises(EarVAEError, match="4096 samples at 1024 per frame are 4 frames, the file holds 5"):
        Latents.from_mean(LATENTS, vae, num_samples=4096)
    with pytest.raises(EarVAEError, match="mean holds NaN or infinity"):
        Latents.from_mean(LATENTS * torch.nan, vae)
    with pytest.raises(EarVAEError, match=r"mean is torch\.int64"):
        Latents.from_mean(np.zeros((64, 5), dtype=np.int64), vae)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_decoded_on_the_command_line(
    here: Path, vae: EarVAE, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(small_model), "--quiet"]
    expected = vae.decode(LATENTS).T.numpy()
    (here / "folder").mkdir()
    npy(here / "folder" / "a.npy", LATENTS.T)
    npz(here / "folder" / "b.npz", LATENTS.T)
    tensor(here / "c.pt", LATENTS[None])
    safetensors(here / "d.safetensors", LATENTS)
    assert main(["decode", "folder", "out", "--time-first", *model]) == 0
    assert main(["decode", "c.pt", "out/c.wav", *model]) == 0
    assert main(["decode", "d.safetensors", "out/d.wav", *model]) == 0
    for name in "abcd":
        found, rate = soundfile.read(here / "out" / f"{name}.wav")
        assert rate == 44_100
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert capsys.readouterr().err == ""


def test_what_the_command_refuses(
    here: Path, vae: EarVAE, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(small_model)]
    npy(here / "z.npy", LATENTS)
    npy(here / "turned.npy", LATENTS.T)
    npy(here / "other.npy", torch.zeros(32, 5))
    save_latents(here / "marked.safetensors", Latents.from_mean(LATENTS, vae))
    for arguments, problem in (
        (["z.npy"], "z.npy: raw latents do not tell which model made them; name it with --model"),
        (["z.npy", *model, "--time-first"], "time first and channels last; leave out --time-first"),
        (
            ["turned.npy", *model],
            "turned.npy: its latents have time first and channels last; add --time-first",
        ),
        (["other.npy", *model], "other.npy: latents have shape [32, 5]; 'small' has [64, N]"),
        (["marked.safetensors", *model, "--time-first"], "is no raw latents, which --time-first is for"),
        ([str(small_model / "model.safetensors"), *model], "but not a latent file of ear-vae"),
    ):
        assert main(["decode", arguments[0], "out.wav", *arguments[1:]]) == 1
        assert problem in capsys.readouterr().err
    assert not (here / "out.wav").exists()
    # Of latents that tell their model, the default decodes only its own.
    assert main(["decode", "marked.safetensors", "out.wav"]) == 1
    assert "made by 'small'" in capsys.readouterr().err


def test_info_says_what_they_are(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for write, extension in FORMS.items():
        write(here / f"z{extension}", LATENTS.half())
        assert main(["info", f"z{extension}", "--json"]) == 0
        expected = "float32" if write is npy_of_another_byte_order else "float16"
        facts = {"kind": "raw latents", "shape": [64, 5], "dtype": expected}
        assert json.loads(capsys.readouterr().out) == facts
    with pytest.raises(SystemExit):
        main(["info", "z.npy", "--config", "ear_vae_44k"])
    assert "--config is for models; z.npy is a file" in capsys.readouterr().err
