"""Crops of stored latents: which ones, from where, with which noise, and what they are padded with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ear_vae import EarVAEError
from ear_vae.encoding import LatentDataset, open_latents

FORMATS = ("webdataset", "stable-audio", "safetensors")
CROP = 16
Writer = Callable[..., Path]


def ramp(item: int, frames: int) -> np.ndarray:
    """Latents that say of which item and frame they are."""
    return np.stack([np.full(frames, item), np.arange(frames)]).astype(np.float32)


@pytest.fixture
def items() -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [
        {"mean": ramp(number, frames), "std": np.full((2, frames), 1e-3, np.float32)}
        for number, frames in enumerate((30, 16, 40, 5, 30))
    ]
    made[2]["frames"] = 20
    made[2]["mean"][:, 20:] = -1000
    made[4] |= {"start": 44_100, "seconds": 100.5, "columns": {"prompt": "drums", "id": "0003"}}
    return made


@pytest.fixture
def folder(tmp_path: Path, write_latents: Writer, items: list[dict[str, Any]]) -> Path:
    made = write_latents(tmp_path / "latents", "webdataset", items)
    np.save(made / "silence.npy", np.full((1, 2, 3), 7, np.float16))
    return made


def mean_crops(folder: Path, **settings: Any) -> LatentDataset:
    return LatentDataset(folder, crop_frames=CROP, sample=False, **settings)


def test_crops_are_where_they_say(folder: Path) -> None:
    """In the item, and in seconds of its source; what was only padding is never seen."""
    dataset = mean_crops(folder)
    starts: dict[int, Counter[int]] = {number: Counter() for number in range(5)}
    for index in range(750):
        crop = dataset[index]
        valid = int(crop["padding_mask"].sum())
        number, start = int(crop["latents"][0, 0]), int(crop["latents"][1, 0])
        assert crop["latents"].shape == (2, CROP)
        assert valid == (5 if number == 3 else CROP)
        assert crop["padding_mask"][:valid].all()
        assert torch.equal(crop["latents"][1, :valid], torch.arange(start, start + valid).float())
        assert (crop["latents"][:, valid:] == 7).all()
        offset, total = (1.0, 100.5) if number == 4 else (0.0, crop["seconds_total"])
        assert crop["seconds_start"] == pytest.approx(offset + start * 1024 / 44_100, abs=1e-9)
        assert crop["seconds_total"] == total
        starts[number][start] += 1
    assert starts[0].keys() == set(range(15))
    assert starts[1].keys() == starts[3].keys() == {0}
    assert starts[2].keys() == set(range(5))
    assert starts[4].keys() == set(range(15))
    # Items alike, and the places in them, too.
    assert all(counter.total() == 150 for counter in starts.values())
    assert max(starts[2].values()) < 2 * min(starts[2].values())


def test_user_columns_come_along(folder: Path) -> None:
    crops = {int(crop["latents"][0, 0]): crop for crop in mean_crops(folder)}
    places = {"path": "/music/0004.wav", "relpath": "0004.wav"}
    assert crops[4]["metadata"] == {"prompt": "drums", "id": "0003"} | places
    assert "prompt" not in crops[0]["metadata"]


def test_each_pass_has_each_item_once_in_its_own_order(folder: Path) -> None:
    dataset = mean_crops(folder)
    passes = [[int(dataset[5 * n + i]["latents"][0, 0]) for i in range(5)] for n in range(20)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in passes)
    assert len(set(map(tuple, passes))) > 10
    assert len(list(dataset)) == len(dataset) == 5


@pytest.mark.parametrize("format", FORMATS)
def test_formats_seed_and_order_of_asking(
    tmp_path: Path, folder: Path, write_latents: Writer, items: list[dict[str, Any]], format: str
) -> None:
    """A number stands for one crop and one draw, whatever was asked for before, in every format."""
    other = write_latents(tmp_path / "other", format, items)
    one = LatentDataset(folder, crop_frames=CROP, seed=5)
    two = LatentDataset(other, crop_frames=CROP, seed=5, silence=torch.full((2, 9), 7.0))
    for index in (40, 3, 17, 3, 0):
        ours, theirs = one[index], two[index]
        assert torch.equal(ours["latents"], theirs["latents"])
        assert ours["seconds_start"] == theirs["seconds_start"]
    third = LatentDataset(folder, crop_frames=CROP, seed=6)
    assert any(not torch.equal(one[index]["latents"], third[index]["latents"]) for index in range(5))


def test_draws_have_the_mean_and_the_deviation_of_the_posterior(
    tmp_path: Path, write_latents: Writer
) -> None:
    """And are drawn again each time, elsewhere than in the passes before."""
    std = np.array([[0.5], [2.0]], np.float16).repeat(8, axis=1)
    item = {"mean": np.array([[3.0], [-1.0]], np.float16).repeat(8, axis=1), "std": std}
    folder = write_latents(tmp_path / "latents", "safetensors", [item])
    dataset = LatentDataset(folder, crop_frames=8)
    draws = torch.stack([dataset[index]["latents"] for index in range(1000)])
    frames = draws.movedim(1, 0).flatten(1)
    assert torch.allclose(frames.mean(dim=1), torch.tensor([3.0, -1.0]), atol=0.1)
    assert torch.allclose(frames.std(dim=1), torch.tensor([0.5, 2.0]), rtol=0.05)
    assert len({float(draw[0, 0]) for draw in draws}) > 990
    assert torch.equal(dataset[7]["latents"], draws[7])


def drawn(folder: Path, workers: int, numbers: range) -> list[dict[str, Any]]:
    dataset = LatentDataset(folder, crop_frames=CROP, seed=1)
    loader = DataLoader(dataset, 2, sampler=numbers, num_workers=workers, collate_fn=dataset.collate)
    return list(loader)


def test_batches_are_the_same_with_workers_and_where_they_go_on(folder: Path) -> None:
    alone, shared = drawn(folder, 0, range(12)), drawn(folder, 2, range(12))
    rest = drawn(folder, 0, range(6, 12))
    assert [batch["latents"].shape for batch in alone] == [(2, 2, CROP)] * 6
    for expected, batches in ((alone, shared), (alone[3:], rest)):
        for one, two in zip(expected, batches, strict=True):
            for name in ("latents", "padding_mask", "seconds_start", "seconds_total"):
                assert torch.equal(one[name], two[name])
            assert one["metadata"] == two["metadata"]


def test_short_items_need_silence(tmp_path: Path, write_latents: Writer, items: list[dict[str, Any]]) -> None:
    folder = write_latents(tmp_path / "latents", "stable-audio", items)
    with pytest.raises(EarVAEError, match=r"0003\.npy: has 5 of 16 frames, and .* no silence to pad"):
        list(mean_crops(folder))
    silence = torch.zeros(2, 21)
    silence[:, 10] = torch.tensor([1.0, 2.0])
    padded = next(c for c in mean_crops(folder, silence=silence) if not c["padding_mask"].all())
    assert torch.equal(padded["latents"][:, 5:], torch.tensor([[1.0], [2.0]]).expand(2, 11))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_frames": 0}, "crop_frames must be an integer of 1 or more, got 0"),
        ({"crop_frames": 2.5}, "crop_frames must be an integer"),
        ({"crop_frames": 4, "seed": -1}, "seed must be an integer of 0 or more"),
        (
            {"crop_frames": 4, "silence": torch.zeros(3, 5)},
            r"has the shape \[3, 5\]; expected \[2, M\]",
        ),
        ({"crop_frames": 4, "silence": torch.zeros(2, 0)}, r"silence has the shape \[2, 0\]"),
    ],
)
def test_arguments_that_are_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EarVAEError, match=message):
        LatentDataset(open_latents(folder), **settings)
    with pytest.raises(IndexError):
        mean_crops(folder)[-1]
