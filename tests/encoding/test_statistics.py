"""Statistics of latents: numpy's over the whole, whatever the pieces; who may replace those of a model."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ear_vae import EarVAE, EarVAEError
from ear_vae.cli.main import main
from ear_vae.encoding import LatentStatistics, latent_statistics

FORMATS = ("webdataset", "stable-audio", "safetensors")


def frames_of(seed: int, channels: int, frames: int) -> np.ndarray:
    """Correlated channels whose means are far larger than their spread, as those of latents can be."""
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((channels, channels))
    return 117 + 0.1 * mixing @ generator.standard_normal((channels, frames))


@pytest.mark.parametrize("order", range(3))
def test_pieces_merged_in_any_order_are_numpys_of_the_whole(order: int) -> None:
    whole = frames_of(0, 6, 10_000)
    pieces = []
    for piece in np.split(whole, [1, 2, 500, 700, 4_000], axis=1):
        statistics = LatentStatistics(6)
        statistics.update(piece)
        pieces.append(LatentStatistics.from_dict(json.loads(json.dumps(statistics.to_dict()))))
    random.Random(order).shuffle(pieces)
    merged = LatentStatistics(6)
    for piece in pieces:
        merged.merge(piece)
    assert merged.count == 10_000
    np.testing.assert_allclose(merged.mean, whole.mean(axis=1), rtol=1e-9)
    np.testing.assert_allclose(merged.std, whole.std(axis=1), rtol=1e-9)
    np.testing.assert_allclose(
        merged.covariance, np.cov(whole, bias=True), rtol=1e-9, atol=1e-9 * whole.var(axis=1).max()
    )


def test_a_batch_with_a_mask_counts_what_is_not_padding() -> None:
    latents = torch.from_numpy(frames_of(1, 4, 60)).reshape(4, 3, 20).movedim(1, 0)
    mask = torch.arange(20) < torch.tensor([20, 5, 0])[:, None]
    statistics = LatentStatistics(4)
    statistics.update(latents, mask)
    kept = np.concatenate([latents[0].numpy(), latents[1, :, :5].numpy()], axis=1)
    assert statistics.count == 25
    np.testing.assert_allclose(statistics.mean, kept.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(statistics.std, kept.std(axis=1), rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.update(np.zeros((3, 5))), r"latents have shape \[3, 5\]; expected \[4, N\]"),
        (lambda s: s.update(np.zeros((4, 5)), np.ones(4)), r"the mask has shape \[4\]"),
        (lambda s: s.update(np.full((4, 1), np.nan)), "NaN or infinity"),
        (lambda s: s.merge(LatentStatistics(3)), "statistics of 3 channels cannot be merged with those of 4"),
        (lambda s: s.std, "no latent frames"),
        (lambda s: s.covariance, "no latent frames"),
        (lambda s: s.from_dict({"count": 1}), "expected an object of count, mean, co_moment"),
        (lambda s: s.from_dict({**s.to_dict(), "count": -1}), "damaged .* -1 frames"),
        (lambda s: s.from_dict({**s.to_dict(), "mean": ["a"] * 4}), "must be numbers"),
        (lambda s: s.from_dict({**s.to_dict(), "mean": [0.0]}), r"mean \[1\], co_moment \[4, 4\]"),
        (lambda s: s.from_dict({**s.to_dict(), "mean": [float("inf")] * 4}), "damaged .* NaN or infinity"),
    ],
)
def test_what_is_refused(call: Callable[[LatentStatistics], Any], message: str) -> None:
    with pytest.raises(EarVAEError, match=message):
        call(LatentStatistics(4))


@pytest.fixture
def items() -> list[dict[str, Any]]:
    """Three items in fp16, the last with padding, which is far from everything else."""
    generator = np.random.default_rng(2)
    made = []
    for frames in (40, 7, 30):
        mean, std = generator.standard_normal((2, 64, frames))
        made.append({"mean": (3 + mean).astype(np.float16), "std": np.abs(std).astype(np.float16)})
    made[2]["mean"][:, 20:] = 1000
    made[2]["frames"] = 20
    return made


def valid_frames(items: list[dict[str, Any]]) -> np.ndarray:
    kept = [item["mean"][:, : item.get("frames")] for item in items]
    return np.concatenate(kept, axis=1).astype(np.float64)


@pytest.mark.parametrize("format", FORMATS)
def test_a_data_set_gives_numpys_without_its_padding(
    tmp_path: Path, write_latents: Callable[..., Path], items: list[dict[str, Any]], format: str
) -> None:
    statistics = latent_statistics(write_latents(tmp_path / "latents", format, items))
    whole = valid_frames(items)
    assert statistics.count == 67
    np.testing.assert_allclose(statistics.mean, whole.mean(axis=1), rtol=1e-9)
    np.testing.assert_allclose(statistics.std, whole.std(axis=1), rtol=1e-9)


def with_receipts(folder: Path, shards: list[np.ndarray]) -> Path:
    """Notes beside shards what was in them."""
    (folder / "receipts").mkdir()
    plan = [{"format": "webdataset"}, *({"key": str(n), "shard": n} for n in range(len(shards)))]
    (folder / "plan.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in plan))
    for number, frames in enumerate(shards):
        statistics = LatentStatistics(len(frames))
        statistics.update(frames)
        noted = {"items": 2 - number, "num_frames": statistics.count, "statistics": statistics.to_dict()}
        (folder / "receipts" / f"{number:06}.json").write_text(json.dumps(noted))
    return folder


def test_what_the_shards_noted_is_taken(
    tmp_path: Path, write_latents: Callable[..., Path], items: list[dict[str, Any]]
) -> None:
    """Without reading a latent: what was noted here is not what is in the tars."""
    noted = [frames_of(3, 64, 90), frames_of(4, 64, 10)]
    folder = with_receipts(write_latents(tmp_path / "latents", "webdataset", items), noted)
    statistics = latent_statistics(folder)
    whole = np.concatenate(noted, axis=1)
    np.testing.assert_allclose(statistics.mean, whole.mean(axis=1), rtol=1e-9)
    np.testing.assert_allclose(statistics.std, whole.std(axis=1), rtol=1e-9)
    receipt = folder / "receipts" / "000001.json"
    receipt.write_text(json.dumps({"items": 1, "statistics": {"count": 3}}))
    with pytest.raises(EarVAEError, match=r"000001\.json: .*expected an object"):
        latent_statistics(folder)
    receipt.unlink()
    with pytest.raises(EarVAEError, match=r"latents: 1 of 2 shards are not finished; run .*encode-dataset"):
        latent_statistics(folder)


@pytest.fixture
def model(tmp_path: Path, small_model: Path) -> Path:
    shutil.copytree(small_model, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def dataset(
    tmp_path: Path, write_latents: Callable[..., Path], items: list[dict[str, Any]], model: Path
) -> Path:
    sha256 = EarVAE.from_pretrained(model).weights_sha256
    return write_latents(tmp_path / "latents", "webdataset", items, weights_sha256=sha256)


def test_into_a_model(
    dataset: Path, model: Path, items: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    """The config has them, the weights are what they were, and normalize takes them."""
    weights, before = (model / "model.safetensors").read_bytes(), EarVAE.from_pretrained(model)
    assert main(["statistics", str(dataset), "--into", str(model)]) == 0
    assert "has the statistics of 67 frames" in capfd.readouterr().err
    assert (model / "model.safetensors").read_bytes() == weights
    vae, whole = EarVAE.from_pretrained(model), valid_frames(items)
    assert vae.weights_sha256 == before.weights_sha256
    values = json.loads((model / "config.json").read_text())
    np.testing.assert_allclose(values["latents_mean"], whole.mean(axis=1), rtol=1e-9)
    np.testing.assert_allclose(values["latents_std"], whole.std(axis=1), rtol=1e-9)
    normal = vae.normalize(torch.from_numpy(whole))
    assert normal.dtype == torch.float64
    assert normal.mean(dim=1).abs().max() < 1e-9
    assert (normal.std(dim=1, correction=0) - 1).abs().max() < 1e-9


def test_what_a_model_has_is_replaced_when_that_is_wanted(
    dataset: Path, model: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = EarVAE.from_pretrained(model)
    vae.set_latent_statistics(torch.zeros(64), torch.full((64,), 5.0))
    vae.save_pretrained(model)
    arguments = ["statistics", str(dataset), "--into", str(model)]

    def stored() -> float:
        return float(json.loads((model / "config.json").read_text())["latents_std"][0])

    assert main(arguments) == 1
    assert "has latent statistics already; replace them (--force)" in capfd.readouterr().err
    assert stored() == 5
    # A terminal, where somebody can be asked.
    ours, theirs = os.openpty()
    with open(theirs) as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        monkeypatch.setattr("ear_vae.cli.statistics.is_watched", lambda: True)
        os.write(ours, b"n\n")
        assert main(arguments) == 1
        assert "replace them? [y/N]" in capfd.readouterr().err
        assert stored() == 5
        os.write(ours, b"y\n")
        assert main(arguments) == 0
        assert stored() != 5
    os.close(ours)
    monkeypatch.undo()
    vae.save_pretrained(model)
    assert main([*arguments, "--force"]) == 0
    assert stored() != 5


def test_latents_of_another_model_are_not_taken_for_its_own(
    tmp_path: Path,
    write_latents: Callable[..., Path],
    items: list[dict[str, Any]],
    model: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    others = write_latents(tmp_path / "others", "safetensors", items, weights_sha256="a" * 64)
    assert main(["statistics", str(others), "--into", str(model)]) == 1
    assert "did not make these latents" in capfd.readouterr().err
    assert "latents_mean" not in (model / "config.json").read_text()
    assert main(["statistics", str(others), "--into", str(model), "--force"]) == 0
    assert "latents_mean" in (model / "config.json").read_text()
    narrow = write_latents(
        tmp_path / "narrow", "safetensors", [{"mean": np.eye(3), "std": np.ones((3, 3))}], weights_sha256="a"
    )
    assert main(["statistics", str(narrow), "--into", str(model), "--force"]) == 1
    assert "latents_mean must be a list of 64" in capfd.readouterr().err


def test_a_channel_that_never_changes_is_named(
    tmp_path: Path, write_latents: Callable[..., Path], model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As of a data set of digital silence: nothing could be divided by its standard deviation."""
    items = [{"mean": np.ones((64, 9), np.float32), "std": np.ones((64, 9), np.float32)}]
    silent = write_latents(tmp_path / "silent", "stable-audio", items)
    assert main(["statistics", str(silent), "--into", str(model), "--force"]) == 1
    assert "latents_std must be a list of 64 finite numbers above 0" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{}/absent"], 1, "absent: is no folder; give the output of ear-vae encode-dataset"),
        (["{}/empty"], 1, "empty: holds no latents"),
        (["{}/latents", "--into", "{}/empty"], 1, "empty/config.json: cannot read the config"),
        (["{}/latents", "--into", "ear-vae-tiny"], 1, "ear-vae-tiny: is no folder; give that of a model"),
        (["{}/latents", "--force"], 2, "--force is for --into MODEL"),
    ],
)
def test_bad_command_lines(
    tmp_path: Path,
    dataset: Path,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    line = [argument.format(tmp_path) for argument in arguments]
    if code == 2:
        with pytest.raises(SystemExit) as left:
            main(["statistics", *line])
        assert left.value.code == 2
    else:
        assert main(["statistics", *line]) == code
    assert message in capfd.readouterr().err


def test_what_is_printed(
    dataset: Path, items: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    whole = valid_frames(items)
    assert main(["statistics", str(dataset), "--json", "--covariance"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["frames"] == 67
    np.testing.assert_allclose(facts["latents_std"], whole.std(axis=1), rtol=1e-9)
    np.testing.assert_allclose(facts["covariance"], np.cov(whole, bias=True), atol=1e-9)
    assert main(["statistics", str(dataset)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["frames", "latents_mean", "latents_std"]
    np.testing.assert_allclose([float(v) for v in lines[1].split()[1:]], whole.mean(axis=1), rtol=1e-5)
