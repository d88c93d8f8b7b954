"""What is read of a data set of latents, in each format, and what is said of one that is damaged."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ear_vae import EarVAEError
from ear_vae.encoding import LatentFolder, open_latents

FORMATS = ("webdataset", "stable-audio", "safetensors")
Writer = Callable[..., Path]


@pytest.fixture
def items() -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    made: list[dict[str, Any]] = []
    for frames in (40, 7, 30, 12, 25):
        mean, std = generator.standard_normal((2, 8, frames)).astype(np.float16)
        made.append({"mean": mean, "std": np.abs(std)})
    made[0]["columns"] = {"prompt": "a song, with commas", "id": "0003", "bpm": 120, "tags": ["a", None]}
    made[1]["renamed"] = {"path": 3, "seconds_start": "soon"}
    made[2] |= {"frames": 20, "start": 3 * 44_100 + 11_025, "seconds": 60.5}
    return made


@pytest.mark.parametrize("format", FORMATS)
def test_everything_comes_back(
    tmp_path: Path, write_latents: Writer, items: list[dict[str, Any]], format: str
) -> None:
    latents = open_latents(write_latents(tmp_path / "latents", format, items))
    assert len(latents) == 5
    facts = (latents.sample_rate, latents.downsampling_ratio, latents.latent_dim, latents.weights_sha256)
    assert facts == (44_100, 1024, 8, "0" * 64)
    assert latents.latent_rate == pytest.approx(43.0664, abs=1e-4)
    for item, written in zip(latents, items, strict=True):
        frames = written.get("frames", written["mean"].shape[1])
        assert item.num_frames == frames
        posterior = item.posterior()
        assert posterior.mean.dtype == posterior.std.dtype == torch.float32
        assert np.array_equal(posterior.mean, written["mean"][:, :frames])
        assert np.array_equal(posterior.std, written["std"][:, :frames])
        part = item.posterior(2, 4)
        assert np.array_equal(part.mean, written["mean"][:, 2:6])
        assert np.array_equal(part.std, written["std"][:, 2:6])
    first, third = latents[0], latents[-3]
    assert first.metadata == items[0]["columns"] | {"path": "/music/0000.wav", "relpath": "0000.wav"}
    assert latents[1].metadata == {"path": 3, "seconds_start": "soon", "relpath": "0001.wav"}
    assert (first.key, third.key) == ("0000", "0002")
    assert (third.seconds_start, third.seconds_total) == (3.25, 60.5)
    assert [item.key for item in latents[1:3]] == ["0001", "0002"]
    with pytest.raises(IndexError):
        latents[5]
    for start, frames in ((0, 21), (20, 1), (-1, 2), (3, 0)):
        with pytest.raises(EarVAEError, match="has 20 frames; "):
            third.posterior(start, frames)


@pytest.mark.parametrize("format", FORMATS)
def test_silence_is_the_middle_of_the_folders(
    tmp_path: Path, write_latents: Writer, items: list[dict[str, Any]], format: str
) -> None:
    folder = write_latents(tmp_path / "latents", format, items)
    assert open_latents(folder).silence() is None
    silence = np.arange(8 * 21, dtype=np.float16).reshape(1, 8, 21)
    np.save(folder / "silence.npy", silence)
    found = open_latents(folder).silence()
    assert found is not None
    assert np.array_equal(found, silence[0, :, 10:11])
    np.save(folder / "silence.npy", silence[0])
    with pytest.raises(EarVAEError, match=r"silence\.npy: has the shape \[8, 21\], expected \[1, 8, M\]"):
        open_latents(folder).silence()


def test_what_else_is_in_a_tar_does_not_count(
    tmp_path: Path, write_latents: Writer, items: list[dict[str, Any]]
) -> None:
    """Read-me files, an item without a standard deviation, a folder, a link with the name of a member."""
    folder = write_latents(tmp_path / "latents", "webdataset", items)
    (folder / "readme.txt").write_text("stray")
    with tarfile.open(folder / "000000.tar", "a") as tar:
        for name in ("README", "0000.txt", "lonely.npy", "lonely.json"):
            tar.add(folder / "readme.txt", name)
        tar.addfile(tarfile.TarInfo("x.npy"))
        link = tarfile.TarInfo("y.npy")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert [item.key for item in open_latents(folder)] == ["0000", "0001", "0002", "0003", "0004"]


def truncate_tar(folder: Path) -> None:
    path = folder / "000001.tar"
    path.write_bytes(path.read_bytes()[:1500])


def receipt_of_more(folder: Path) -> None:
    (folder / "receipts").mkdir()
    (folder / "receipts" / "000001.json").write_text('{"items": 3}')


def receipt_of_nothing(folder: Path) -> None:
    (folder / "receipts").mkdir()
    (folder / "receipts" / "000001.json").write_text("{}")


def cut(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-2])

    return damage


def replace(name: str, array: np.ndarray, **options: Any) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / name, array, **options)


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    """Changes what an item says of itself."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        values["ear_vae"] |= changes
        (folder / name).write_text(json.dumps(values))

    return damage


def rewrite(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def foreign(folder: Path) -> None:
    save_file({"mean": torch.zeros(8, 3)}, folder / "album" / "0003.safetensors")


def without_std(folder: Path) -> None:
    from safetensors import safe_open

    path = folder / "album" / "0003.safetensors"
    with safe_open(path, framework="pt") as file:
        mean, metadata = file.get_tensor("mean"), file.metadata()
    save_file({"mean": mean}, path, metadata)


@pytest.mark.parametrize(
    ("format", "damage", "message"),
    [
        ("webdataset", truncate_tar, r"000001\.tar: cannot be read: unexpected end of data; run"),
        ("webdataset", receipt_of_more, r"000001\.tar: holds 2 items, its receipt says 3; run"),
        ("webdataset", receipt_of_nothing, r"000001\.json: does not say how many items"),
        ("stable-audio", cut("album/0003.npy"), r"0003\.npy: cannot be read: it is truncated"),
        ("stable-audio", cut("album/0003.json"), r"0003\.json: cannot be read: "),
        ("stable-audio", remove("album/0003.std.npy"), r"0003\.npy: cannot be read: No such file"),
        ("stable-audio", remove("album/0003.json"), r"0003\.npy: cannot be read: No such file"),
        ("stable-audio", replace("album/0003.npy", np.zeros((8, 11))), "its mean is not 8 channels of 12"),
        ("stable-audio", replace("album/0003.npy", np.zeros(8)), r"an array of float64 \[8\]"),
        ("stable-audio", replace("album/0003.npy", np.zeros((8, 12), int)), r"an array of int64 \[8, 12\]"),
        ("stable-audio", replace("album/0003.npy", np.full((8, 12), np.nan)), "its mean holds NaN"),
        (
            "stable-audio",
            replace("album/0003.npy", np.array([[None]]), allow_pickle=True),
            r"an array of object \[1, 1\]",
        ),
        ("stable-audio", edit("album/0003.json", num_frames="12"), "damaged: its num_frames is '12'"),
        ("stable-audio", edit("album/0003.json", columns=[1]), r"damaged: its columns is \[1\]"),
        ("stable-audio", edit("album/0003.json", key=3), "damaged: its key is 3"),
        ("stable-audio", edit("album/0003.json", source_sample_rate=0), "source_sample_rate must be 1000"),
        (
            "stable-audio",
            edit("album/0003.json", weights_sha256="1" * 64),
            "made by another model than the first item: its weights_sha256 is '1111",
        ),
        ("stable-audio", rewrite("album/0003.json", "[]"), "damaged: expected an object"),
        ("stable-audio", rewrite("album/0003.json", "{}"), "was not written by ear-vae encode-dataset"),
        ("stable-audio", rewrite("filelist.txt", "album/0000.npy\n../other.npy\n"), "'../other.npy' is no"),
        ("stable-audio", rewrite("filelist.txt", ""), "holds no latents"),
        ("safetensors", cut("album/0003.safetensors"), r"0003\.safetensors: cannot be read"),
        ("safetensors", foreign, "was not written by ear-vae encode-dataset"),
        ("safetensors", without_std, r"0003\.safetensors: cannot be read"),
    ],
)
def test_damage_is_named(
    tmp_path: Path,
    write_latents: Writer,
    items: list[dict[str, Any]],
    format: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    """The fourth item is damaged, and nothing else is."""
    folder = write_latents(tmp_path / "latents", format, items)
    damage(folder)

    def read() -> LatentFolder:
        latents = open_latents(folder)
        latents[3].posterior()
        return latents

    with pytest.raises(EarVAEError, match=message):
        read()


def test_the_first_line_of_a_plan_may_be_its_only_one(
    tmp_path: Path, write_latents: Writer, items: list[dict[str, Any]]
) -> None:
    """And a plan whose last line is longer than what is read at once is read to its end."""
    folder = write_latents(tmp_path / "latents", "safetensors", items)
    header = json.dumps({"format": "safetensors"})
    (folder / "plan.jsonl").write_text(f"{header}\n")
    assert len(open_latents(folder)) == 5
    long = json.dumps({"shard": 1, "prompt": "a" * 200_000})
    (folder / "plan.jsonl").write_text(f'{header}\n{{"shard": 0}}\n{long}\n')
    with pytest.raises(EarVAEError, match="2 of 2 shards are not finished"):
        open_latents(folder)
    (folder / "plan.jsonl").write_text(f"{header}\n{long[:-5]}")
    with pytest.raises(EarVAEError, match=r"plan\.jsonl: cannot be read"):
        open_latents(folder)


def test_tars_alone_are_enough(tmp_path: Path, write_latents: Writer, items: list[dict[str, Any]]) -> None:
    folder = write_latents(tmp_path / "latents", "webdataset", items)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(folder / "000001.tar", tmp_path / "elsewhere" / "music-a.tar")
    assert [item.key for item in open_latents(tmp_path / "elsewhere")] == ["0002", "0003"]
