"""Data sets of latents, from audio to the files, against the model itself and through every interruption."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from ear_vae import EarVAE, EarVAEConfig, EarVAEError
from ear_vae.audio import read_audio
from ear_vae.cli import main
from ear_vae.encoding import EncodingProgress, encode_dataset, open_latents
from ear_vae.encoding.sources import AudioEntry, estimated_seconds
from ear_vae.latents import load_latents
from ear_vae.network.blocks import Snake

FORMATS = ("webdataset", "stable-audio", "safetensors")
RATE, HOP = 44_100, 256


@pytest.fixture(scope="module")
def vae() -> EarVAE:
    torch.manual_seed(0)
    config = EarVAEConfig(
        channels=4, channel_multipliers=(1, 2, 2), strides=(4, 8, 8), latent_dim=8, transformer_depth=0
    )
    return EarVAE(config, name="test").eval().requires_grad_(False)


def music(seconds: float, seed: int, channels: int = 2) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal((round(seconds * RATE), channels))


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven recordings and two that are none: formats, lengths, rates, names that are trouble."""
    folder = tmp_path_factory.mktemp("songs")
    (folder / "album.npy").mkdir()
    soundfile.write(folder / "b.wav", music(3.1, 1), RATE)
    soundfile.write(folder / "b.flac", music(0.7, 2), 48_000)
    soundfile.write(folder / "album.npy" / "x.std.flac", music(1.3, 3, channels=1), 22_050)
    soundfile.write(folder / "album.npy" / "x.npy.ogg", music(0.9, 4), RATE)
    soundfile.write(folder / "short.wav", music(0.001, 5), RATE)
    soundfile.write(folder / "silence.wav", np.zeros((9_000, 2)), RATE)
    soundfile.write(folder / "z.wav", music(8.0, 6), RATE)
    (folder / "broken.wav").write_bytes(b"RIFF and nothing else")
    (folder / "empty.flac").write_bytes(b"")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


Item = tuple[np.ndarray, np.ndarray, dict[str, Any]]


def items(folder: Path) -> dict[tuple[str, int], Item]:
    """Mean, std and JSON of every item by its path and first sample, read by hand."""
    found: list[Item] = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in members:
            if name.endswith(".json"):
                key = name.removesuffix(".json")
                arrays = [np.load(io.BytesIO(members[f"{key}.{ending}"])) for ending in ("npy", "std.npy")]
                found.append((arrays[0], arrays[1], json.loads(members[name])))
                assert found[-1][2]["ear_vae"]["key"] == key
    for name in (folder / "filelist.txt").read_text().split() if (folder / "filelist.txt").exists() else []:
        stem = str(folder / name).removesuffix(".npy")
        values = json.loads(Path(f"{stem}.json").read_text())
        found.append((np.load(f"{stem}.npy"), np.load(f"{stem}.std.npy"), values))
    for path in sorted(folder.rglob("*.safetensors")):
        latents = load_latents(path)
        assert latents.std is not None
        assert latents.metadata is not None
        found.append((latents.mean.numpy(), latents.std.numpy(), dict(latents.metadata)))
    by_place = {
        (values["relpath"], values["ear_vae"]["start_sample"]): (m, s, values) for m, s, values in found
    }
    assert len(by_place) == len(found)
    return by_place


def failures(folder: Path) -> dict[str, str]:
    lines = (folder / "failures.jsonl").read_text().splitlines()
    return {values["path"]: values["reason"] for values in map(json.loads, lines)}


@pytest.fixture(scope="module")
def undisturbed(songs: Path, vae: EarVAE, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The songs in each format, in shards of two."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for format in FORMATS:
        encode_dataset(songs, folder / format, vae, format=format, files_per_shard=2, decoders=0)
    return {format: folder / format for format in FORMATS}


@pytest.mark.parametrize("format", FORMATS)
def test_latents_are_the_models(format: str, undisturbed: dict[str, Path], songs: Path, vae: EarVAE) -> None:
    found = items(undisturbed[format])
    audio_files = {path.relative_to(songs).as_posix() for path in songs.rglob("*") if path.is_file()}
    assert {path for path, _ in found} == audio_files - {"broken.wav", "empty.flac"}
    for (name, _), (mean, std, values) in found.items():
        audio, rate = read_audio(songs / name)
        posterior = vae.encode(audio, rate)
        for stored, exact in ((mean, posterior.mean), (std, posterior.std)):
            assert stored.dtype == np.float16
            # A step of float16, and the rounding of the model itself.
            np.testing.assert_allclose(stored, exact.numpy(), rtol=2**-10, atol=1e-4)
        own = values["ear_vae"]
        num_samples = math.ceil(audio.shape[1] * RATE / rate)
        assert (own["num_samples"], own["num_frames"]) == (num_samples, math.ceil(num_samples / HOP))
        assert values["padding_mask"] == [1] * mean.shape[1]
        assert (values["seconds_start"], values["seconds_total"]) == (0, math.ceil(audio.shape[1] / rate))
        assert values["timestamps"] == [0.0, pytest.approx(num_samples / RATE)]
        assert (own["source_sample_rate"], own["source_num_samples"]) == (rate, audio.shape[1])
        assert own["weights_sha256"] == vae.weights_sha256
        assert (own["model"], own["downsampling_ratio"], values["sample_rate"]) == ("test", HOP, RATE)


@pytest.mark.parametrize(
    ("format", "extension"), [("safetensors", ".safetensors"), ("stable-audio", ".json")]
)
def test_of_a_data_set_the_items_alone_are_decoded(
    undisturbed: dict[str, Path], vae: EarVAE, tmp_path: Path, format: str, extension: str
) -> None:
    """Not the silence and the standard deviations beside them, which are arrays of the same form."""
    folder = undisturbed[format]
    vae.save_pretrained(tmp_path / "model")
    command = ["decode", str(folder), str(tmp_path / "out"), "--model", str(tmp_path / "model")]
    assert main(command) == 0
    rebuilt = {path.relative_to(tmp_path / "out").with_suffix("") for path in tmp_path.rglob("*.wav")}
    assert (folder / "silence.npy").is_file()
    assert rebuilt == {
        path.relative_to(folder).with_suffix("")
        for path in folder.rglob(f"*{extension}")
        if "receipts" not in path.parts
    }


def test_all_formats_hold_the_same(undisturbed: dict[str, Path]) -> None:
    one, two, three = (items(undisturbed[format]) for format in FORMATS)
    assert one.keys() == two.keys() == three.keys()
    for place, (mean, std, values) in one.items():
        for other in (two, three):
            assert np.array_equal(mean, other[place][0])
            assert np.array_equal(std, other[place][1])
            assert {**values, "ear_vae": None} == {**other[place][2], "ear_vae": None}


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_but_audio_and_settings_decides_on_the_bytes(
    format: str, undisturbed: dict[str, Path], songs: Path, vae: EarVAE, tmp_path: Path
) -> None:
    """Another day, another place, other neighbours in the folder of the process."""
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(songs, copy)
    os.utime(copy / "b.wav", (1, 1))
    encode_dataset(copy, tmp_path / "out", vae, format=format, files_per_shard=2, decoders=0)
    assert tree(tmp_path / "out") == tree(undisturbed[format])
    everything = b"".join(tree(tmp_path / "out").values())
    assert str(tmp_path).encode() not in everything
    assert os.uname().nodename.encode() not in everything


def test_a_file_is_the_same_whichever_stood_beside_it(
    undisturbed: dict[str, Path], songs: Path, vae: EarVAE, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(songs / "z.wav", alone)
    encode_dataset(alone, tmp_path / "out", vae, decoders=0)
    ((mean, std, _),) = items(tmp_path / "out").values()
    expected = items(undisturbed["webdataset"])["z.wav", 0]
    assert mean.tobytes() == expected[0].tobytes()
    assert std.tobytes() == expected[1].tobytes()


class _Interruption(BaseException):
    """As Ctrl-C, which is no Exception."""


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("after", [1, 2, 5])
def test_interrupted_and_run_again(
    format: str, after: int, undisturbed: dict[str, Path], songs: Path, vae: EarVAE, tmp_path: Path
) -> None:
    def interrupt(progress: EncodingProgress) -> None:
        if progress.num_files >= after:
            raise _Interruption

    options: dict[str, Any] = {"format": format, "files_per_shard": 2, "decoders": 0}
    with pytest.raises(_Interruption):
        encode_dataset(songs, tmp_path / "out", vae, progress=interrupt, **options)
    seen: list[EncodingProgress] = []
    result = encode_dataset(songs, tmp_path / "out", vae, progress=seen.append, **options)
    # What was interrupted at its second file was not in place yet.
    reused = (after - 1) // 2
    assert result.num_reused == reused
    assert [progress.num_files for progress in seen] == list(range(reused * 2 + 1, 10))
    assert (result.num_files, result.num_items, result.num_failures) == (9, 7, 2)
    assert tree(tmp_path / "out") == tree(undisturbed[format])


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_lost_is_made_again(
    format: str, undisturbed: dict[str, Path], songs: Path, vae: EarVAE, tmp_path: Path
) -> None:
    """After a loss of power: a receipt that is empty, an output that is cut, one that is gone."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed[format], out)
    (out / "receipts" / "000001.json").write_bytes(b"")
    made = json.loads((out / "receipts" / "000003.json").read_text())["files"]
    os.truncate(out / next(iter(made)), 10)
    made = json.loads((out / "receipts" / "000004.json").read_text())["files"]
    (out / next(iter(made))).unlink()
    (out / "failures.jsonl").unlink()
    result = encode_dataset(songs, out, vae, format=format, files_per_shard=2, decoders=0)
    assert result.num_reused == 2
    assert tree(out) == tree(undisturbed[format])


@pytest.mark.parametrize("limit", [500, 30_000, 66_000])
@pytest.mark.parametrize("format", FORMATS)
def test_a_disk_that_fills(format: str, limit: int, vae: EarVAE, tmp_path: Path) -> None:
    """At the plan, at the silence, at a shard; a file that may not grow stands for a full disk."""
    resource, signal = pytest.importorskip("resource"), pytest.importorskip("signal")
    source, out = tmp_path / "songs", tmp_path / "out"
    source.mkdir()
    for number, seconds in enumerate((1, 30, 1)):
        soundfile.write(source / f"{number}.wav", music(seconds, number), RATE)
    options: dict[str, Any] = {"format": format, "files_per_shard": 1, "decoders": 0}
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(EarVAEError, match=r"out: could not be written: File too large"):
            encode_dataset(source, out, vae, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    reused = encode_dataset(source, out, vae, **options).num_reused
    assert reused == (1 if limit == 66_000 else 0)
    encode_dataset(source, tmp_path / "fresh", vae, **options)
    assert tree(out) == tree(tmp_path / "fresh")


def test_names_of_files(undisturbed: dict[str, Path]) -> None:
    """No .npy in a folder's name, nothing over anything else, silence and std kept out of the list."""
    out = undisturbed["stable-audio"]
    listed = (out / "filelist.txt").read_text().split()
    assert listed == [
        "album_npy/x_npy.npy",
        "album_npy/x_std.npy",
        "b.npy",
        "b_wav.npy",
        "short.npy",
        "silence_wav.npy",
        "z.npy",
    ]
    arrays = {path.relative_to(out).as_posix() for path in out.rglob("*.npy")}
    std = {name.replace(".npy", ".std.npy") for name in listed}
    assert arrays == {*listed, *std, "silence.npy"}
    silence = np.load(out / "silence.npy")
    assert silence.shape[:2] == (1, 8)
    assert silence.shape[2] >= 4096


def test_receipts_carry_statistics(undisturbed: dict[str, Path]) -> None:
    from ear_vae.encoding import LatentStatistics

    for out in undisturbed.values():
        merged = LatentStatistics(8)
        for path in (out / "receipts").iterdir():
            merged.merge(LatentStatistics.from_dict(json.loads(path.read_text())["statistics"]))
        whole = np.concatenate([mean for mean, _, _ in items(out).values()], axis=1).astype(np.float64)
        assert merged.count == whole.shape[1]
        np.testing.assert_allclose(merged.mean, whole.mean(axis=1), rtol=1e-9)
        np.testing.assert_allclose(merged.covariance, np.cov(whole, bias=True), rtol=1e-9, atol=1e-12)


def test_crops(songs: Path, undisturbed: dict[str, Path], vae: EarVAE, tmp_path: Path) -> None:
    """Parts of the whole's latents, each with its own place in time."""
    result = encode_dataset(
        songs, tmp_path / "out", vae, crop_seconds=2.5, hop_seconds=1.25, decoders=0, dtype="float32"
    )
    found = items(tmp_path / "out")
    crop, hop = round(2.5 * RATE / HOP), round(1.25 * RATE / HOP)
    whole = items(undisturbed["webdataset"])
    starts = [start for path, start in found if path == "z.wav"]
    # 8 s: the last one reaches the end.
    assert starts == [number * hop * HOP for number in range(6)]
    assert [start for path, start in found if path == "b.wav"] == [0, hop * HOP]
    assert result.num_items == len(found) == 6 + 2 + 2 + 4
    for (path, start), (mean, std, values) in found.items():
        first = start // HOP
        expected = whole[path, 0]
        assert mean.dtype == np.float32
        assert mean.shape[1] == min(crop, expected[0].shape[1] - first) == std.shape[1]
        np.testing.assert_allclose(mean, expected[0][:, first : first + crop], rtol=2**-10, atol=1e-6)
        seconds = expected[2]["ear_vae"]["num_samples"] / RATE
        assert values["seconds_start"] == math.floor(start / RATE)
        assert values["seconds_total"] == math.ceil(seconds)
        assert values["timestamps"] == pytest.approx(
            [start / RATE, min(seconds, (start + crop * HOP) / RATE)]
        )


@pytest.mark.parametrize("format", ["webdataset", "stable-audio"])
def test_short_items_are_padded_with_silence(format: str, songs: Path, vae: EarVAE, tmp_path: Path) -> None:
    encode_dataset(
        songs, tmp_path / "out", vae, format=format, crop_seconds=2.5, pad_to=440, decoders=0, dtype="float32"
    )
    silence = vae.encode(torch.zeros(2, HOP * 200))
    for mean, std, values in items(tmp_path / "out").values():
        frames = values["ear_vae"]["num_frames"]
        assert mean.shape == std.shape == (8, 440)
        assert values["padding_mask"] == [1] * frames + [0] * (440 - frames)
        np.testing.assert_allclose(
            mean[:, frames:], silence.mean[:, 100:101].expand(-1, 440 - frames), atol=1e-5
        )
        np.testing.assert_allclose(
            std[:, frames:], silence.std[:, 100:101].expand(-1, 440 - frames), atol=1e-5
        )


def write_manifest(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, sorted({name for row in rows for name in row}))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_manifests_with_columns(kind: str, songs: Path, vae: EarVAE, tmp_path: Path) -> None:
    """Columns come through as they were, those that are called like ours too."""
    first = {
        "path": str(songs / "b.flac"),
        "key": "0003",
        "prompt": 'a "b", c\u2028',
        "sample_rate": "48k",
        "n": 1,
    }
    rows = [
        first,
        {"path": str(songs / "no.wav"), "key": "0004", "prompt": "gone", "sample_rate": "", "n": 2},
        first,
        {"path": str(songs / "b.wav"), "key": "007", "prompt": "é", "sample_rate": "x", "n": 3},
    ]
    manifest = write_manifest(tmp_path / f"list.{kind}", rows)
    result = encode_dataset(manifest, tmp_path / "out", vae, decoders=0)
    found = items(tmp_path / "out")
    (values,) = (values for (path, _), (_, _, values) in found.items() if path.endswith("b.flac"))
    assert (values["key"], values["prompt"]) == ("0003", 'a "b", c\u2028')
    assert values["n"] == ("1" if kind == "csv" else 1)
    assert values["sample_rate"] == RATE
    assert values["ear_vae"]["columns"] == {"sample_rate": "48k"}
    assert result.num_items == 2
    reasons = failures(tmp_path / "out")
    assert reasons.pop(str(songs / "no.wav")) == "no such file"
    ((where, reason),) = reasons.items()
    assert where.startswith(f"list.{kind}, line ")
    assert reason.startswith("says the same as line ")


def test_bad_rows_are_named_and_the_others_encoded(songs: Path, vae: EarVAE, tmp_path: Path) -> None:
    shutil.copy(songs / "b.flac", tmp_path)
    lines = ['{"path": "b.flac"}', "{", '{"file": "b.flac"}', "[1]", '{"path": "a\\u0000b"}', '{"path": "."}']
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    encode_dataset(tmp_path / "list.jsonl", tmp_path / "out", vae, decoders=0)
    assert [path for path, _ in items(tmp_path / "out")] == ["b.flac"]
    reasons = failures(tmp_path / "out")
    assert reasons.keys() == {".", *(f"list.jsonl, line {number}" for number in (2, 3, 4, 5))}
    assert "has no 'path'" in reasons["list.jsonl, line 3"]
    (tmp_path / "list.csv").write_text("path,title\nb.flac,a,b\nb.flac,c\n")
    encode_dataset(tmp_path / "list.csv", tmp_path / "out2", vae, decoders=0)
    assert len(items(tmp_path / "out2")) == 1
    assert "more fields" in failures(tmp_path / "out2")["list.csv, line 2"]


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def test_webdataset_tars(songs: Path, undisturbed: dict[str, Path], vae: EarVAE, tmp_path: Path) -> None:
    """Samples with their JSON and text; members that belong to none are named."""
    flac = (songs / "b.flac").read_bytes()
    (tmp_path / "in").mkdir()
    write_tar(
        tmp_path / "in" / "000.tar",
        {
            "0003.flac": flac,
            "0003.json": b'{"prompt": "a song", "tags": ["x"], "path": "mine"}',
            "0003.txt": "größer".encode(),
            "sub/0004.wav": b"broken",
            "README.md": b"hello",
            "0005.json": b"{}",
            "0006.json": b"{",
            "0006.flac": flac,
            "0006.wav": b"another",
        },
    )
    (tmp_path / "in" / "001.tar").write_bytes((tmp_path / "in" / "000.tar").read_bytes()[:1000])
    (tmp_path / "in" / "002.tar").write_bytes(b"no tar")
    encode_dataset(tmp_path / "in", tmp_path / "out", vae, decoders=0)
    found = items(tmp_path / "out")
    assert {path for path, _ in found} == {"000.tar/0003.flac", "000.tar/0006.flac"}
    mean, _, values = found["000.tar/0003.flac", 0]
    assert mean.tobytes() == items(undisturbed["webdataset"])["b.flac", 0][0].tobytes()
    assert values["__key__"] == "0003"
    assert (values["prompt"], values["tags"], values["txt"]) == ("a song", ["x"], "größer")
    assert values["ear_vae"]["columns"] == {"path": "mine"}
    reasons = failures(tmp_path / "out")
    assert reasons.keys() >= {
        "000.tar/sub/0004.wav",
        "000.tar/README",
        "000.tar/0005",
        "000.tar/0006.json",
        "000.tar/0006.wav",
        "001.tar/0003.flac",
        "002.tar",
    }
    assert reasons["001.tar/0003.flac"] == "truncated: the file that it is a part of ends before it does"
    assert reasons["000.tar/README"] == "a sample without audio"
    assert "encoded without it" in reasons["000.tar/0006.json"]


def test_several_sources(songs: Path, vae: EarVAE, tmp_path: Path) -> None:
    """Two folders of one name and a tar, told apart."""
    for name in ("one", "two"):
        (tmp_path / name / "set").mkdir(parents=True)
        shutil.copy(songs / "b.flac", tmp_path / name / "set" / "a.flac")
    write_tar(tmp_path / "t.tar", {"a.flac": (songs / "b.flac").read_bytes()})
    sources = [tmp_path / "one" / "set", tmp_path / "two" / "set", tmp_path / "t.tar"]
    encode_dataset(sources, tmp_path / "out", vae, format="stable-audio", decoders=0)
    assert {path for path, _ in items(tmp_path / "out")} == {
        "set/a.flac",
        "set-2/a.flac",
        "t.tar/t.tar/a.flac",
    }


def test_the_output_may_lie_in_the_source(songs: Path, vae: EarVAE, tmp_path: Path) -> None:
    shutil.copy(songs / "b.flac", tmp_path)
    for _ in range(2):
        result = encode_dataset(tmp_path, tmp_path / "out", vae, decoders=0)
        assert (result.num_files, result.num_failures) == (1, 0)


def changed_vae(vae: EarVAE) -> EarVAE:
    other = EarVAE(vae.config, name="test").eval().requires_grad_(False)
    return other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "safetensors"}, "format was 'webdataset', is 'safetensors'"),
        ({"dtype": "float32"}, "dtype was 'float16', is 'float32'"),
        ({"crop_seconds": 1.0}, "crop_frames was None, is 172"),
        ({"files_per_shard": 3}, "files_per_shard was 2, is 3"),
        ({"vae": changed_vae}, "weights_sha256 was '"),
    ],
)
def test_other_settings_are_named(
    change: dict[str, Any],
    message: str,
    songs: Path,
    undisturbed: dict[str, Path],
    vae: EarVAE,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed["webdataset"], out)
    options = {"vae": vae, "files_per_shard": 2, "decoders": 0, **change}
    if callable(options["vae"]) and not isinstance(options["vae"], EarVAE):
        options["vae"] = options["vae"](vae)
    with pytest.raises(EarVAEError) as caught:
        encode_dataset(songs, out, **options)
    assert "was begun with other settings" in str(caught.value)
    assert message in str(caught.value)
    assert tree(out) == tree(undisturbed["webdataset"])


def rewrite(path: Path) -> None:
    """Other content of the same size, with the time of before."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: rewrite(folder / "z.wav"), "changed: z.wav"),
        (lambda folder: soundfile.write(folder / "b.wav", music(1, 9), RATE), "changed: b.wav"),
        (lambda folder: (folder / "b.flac").unlink(), "gone: b.flac"),
        (lambda folder: shutil.copy(folder / "b.wav", folder / "new.wav"), "new: new.wav"),
        (
            lambda folder: (folder / "broken.wav").write_bytes(b"longer than before, and no audio"),
            "broken.wav",
        ),
    ],
)
def test_changed_sources_are_named(
    change: Callable[[Path], Any],
    message: str,
    songs: Path,
    undisturbed: dict[str, Path],
    vae: EarVAE,
    tmp_path: Path,
) -> None:
    source, out = tmp_path / "songs", tmp_path / "out"
    shutil.copytree(songs, source)
    encode_dataset(source, out, vae, files_per_shard=2, decoders=0)
    before = tree(out)
    time.sleep(0.02)  # a tick of the file system's clock
    change(source)
    with pytest.raises(EarVAEError, match=message):
        encode_dataset(source, out, vae, files_per_shard=2, decoders=0)
    assert tree(out) == before


def test_failed_files_that_were_put_right(songs: Path, vae: EarVAE, tmp_path: Path) -> None:
    source, out = tmp_path / "songs", tmp_path / "out"
    shutil.copytree(songs, source)
    options: dict[str, Any] = {"files_per_shard": 2, "decoders": 0}
    encode_dataset(source, out, vae, **options)
    shutil.copy(source / "b.wav", source / "broken.wav")
    with pytest.raises(EarVAEError, match=r"broken\.wav.*retry_failed=True"):
        encode_dataset(source, out, vae, **options)
    result = encode_dataset(source, out, vae, retry_failed=True, **options)
    # All but the one of broken.wav and empty.flac.
    assert (result.num_items, result.num_failures, result.num_reused) == (8, 1, 4)
    encode_dataset(source, tmp_path / "fresh", vae, **options)
    assert tree(out) == tree(tmp_path / "fresh")


def test_a_folder_of_something_else_is_left_alone(songs: Path, vae: EarVAE, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(EarVAEError, match=r"holds thesis.txt and no plan.jsonl"):
            encode_dataset(songs, out, vae, decoders=0, overwrite=overwrite)
    assert tree(out) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize("format", FORMATS)
def test_starting_again_removes_what_we_wrote_only(
    format: str, songs: Path, undisturbed: dict[str, Path], vae: EarVAE, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed[format], out)
    # As after a kill: in place, and without its receipt.
    (out / "receipts" / "000002.json").unlink()
    (out / "notes.txt").write_text("mine")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(songs / "z.wav", alone)
    encode_dataset(alone, out, vae, overwrite=True, decoders=0)
    (out / "notes.txt").unlink()
    encode_dataset(alone, tmp_path / "fresh", vae, decoders=0)
    assert tree(out) == tree(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "zip"}, "format must be one of webdataset, stable-audio, safetensors, got 'zip'"),
        ({"dtype": "bfloat16"}, "dtype must be float16 or float32"),
        ({"crop_seconds": 0}, "crop_seconds must be a number above 0"),
        ({"crop_seconds": 0.001}, "less than a latent frame"),
        ({"hop_seconds": 1.0}, "give crop_seconds as well"),
        ({"pad_to": 10, "format": "safetensors"}, "a latent file holds no padding"),
        ({"pad_to": 0}, "pad_to must be an integer of 1 or more"),
        ({"pad_to": 10, "crop_seconds": 1.0}, r"pad_to is 10 frames, less than the \d+ of a crop"),
        ({"files_per_shard": 0}, "files_per_shard must be an integer of 1 or more"),
        ({"workers": 0}, "workers must be an integer of 1 or more"),
        ({"engine": "spark"}, "engine must be local or ray"),
    ],
)
def test_arguments_that_are_refused(
    options: dict[str, Any], message: str, songs: Path, vae: EarVAE, tmp_path: Path
) -> None:
    with pytest.raises(EarVAEError, match=message):
        encode_dataset(songs, tmp_path / "out", vae, **options)
    assert not (tmp_path / "out").exists()


def test_an_output_that_stable_audio_tools_would_misread(songs: Path, vae: EarVAE, tmp_path: Path) -> None:
    with pytest.raises(EarVAEError, match=r"takes \.npy anywhere in a path for the extension"):
        encode_dataset(songs, tmp_path / "a.npy.b", vae, format="stable-audio")


def test_nothing_to_encode(vae: EarVAE, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "list.csv").write_text("path\n")
    (tmp_path / "song.wav").write_bytes(b"x")
    for source, message in (
        ("in", "holds nothing to encode"),
        ("list.csv", "holds nothing to encode"),
        ("no", "does not exist"),
        ("song.wav", "a single file is encoded with ear-vae encode"),
    ):
        with pytest.raises(EarVAEError, match=message):
            encode_dataset(tmp_path / source, tmp_path / "out", vae)
        assert not (tmp_path / "out").exists()


def test_latents_that_float16_cannot_hold(songs: Path, vae: EarVAE, tmp_path: Path) -> None:
    loud = EarVAE(vae.config).eval().requires_grad_(False)
    loud.encoder.conv_out.weight.data *= 1e8
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(songs / "b.flac", alone)
    encode_dataset(alone, tmp_path / "out", loud, decoders=0)
    assert failures(tmp_path / "out") == {
        "b.flac": "its latents are not finite in float16; store them in float32"
    }
    assert encode_dataset(alone, tmp_path / "out32", loud, dtype="float32", decoders=0).num_items == 1


def stand_in(calls: list[Any]) -> Callable[..., Any]:
    """In the place of what compiles a function: that itself, with another rounding."""

    def compile(function: Any) -> Any:
        def call(*given: Any) -> Any:
            calls.append(function)
            result = function(*given)
            exact = isinstance(result, tuple)
            return result if exact else result * (1 + 1e-6)

        return call

    return compile


def begun_with(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "plan.jsonl").read_text().splitlines()[0]))


def test_the_plan_says_whether_workers_compile(
    songs: Path, undisturbed: dict[str, Path], vae: EarVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("ear_vae.network.snake._compiled", stand_in(calls))
    out, options = tmp_path / "out", {"files_per_shard": 2, "decoders": 0}
    assert begun_with(undisturbed["webdataset"])["compiled"] is False
    encode_dataset(songs, tmp_path / "short", vae, **options)
    assert not calls
    assert tree(tmp_path / "short") == tree(undisturbed["webdataset"])

    def interrupt(progress: EncodingProgress) -> None:
        if progress.num_files == 4:
            raise KeyboardInterrupt

    # This model takes 28 million multiply-adds for a second of audio.
    monkeypatch.setattr("ear_vae.inference.compiling.WORTHWHILE_MULTIPLY_ADDS", 1e6)
    with pytest.raises(KeyboardInterrupt):
        encode_dataset(songs, out, vae, progress=interrupt, **options)
    assert calls
    assert not any(module.compiled for module in vae.modules() if isinstance(module, Snake))
    assert begun_with(out)["compiled"] is True
    # Whoever goes on does as the plan says, and not what would be decided now.
    monkeypatch.setattr("ear_vae.inference.compiling.WORTHWHILE_MULTIPLY_ADDS", 5e14)
    with pytest.raises(EarVAEError, match="begun with other settings: compiled was True, is False"):
        encode_dataset(songs, out, vae, optimize=False, **options)
    calls.clear()
    encode_dataset(songs, out, vae, **options)
    assert calls
    encode_dataset(songs, tmp_path / "asked", vae, optimize=True, **options)
    assert tree(out) == tree(tmp_path / "asked")
    for name in ("silence.npy", "failures.jsonl"):
        assert tree(out)[name] == tree(undisturbed["webdataset"])[name]
    assert tree(out)["000000.tar"] != tree(undisturbed["webdataset"])["000000.tar"]
    for place, (mean, std, _) in items(undisturbed["webdataset"]).items():
        for stored, other in zip((mean, std), items(out)[place][:2], strict=True):
            np.testing.assert_allclose(stored, other, rtol=2**-9, atol=1e-4)


def test_a_worker_that_cannot_compile_encodes_without(
    songs: Path, undisturbed: dict[str, Path], vae: EarVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("ear_vae.network.snake._compiled", lambda function: refuse)
    encode_dataset(songs, tmp_path / "out", vae, files_per_shard=2, decoders=0, optimize=True)
    found, expected = tree(tmp_path / "out"), tree(undisturbed["webdataset"])
    assert begun_with(tmp_path / "out")["compiled"] is True
    del found["plan.jsonl"], expected["plan.jsonl"]
    assert found == expected


def test_lengths_are_estimated_by_size_and_format() -> None:
    sizes = [("a/b.mp3", 4_000_000), ("c.OGG", 40_000), ("d.wav", 1_764_000), ("e.flac", None)]
    entries = [AudioEntry(path, 0, path, size) for path, size in sizes]
    assert estimated_seconds(entries) == pytest.approx(100 + 1 + 10 + 0)


def test_processes_give_the_same_bytes(
    undisturbed: dict[str, Path], songs: Path, vae: EarVAE, tmp_path: Path
) -> None:
    """Two that encode, which have one each that decodes."""
    result = encode_dataset(
        songs,
        tmp_path / "out",
        vae,
        files_per_shard=2,
        workers=2,
        threads=torch.get_num_threads(),
        decoders=1,
    )
    assert result.num_items == 7
    assert tree(tmp_path / "out") == tree(undisturbed["webdataset"])


def test_the_command(
    songs: Path, vae: EarVAE, tmp_path: Path, capsys: pytest.CaptureFixture[str], undisturbed: dict[str, Path]
) -> None:
    vae.save_pretrained(tmp_path / "test")
    arguments = ["encode-dataset", str(songs), str(tmp_path / "out"), "--model", str(tmp_path / "test")]
    arguments += ["--files-per-shard", "2", "--decoders", "0"]
    assert main([*arguments, "--progress"]) == 1
    said = capsys.readouterr().err
    assert "9/9 files, 15.4 s encoded" in said
    lines = said.replace("\r", "\n").splitlines()
    assert lines[-1].startswith(
        f"{tmp_path / 'out'}: 7 items of 9 files, 15.4 s of audio, 5 shards; 15.4 s encoded"
    )
    assert any(line.startswith("ear-vae: broken.wav: ") for line in lines)
    assert any(line.endswith("empty.flac: is empty (0 bytes)") for line in lines)
    assert tree(tmp_path / "out") == tree(undisturbed["webdataset"])
    assert main(arguments) == 1
    assert capsys.readouterr().err.endswith("5 shards; all was there already\n")
    assert main([*arguments, "--dtype", "float32"]) == 1
    assert "dtype was 'float16', is 'float32'" in capsys.readouterr().err
    assert main([*arguments, "--dtype", "float32", "--force", "--quiet"]) == 1
    assert all(mean.dtype == np.float32 for mean, _, _ in items(tmp_path / "out").values())
    with pytest.raises(SystemExit):
        main([*arguments, "--hop-seconds", "1"])


@pytest.mark.parametrize("format", FORMATS)
def test_a_copy_that_lost_a_file_is_not_read_as_if_it_were_whole(
    format: str, undisturbed: dict[str, Path], songs: Path, vae: EarVAE, tmp_path: Path
) -> None:
    copy = shutil.copytree(undisturbed[format], tmp_path / "copy")
    whole = len(open_latents(copy))
    ending = {"webdataset": ".tar", "stable-audio": ".npy", "safetensors": ".safetensors"}[format]
    files = (path for path in copy.rglob(f"*{ending}") if path.is_file() and ".std." not in path.name)
    lost = min(files)
    lost.unlink()
    if format == "stable-audio":  # whose list still names it
        with pytest.raises(EarVAEError, match=r"cannot be read: No such file"):
            list(open_latents(copy))
    else:
        with pytest.raises(EarVAEError, match=r"copy: \d of \d items are missing, whose files were"):
            open_latents(copy)
    encode_dataset(songs, copy, vae, format=format, files_per_shard=2, decoders=0)
    assert len(open_latents(copy)) == whole
    assert lost.exists()
