"""The latent file: what comes back, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ear_vae import EarVAEError
from ear_vae.latents import Latents, is_latent_file, load_latents, save_latents


def example(**changes: object) -> Latents:
    generator = torch.Generator().manual_seed(0)
    latents = Latents(
        mean=torch.randn(64, 10, generator=generator),
        std=torch.rand(64, 10, generator=generator),
        sample_rate=44_100,
        downsampling_ratio=1024,
        num_samples=9 * 1024 + 1,
        audio_channels=1,
        source_sample_rate=48_000,
        source_num_samples=10_032,
        model_name="a model",
        weights_sha256="0" * 64,
    )
    return dataclasses.replace(latents, **changes)  # type: ignore[arg-type]


def same(one: Latents, other: Latents) -> bool:
    plain = {field.name for field in dataclasses.fields(Latents)} - {"mean", "std"}
    tensors = torch.equal(one.mean, other.mean) and (
        one.std is other.std is None or torch.equal(one.std, other.std)  # type: ignore[arg-type]
    )
    return tensors and all(getattr(one, name) == getattr(other, name) for name in plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    for latents in (example(), example(std=None, sampled=True)):
        latents = dataclasses.replace(latents, mean=latents.mean.to(dtype))
        save_latents(tmp_path / "a.safetensors", latents, overwrite=True)
        assert same(load_latents(tmp_path / "a.safetensors"), latents)
        stream = io.BytesIO()
        save_latents(stream, latents)
        stream.seek(0)
        assert same(load_latents(stream), latents)


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    """A file that may not grow stands for the disk."""
    resource, signal = pytest.importorskip("resource"), pytest.importorskip("signal")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, before[1]))
    try:
        with pytest.raises(EarVAEError, match=r"a\.safetensors: could not be written: .*File too large"):
            save_latents(tmp_path / "a.safetensors", example())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("step", ["save", "load"])
def test_latents_are_not_copied_to_be_saved_or_loaded(tmp_path: Path, step: str) -> None:
    """An hour of them is 160 MB; here 128 MB."""
    script = f"""
import re
import torch
from ear_vae.latents import Latents, load_latents, save_latents

def peak_bytes():
    # The usage that getrusage reports begins with the memory of the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read()).group(1))

if {step!r} == "save":
    frames = 500_000
    latents = Latents(
        mean=torch.ones(64, frames), std=None, sample_rate=44_100, downsampling_ratio=256,
        num_samples=256 * frames, audio_channels=2, source_sample_rate=44_100,
        source_num_samples=256 * frames, model_name="a model", weights_sha256="0" * 64,
    )
    before = peak_bytes()
    save_latents("a.safetensors", latents)
else:
    load_latents("small.safetensors")
    before = peak_bytes()
    load_latents("a.safetensors")
print(peak_bytes() - before)
"""
    save_latents(tmp_path / "small.safetensors", example())
    if step == "load":
        long = example(mean=torch.ones(64, 500_000), std=None, num_samples=1024 * 500_000)
        save_latents(tmp_path / "a.safetensors", long)
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    copies = int(result.stdout) / (64 * 500_000 * 4)
    assert copies < (0.3 if step == "save" else 1.3)


def test_the_same_latents_saved_again_give_the_same_bytes(tmp_path: Path) -> None:
    latents = example()
    for number in range(10):
        save_latents(tmp_path / f"{number}", latents)
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}) == 1
    with safe_open(tmp_path / "0", framework="pt") as file:
        ((key, entry),) = file.metadata().items()
    assert key == "ear_vae"
    assert entry == json.dumps(json.loads(entry), sort_keys=True)
    assert json.loads(entry)["format_version"] == 1


def test_numbers_of_numpy_and_names_of_any_length(tmp_path: Path) -> None:
    latents = example(source_sample_rate=np.int64(48_000), model_name="a\nmodel \x1b[31m" + "x" * 500)
    save_latents(tmp_path / "a.safetensors", latents)
    loaded = load_latents(tmp_path / "a.safetensors")
    assert loaded.source_sample_rate == 48_000
    assert loaded.model_name == r"a\nmodel \x1b[31m" + "x" * 32 + "…" + "x" * 50


def test_facts() -> None:
    assert example().latent_rate == pytest.approx(43.066, abs=1e-3)
    assert example().duration_seconds == pytest.approx(9217 / 44_100)


def test_existing_files_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_latents(path, example())
    before = path.read_bytes()
    with pytest.raises(EarVAEError, match="exists already"):
        save_latents(path, example(std=None))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": torch.zeros(64)}, r"\[D, N\]"),
        ({"mean": torch.zeros(64, 10, dtype=torch.int32)}, "expected float32, float64"),
        ({"std": torch.zeros(64, 9)}, r"std must be \[64, 10\] as the mean is"),
        ({"num_samples": 1024}, "1024 samples at 1024 per frame are 1 frames, the file holds 10"),
        ({"audio_channels": 6}, "audio_channels is out of range: 6"),
        ({"sample_rate": 0}, "sample_rate must be 1000 to 768000 Hz, got 0"),
        ({"source_sample_rate": 10_000_019}, "source_sample_rate must be 1000 to 768000 Hz"),
        ({"source_sample_rate": 10**400}, "source_sample_rate must be 1000 to .*an integer of 1329 bits"),
        ({"downsampling_ratio": 2**40, "num_samples": 10 * 2**40}, "downsampling_ratio is out of range"),
        ({"num_samples": 10**400}, "num_samples is out of range: an integer of 1329 bits"),
        ({"source_num_samples": 10_034}, "10034 samples at 48000 Hz promised, 10033 there"),
        ({"weights_sha256": "f" * 63}, "weights_sha256 is no fingerprint"),
        ({"mean": torch.zeros(64, 10, dtype=torch.float8_e4m3fn)}, "expected float32, float64"),
        ({"mean": torch.full((64, 10), 1e39, dtype=torch.float64)}, "more than float32 does"),
        ({"mean": torch.full((64, 10), torch.nan)}, "mean holds NaN"),
        (
            {"mean": torch.zeros(64, 10).index_fill(0, torch.tensor(63), torch.inf)},
            "mean holds NaN or infinity",
        ),
        ({"std": torch.full((64, 10), -1.0)}, "std holds negative"),
    ],
)
def test_inconsistent_latents(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(EarVAEError, match=message):
        save_latents(tmp_path / "a.safetensors", example(**changes))
    assert not list(tmp_path.iterdir())


def test_bad_files(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_latents(good, example())
    tensors, data = load_file(good), good.read_bytes()
    (tmp_path / "zero").write_bytes(b"")
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    (tmp_path / "text").write_text("hello " * 100)
    save_file(tensors, tmp_path / "weights", metadata={"format": "pt"})
    with safe_open(good, framework="pt") as file:
        assert list(file.metadata()) == ["ear_vae"]
        facts = json.loads(file.metadata()["ear_vae"])

    def write(name: str, facts: object = facts, tensors: dict[str, torch.Tensor] = tensors) -> None:
        entry = facts if isinstance(facts, str) else json.dumps(facts)
        save_file(tensors, tmp_path / name, metadata={"ear_vae": entry})

    write("version", facts | {"format_version": 2})
    write("words", facts | {"sample_rate": "fast"})
    write("huge", facts | {"source_num_samples": 10**400})
    write("long", json.dumps(facts).replace("48000", "1" * 5000))
    write("deep", "[" * 100_000)
    write("list", [1])
    write("lacking", {k: v for k, v in facts.items() if k != "num_samples"})
    write("meanless", tensors={"std": tensors["std"]})
    write("inf", tensors={**tensors, "mean": tensors["mean"] * torch.inf})
    write("float8", tensors={"mean": tensors["mean"].to(torch.float8_e4m3fn)})
    expected = {
        "missing": "no such file",
        "": "is a folder",
        "zero": r"empty \(0 bytes\)",
        "cut": "truncated",
        "text": "not a readable latent file",
        "weights": "not a latent file of ear-vae",
        "version": "format version 2, this ear-vae reads 1",
        "words": "unreadable metadata",
        "huge": "source_num_samples is out of range: an integer of 1329 bits",
        "long": "a number of thousands of digits",
        "deep": "nested too deeply",
        "list": "expected an object",
        "float8": "expected float32, float64",
        "lacking": r"missing metadata \['num_samples'\]",
        "meanless": r"tensors \['std'\]",
        "inf": "NaN or infinity",
    }
    for name, message in expected.items():
        with pytest.raises(EarVAEError, match=message) as caught:
            load_latents(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(EarVAEError, match="truncated"):
        load_latents(io.BytesIO(data[:100]))
    assert is_latent_file(good)
    assert not is_latent_file(tmp_path / "weights")
    assert not is_latent_file(tmp_path / "text")
