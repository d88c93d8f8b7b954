"""Models as ONNX and as programs of torch.export, written by the command and run without the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from ear_vae import EarVAE, EarVAEConfig, EarVAEError
from ear_vae.dsp._torchaudio import functional

functional()
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from documentation import before_and_after, blocks  # noqa: E402

from ear_vae.integrations.onnx import EarVAEOnnx  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
HOP = 8
PARTS = ["convolutions.onnx", "decoder.onnx", "encoder.onnx", "transformer.onnx"]


def ear_vae(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ear_vae", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def random_model(folder: Path, seed: int = 0, **changes: object) -> EarVAE:
    values = {
        "channels": 4,
        "channel_multipliers": (1, 2),
        "strides": (2, 4),
        "latent_dim": 8,
        "transformer_depth": 1,
        "transformer_head_dim": 8,
        **changes,
    }
    torch.manual_seed(seed)
    vae = EarVAE(EarVAEConfig(**values), name=folder.name).eval().requires_grad_(False)  # type: ignore[arg-type]
    for name, parameter in vae.named_parameters():
        if "log_" in name:
            parameter.normal_(0, 0.3)
    vae.save_pretrained(folder)
    return vae


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    random_model(folder)
    return folder


@pytest.fixture(scope="module")
def vae(model: Path) -> EarVAE:
    return EarVAE.from_pretrained(model)


@pytest.fixture(scope="module")
def converted(model: Path) -> tuple[Path, str]:
    """The folder that the page's command wrote, and what it said."""
    folder = model.parent / "exported"
    program, *arguments = blocks("export.md", "sh")[0].split()
    assert program == "ear-vae"
    ran = ear_vae(*({"ear_vae_44k": model, "exported": folder}.get(word, word) for word in arguments))
    assert ran.returncode == 0, ran.stderr
    return folder, ran.stdout + ran.stderr


@pytest.fixture
def exported(converted: tuple[Path, str]) -> Path:
    return converted[0]


def session(path: Path) -> Callable[[Tensor], Tensor]:
    """A plain session, as a program without this package has it."""
    running = onnxruntime.InferenceSession(str(path))
    name = running.get_inputs()[0].name
    return lambda x: torch.from_numpy(running.run(None, {name: x.numpy()})[0])


def straight(vae: EarVAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of audio and audio of latents, by the plain modules."""
    with torch.no_grad():
        latents = x[:, :1, ::HOP].expand(-1, vae.latent_dim, -1)
        transformed = latents if vae.transformer is None else vae.transformer(latents)
        return vae.encoder(x), vae.decoder(transformed)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest value."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def noise(batch: int, frames: int) -> Tensor:
    return 0.3 * torch.randn(batch, 2, frames * HOP, generator=torch.Generator().manual_seed(frames))


def test_what_the_command_writes(converted: tuple[Path, str], vae: EarVAE) -> None:
    folder, said = converted
    assert sorted(path.name for path in folder.iterdir()) == [*PARTS, "weights.bin"]
    figure = said.split("differs from the model by ")[1].split(" of the largest value")[0]
    assert 0 < float(figure) < 1e-5
    assert "torchvision" not in said
    names = {
        "encoder": ("audio", "samples", "moments", "frames"),
        "decoder": ("latents", "frames", "audio", "samples"),
        "transformer": ("latents", "frames", "transformed", "frames"),
        "convolutions": ("latents", "frames", "audio", "samples"),
    }
    places: dict[str, set[tuple[int, int]]] = {}
    for part, expected in names.items():
        onnx.checker.check_model(str(folder / f"{part}.onnx"))
        graph = onnx.load(folder / f"{part}.onnx", load_external_data=False).graph
        (given,), (result,) = graph.input, graph.output
        found = []
        for value in (given, result):
            batch, _, length = value.type.tensor_type.shape.dim
            assert batch.dim_param == "batch"
            found += [value.name, length.dim_param]
        assert tuple(found) == expected
        external = [{e.key: e.value for e in t.external_data} for t in graph.initializer if t.external_data]
        assert {entry["location"] for entry in external} == {"weights.bin"}
        places[part] = {(int(entry["offset"]), int(entry["length"])) for entry in external}
    # The decoder's weights are there once, for the whole and for its halves.
    assert places["decoder"] == places["transformer"] | places["convolutions"]
    end = max(offset + length for used in places.values() for offset, length in used)
    assert (folder / "weights.bin").stat().st_size == end
    assert b"/site-packages/" not in (folder / "decoder.onnx").read_bytes()


def test_the_page(exported: Path, vae: EarVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exported.parent)
    audio = noise(1, 30)
    expected = vae.encode(audio)
    names: dict[str, Any] = {"audio": audio.numpy()}
    exec(before_and_after("export.md", 0)[1], names)
    assert_close(torch.from_numpy(names["mean"]), expected.mean)
    assert_close(torch.from_numpy(names["std"]), expected.std)
    assert_close(torch.from_numpy(names["rebuilt"]), vae.decode(expected.mean))
    names = {"audio": audio}
    exec(before_and_after("export.md", 1)[1], names)
    assert_close(names["rebuilt"], vae.decode(expected.mean))


@pytest.mark.parametrize(("batch", "frames"), [(1, 1), (1, 2), (2, 50), (3, 333)])
def test_plain_sessions_for_any_batch_and_length(
    batch: int, frames: int, exported: Path, vae: EarVAE
) -> None:
    x = noise(batch, frames)
    moments, audio = straight(vae, x)
    latents = x[:, :1, ::HOP].expand(-1, vae.latent_dim, -1).contiguous()
    assert_close(session(exported / "encoder.onnx")(x), moments)
    assert_close(session(exported / "decoder.onnx")(latents), audio)
    transformed = session(exported / "transformer.onnx")(latents)
    assert_close(session(exported / "convolutions.onnx")(transformed), audio)


def test_more_frames_than_the_feed_forward_takes_at_once(exported: Path, vae: EarVAE) -> None:
    x = noise(1, 8300)
    latents = x[:, :1, ::HOP].expand(-1, vae.latent_dim, -1).contiguous()
    moments, audio = straight(vae, x)
    assert_close(session(exported / "encoder.onnx")(x), moments)
    assert_close(session(exported / "decoder.onnx")(latents), audio)


@pytest.mark.slow
def test_a_wider_model_of_more_frames_and_a_batch(tmp_path: Path) -> None:
    vae = random_model(tmp_path / "model", channels=16, channel_multipliers=(1, 2, 2), strides=(2, 2, 2))
    ran = ear_vae("convert", tmp_path / "model", tmp_path / "onnx", "--to", "onnx")
    assert ran.returncode == 0, ran.stderr
    x = noise(3, 8300)
    moments, audio = straight(vae, x)
    latents = x[:, :1, ::HOP].expand(-1, vae.latent_dim, -1).contiguous()
    assert_close(session(tmp_path / "onnx/encoder.onnx")(x), moments)
    assert_close(session(tmp_path / "onnx/decoder.onnx")(latents), audio)
    tiled = EarVAEOnnx(tmp_path / "onnx", tile_frames=700)
    posterior = tiled.encode(x)
    assert_close(posterior.mean, moments[:, :8])
    assert_close(tiled.decode(latents), audio)


@pytest.mark.parametrize("tile_frames", [None, 1, 13])
def test_tiles_are_exact(tile_frames: int | None, exported: Path, vae: EarVAE) -> None:
    tiled = EarVAEOnnx(exported, tile_frames=tile_frames)
    x = noise(2, 60)
    whole = session(exported / "encoder.onnx")(x)
    posterior = tiled.encode(x)
    assert_close(posterior.mean, whole[:, :8])
    assert_close(posterior.std, softplus(whole[:, 8:]))
    latents = posterior.mode()
    assert_close(tiled.decode(latents), session(exported / "decoder.onnx")(latents.contiguous()))
    assert_close(tiled.decode(latents), vae.decode(latents))


def test_it_takes_what_the_model_takes(exported: Path, vae: EarVAE) -> None:
    running = EarVAEOnnx(exported)
    assert (running.config, running.name) == (vae.config, "small")
    assert running.weights_sha256 == vae.weights_sha256
    for name in ("sample_rate", "latent_rate", "latent_dim", "downsampling_ratio", "audio_channels"):
        assert getattr(running, name) == getattr(vae, name)
    mono = noise(1, 20)[0, :1, :-3].numpy().astype(np.float64)
    posterior, expected = running.encode(mono, 48_000), vae.encode(mono, 48_000)
    assert_close(posterior.mean, expected.mean)
    assert posterior.mean.dtype == torch.float32
    assert_close(running.decode(posterior.mean.half(), 101), vae.decode(expected.mean.half(), 101))
    with pytest.raises(EarVAEError, match=r"expected \[8, N\] or \[B, 8, N\]"):
        running.decode(torch.zeros(3, 7))
    with pytest.raises(EarVAEError, match="num_samples is 9; these latents decode to 1 to 8 samples"):
        running.decode(torch.zeros(8, 1), 9)
    with pytest.raises(EarVAEError, match="audio must be floating point"):
        running.encode(np.zeros((2, 9), dtype=np.int16))
    with pytest.raises(EarVAEError, match=r"has no WarpProvider here; it has .*CPUExecution"):
        EarVAEOnnx(exported, providers=["WarpProvider"])
    with pytest.raises(EarVAEError, match="tile_frames must be an integer of 1 or more, got 0"):
        EarVAEOnnx(exported, tile_frames=0)


def test_nothing_of_torchs_networks_is_made(exported: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from ear_vae.integrations.onnx import EarVAEOnnx\n"
        "def refuse(*_, **__): raise AssertionError('a network was built')\n"
        "torch.nn.Module.__init__ = refuse\n"
        f"running = EarVAEOnnx({str(exported)!r})\n"
        "print(*running.decode(running.encode(torch.randn(2, 100)).mean, 100).shape)\n"
        "print([name for name in ('onnx', 'onnxscript', 'ear_vae.vae') if name in sys.modules])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n")[:2] == ["2 100", "[]"]


def test_an_oobleck_with_weights_in_float16_computed_in_float32(tmp_path: Path) -> None:
    """Its decoder is one file, its standard deviation has the floor, and its weights are rounded."""
    vae = random_model(tmp_path / "model", transformer_depth=0, snakes_per_residual_unit=2, min_std=0.5)
    folder = tmp_path / "onnx"
    ran = ear_vae("convert", tmp_path / "model", folder, "--to", "onnx", "--dtype", "float16")
    assert ran.returncode == 0, ran.stderr
    assert not (folder / "convolutions.onnx").exists()
    rounded = EarVAE(vae.config).eval().requires_grad_(False)
    rounded.load_state_dict({name: value.half().float() for name, value in vae.state_dict().items()})
    running = EarVAEOnnx(folder, tile_frames=9)
    x = noise(1, 40)
    posterior, expected = running.encode(x), rounded.encode(x)
    assert_close(posterior.mean, expected.mean)
    assert_close(posterior.std, expected.std)
    assert float(posterior.std.min()) >= 0.5
    assert_close(running.decode(posterior.mean), rounded.decode(posterior.mean))
    graph = onnx.load(folder / "encoder.onnx", load_external_data=False).graph
    stored = [t for t in graph.initializer if t.external_data]
    assert stored
    assert {t.data_type for t in stored} == {onnx.TensorProto.FLOAT16}
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_programs_of_torch_export_run_without_the_package(model: Path, vae: EarVAE, tmp_path: Path) -> None:
    folder = tmp_path / "programs"
    ran = ear_vae("convert", model, folder, "--to", "torch-export")
    assert ran.returncode == 0, ran.stderr
    assert "differs from the model by" in ran.stderr + ran.stdout
    x = noise(1, 8300)
    moments, audio = straight(vae, x)
    torch.save({"x": x}, tmp_path / "x.pt")
    code = (
        "import sys, torch\n"
        f"x = torch.load({str(tmp_path / 'x.pt')!r})['x']\n"
        f"encoder = torch.export.load({str(folder / 'encoder.pt2')!r}).module()\n"
        f"decoder = torch.export.load({str(folder / 'decoder.pt2')!r}).module()\n"
        f"latents = x[:, :1, ::{HOP}].expand(-1, 8, -1)\n"
        "with torch.no_grad():\n"
        f"    torch.save([encoder(x), decoder(latents)], {str(tmp_path / 'y.pt')!r})\n"
        "assert 'ear_vae' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path)
    found_moments, found_audio = torch.load(tmp_path / "y.pt")
    assert_close(found_moments, moments)
    assert_close(found_audio, audio)


def copied(folder: Path, destination: Path) -> Path:
    return shutil.copytree(folder, destination)


def test_files_that_are_missing_damaged_or_of_others(exported: Path, vae: EarVAE, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path / "one")
    (folder / "convolutions.onnx").unlink()
    with pytest.raises(EarVAEError, match=r"convolutions\.onnx: the file is missing; ear-vae convert"):
        EarVAEOnnx(folder)

    folder = copied(exported, tmp_path / "two")
    whole = (folder / "encoder.onnx").read_bytes()
    (folder / "encoder.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EarVAEError, match=r"encoder\.onnx: onnxruntime cannot load it"):
        EarVAEOnnx(folder)

    folder = copied(exported, tmp_path / "three")
    (folder / "weights.bin").write_bytes(b"half a file")
    with pytest.raises(EarVAEError, match=r"encoder\.onnx: onnxruntime cannot load it"):
        EarVAEOnnx(folder)

    folder = copied(exported, tmp_path / "four")
    shutil.copy(folder / "decoder.onnx", folder / "encoder.onnx")
    with pytest.raises(EarVAEError, match=r"encoder\.onnx: is not the encoder of an εar-VAE"):
        EarVAEOnnx(folder)

    folder = copied(exported, tmp_path / "five")
    model = onnx.load(folder / "transformer.onnx", load_external_data=False)
    entry = model.metadata_props[0]
    entry.value = entry.value.replace(vae.weights_sha256, "f" * 64)
    (folder / "transformer.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EarVAEError, match=r"transformer\.onnx: is of 'small' with .*ffffff.*one export"):
        EarVAEOnnx(folder)
    entry.value = entry.value.replace('"format_version": 1', '"format_version": 2')
    (folder / "transformer.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EarVAEError, match=r"transformer\.onnx: is of version 2 of the format"):
        EarVAEOnnx(folder)
    entry.value = entry.value.replace('"format_version": 2', '"format_version": 1').replace("config", "x")
    (folder / "transformer.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EarVAEError, match=r"transformer\.onnx: its metadata are damaged: .*'config'"):
        EarVAEOnnx(folder)


@pytest.mark.parametrize("layout", ["onnx", "torch-export", "diffusers"])
def test_a_folder_that_is_taken_stays(layout: str, model: Path, tmp_path: Path) -> None:
    if layout == "diffusers":
        pytest.importorskip("diffusers")
    (tmp_path / "encoder.onnx").write_text("mine")
    ran = ear_vae("convert", model, tmp_path, "--to", layout)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "exists already; remove it, or overwrite it (--force)" in ran.stderr
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_what_the_command_refuses(model: Path, tmp_path: Path) -> None:
    ran = ear_vae("convert", model, tmp_path / "x", "--to", "onnx", "--dtype", "bfloat16")
    assert "--dtype bfloat16 is not for --to onnx; choose float32 or float16" in ran.stderr
    ran = ear_vae("convert", model, tmp_path / "x", "--to", "diffusers", "--dtype", "float16")
    assert "in the diffusers layout weights are always float32" in ran.stderr
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "onnxscript.py").write_text("raise ImportError('not here')\n")
    environment = {**os.environ, "PYTHONPATH": str(hidden)}
    command = [sys.executable, "-m", "ear_vae", "convert", str(model), str(tmp_path / "x"), "--to", "onnx"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 1
    assert 'needs onnx, onnxscript: pip install "ear-vae[onnx]" (not here)' in ran.stderr
    assert not (tmp_path / "x").exists()
