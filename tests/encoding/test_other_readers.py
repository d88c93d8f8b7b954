"""Data sets of latents as other programs read them: their own classes, and no complaint from them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from ear_vae import EarVAE, EarVAEConfig
from ear_vae.dsp._torchaudio import functional
from ear_vae.encoding import encode_dataset

RATE, HOP = 44_100, 256
# webdataset does; they are collected before other tests come across them.
LEAVES_TARS_OPEN = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module")
def vae() -> EarVAE:
    torch.manual_seed(0)
    config = EarVAEConfig(
        channels=4, channel_multipliers=(1, 2, 2), strides=(4, 8, 8), latent_dim=8, transformer_depth=0
    )
    return EarVAE(config, name="test").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four of 2 to 5 seconds, in a manifest with prompts."""
    folder = tmp_path_factory.mktemp("songs.npy")
    random = np.random.default_rng(0)
    rows = ["path,prompt,key"]
    for number in range(4):
        name = f"song.npy.{number}.wav"
        soundfile.write(folder / name, 0.1 * random.standard_normal((RATE * (number + 2), 2)), RATE)
        rows.append(f"{name},a song,000{number}")
    (folder / "list.csv").write_text("\n".join(rows))
    return folder / "list.csv"


@pytest.fixture(scope="module")
def output(songs: Path, vae: EarVAE, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`output(format, ...)`: the folder of a data set."""
    made: dict[str, Path] = {}

    def make(format: str, **options: Any) -> Path:
        key = f"{format} {options}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("output") / "out"
            encode_dataset(songs, made[key], vae, format=format, files_per_shard=3, decoders=0, **options)  # type: ignore[arg-type]
        return made[key]

    return make


@pytest.fixture(scope="module")
def stable_audio() -> Any:
    functional()
    return pytest.importorskip("stable_audio_tools.data.dataset")


@pytest.mark.parametrize("options", [{}, {"crop_seconds": 1.5}, {"crop_seconds": 3.0, "pad_to": 520}])
@pytest.mark.parametrize("crop", [None, 100])
def test_stable_audio_tools_reads_the_folder(
    stable_audio: Any,
    options: dict[str, Any],
    crop: int | None,
    output: Callable[..., Path],
    vae: EarVAE,
    songs: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With their class, which replaces what it cannot load by something else and prints it."""
    folder = output("stable-audio", **options)
    config = stable_audio.LocalDatasetConfig(id="songs", path=str(folder))
    theirs = stable_audio.PreEncodedDataset([config], latent_crop_length=crop, random_crop=True)
    count = {None: 4, 1.5: 2 + 3 + 3 + 4, 3.0: 1 + 1 + 2 + 2}[options.get("crop_seconds")]
    assert len(theirs) == count
    for number in range(len(theirs)):
        latents, info = theirs[number]
        (mask,) = info["padding_mask"]
        assert latents.shape == (8, len(mask))
        assert crop is None or len(mask) <= crop
        assert info["prompt"] == "a song"
        if options.get("crop_seconds") is None and crop is None:
            audio, _ = soundfile.read(songs.parent / info["relpath"], dtype="float32", always_2d=True)
            exact = vae.encode(torch.from_numpy(audio.T)).mean
            torch.testing.assert_close(latents.float(), exact, rtol=2**-10, atol=1e-4)
            assert info["seconds_total"] * RATE == len(audio)
    assert "Couldn't" not in capsys.readouterr().out
    if options.get("pad_to"):
        assert {theirs[number][1]["padding_mask"][0].shape[0] for number in range(count)} == {crop or 520}


@LEAVES_TARS_OPEN
@pytest.mark.parametrize("crop", [None, 100])
def test_stable_audio_tools_reads_the_tars(
    stable_audio: Any, crop: int | None, output: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = output("webdataset", crop_seconds=1.0)
    config = stable_audio.LocalWebDatasetConfig(id="songs", path=str(folder))
    loader = stable_audio.WebDatasetDataLoader(
        [config],
        batch_size=1,
        sample_size=None,
        num_workers=0,
        pre_encoded=True,
        latent_crop_length=crop,
        resampled_shards=False,
    )
    batches = list(loader.dataset)
    # Of 2, 3, 4 and 5 seconds in crops of 172 frames, .9985 s: what is left at the end is an item too.
    starts = [info["seconds_start"] for _, (info,) in batches]
    assert len(batches) == 3 + 4 + 5 + 6
    assert sorted(starts) == sorted(
        int(number * 172 * HOP / RATE) for n in (2, 3, 4, 5) for number in range(n + 1)
    )
    for latents, (info,) in batches:
        assert latents.shape[:2] == (1, 8)
        assert info["prompt"] == "a song"
    assert "Couldn't" not in capsys.readouterr().out
    gc.collect()


@LEAVES_TARS_OPEN
def test_webdataset_and_datasets_read_the_tars(output: Callable[..., Path], tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    datasets = pytest.importorskip("datasets")
    folder = output("webdataset")
    tars = sorted(map(str, folder.glob("*.tar")))
    assert len(tars) == 2
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    theirs = datasets.load_dataset("webdataset", data_files=tars, split="train", cache_dir=str(tmp_path))
    rows = list(theirs.with_format("numpy"))
    assert len(samples) == len(rows) == 4
    for number, (sample, row) in enumerate(zip(samples, rows, strict=True)):
        assert sample["json"]["key"] == row["json"]["key"] == f"000{number}"
        assert sample["npy"].dtype == np.float16
        np.testing.assert_array_equal(sample["npy"], row["npy"])
        np.testing.assert_array_equal(sample["std.npy"], row["std.npy"])
        assert sample["npy"].shape == (8, -(-RATE * (number + 2) // HOP))
    gc.collect()


def test_all_formats_decode_to_the_same_audio(output: Callable[..., Path], vae: EarVAE) -> None:
    from ear_vae.encoding import open_latents

    decoded = []
    for format in ("webdataset", "stable-audio", "safetensors"):
        items = open_latents(output(format))
        decoded.append([vae.decode(item.posterior().mode()) for item in items])
    for one, *others in zip(*decoded, strict=True):
        assert all(torch.equal(one, other) for other in others)
