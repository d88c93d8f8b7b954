"""Latents as training data: the same crops however they are loaded, and validation from audio."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from ear_vae import EarVAE, EarVAEConfig, EarVAEError
from ear_vae.encoding import LatentDataset
from ear_vae.training import EarVAEModule, LatentDataModule

CROP = 8


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> EarVAE:
    torch.manual_seed(0)
    return EarVAE(EarVAEConfig(channels=4, transformer_depth=0)).eval().requires_grad_(False)


@pytest.fixture
def folder(tmp_path: Path, vae: EarVAE, write_latents: Callable[..., Path]) -> Path:
    generator = np.random.default_rng(0)
    items = [
        {"mean": mean.astype(np.float16), "std": np.full(mean.shape, 0.1, np.float16)}
        for mean in (generator.standard_normal((64, frames)) for frames in (20, 9, 30, 5, 12, 40))
    ]
    return write_latents(tmp_path / "latents", "webdataset", items, weights_sha256=vae.weights_sha256)


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    """Two that are long enough, one at another rate, and one that is not."""
    (tmp_path / "songs").mkdir()
    for name, seconds, rate in (("a.wav", 1.0, 44_100), ("b.wav", 1.5, 48_000), ("c.wav", 0.1, 44_100)):
        noise = np.random.default_rng(rate).standard_normal((int(seconds * rate), 2))
        soundfile.write(tmp_path / "songs" / name, 0.1 * noise, rate)
    return tmp_path / "songs"


class Learner(L.LightningModule):
    """Remembers what it was given, and learns a number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []
        self.validated: list[dict[str, Any]] = []

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        self.seen.append(batch["latents"])
        return (self.weight - batch["latents"].mean()).square()

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        self.validated.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data: LatentDataModule, steps: int, folder: Path, **options: Any) -> tuple[Learner, L.Trainer]:
    module = Learner()
    checkpoint = options.pop("ckpt_path", None)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return module, trainer


def of(folder: Path, vae: EarVAE, **settings: Any) -> LatentDataModule:
    defaults = {"crop_frames": CROP, "batch_size": 2, "num_workers": 0, "seed": 4}
    return LatentDataModule(folder, vae, **(defaults | settings))


def test_steps_go_on_over_epochs_and_interruptions(tmp_path: Path, folder: Path, vae: EarVAE) -> None:
    """Each step has the next numbers of the data set, in new epochs, after a resume and with workers."""
    whole, _ = fit(of(folder, vae), 8, tmp_path)
    dataset = LatentDataset(folder, crop_frames=CROP, seed=4, silence=vae.silence(64))
    for step, latents in enumerate(whole.seen):
        expected = [dataset[2 * step + place]["latents"] for place in range(2)]
        assert torch.equal(latents, torch.stack(expected))
    # Within the second epoch of three steps each.
    _, trainer = fit(of(folder, vae), 4, tmp_path)
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    rest, _ = fit(of(folder, vae, num_workers=2), 8, tmp_path, ckpt_path=tmp_path / "four.ckpt")
    assert len(rest.seen) == 4
    for one, two in zip(rest.seen, whole.seen[4:], strict=True):
        assert torch.equal(one, two)
    assert torch.equal(rest.weight, whole.weight)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_crops_of_one(folder: Path, vae: EarVAE, processes: int) -> None:
    data = of(folder, vae)
    data.setup("fit")
    together = iter(data.train_dataloader())
    loaders = []
    for rank in range(processes):
        loader = data.train_dataloader()
        share = type(loader)(
            loader.dataset,
            batch_size=2 // processes or 1,
            segments_per_epoch=6,
            rank=rank,
            processes=processes,
            collate_fn=LatentDataset.collate,
        )
        loaders.append(share)
    shared = [crop for step in zip(*loaders, strict=True) for batch in step for crop in batch["latents"]]
    alone = [crop for batch in together for crop in batch["latents"]]
    assert len(shared) == len(alone) == 6
    for one, two in zip(shared, alone, strict=True):
        assert torch.equal(one, two)


def test_validation_is_from_audio(tmp_path: Path, folder: Path, songs: Path, vae: EarVAE) -> None:
    """The middle of each song that is long enough, encoded now; nothing of it is stored."""
    data = of(folder, vae, validation_folder=str(songs))
    module, _ = fit(data, 3, tmp_path, num_sanity_val_steps=0)
    assert [Path(batch["metadata"][0]["path"]).name for batch in module.validated] == ["a.wav", "b.wav"]
    audio, _ = soundfile.read(songs / "a.wav", dtype="float32")
    length = CROP * 1024
    start = (44_100 - length) // 2
    first = module.validated[0]
    expected = torch.from_numpy(audio.T[:, start : start + length].copy())
    assert torch.equal(first["audio"][0], expected)
    assert torch.allclose(first["latents"][0], vae.encode(expected).mode(), atol=1e-6)
    assert float(first["seconds_start"]) == pytest.approx(start / 44_100)
    for batch in module.validated:
        assert batch["latents"].shape == (1, 64, CROP)
        assert batch["padding_mask"].shape == (1, CROP)
        assert batch["padding_mask"].all()
    assert float(module.validated[1]["seconds_total"]) == 1.5


def test_short_items_are_padded_with_the_models_silence(folder: Path, vae: EarVAE) -> None:
    data = of(folder, vae, sample=False)
    data.setup("fit")
    padded = [
        crop[:, ~mask]
        for batch in data.train_dataloader()
        for crop, mask in zip(batch["latents"], batch["padding_mask"], strict=True)
        if not mask.all()
    ]
    (silence,) = padded
    assert silence.shape == (64, 3)
    steady = vae.encode(torch.zeros(2, 40 * 1024)).mode()[:, 20:21]
    assert torch.allclose(silence, steady.expand(-1, 3), atol=1e-6)


def test_latents_of_another_model_are_refused(folder: Path, vae: EarVAE) -> None:
    torch.manual_seed(1)
    other = EarVAE(EarVAEConfig(channels=4, transformer_depth=0), name="other")
    with pytest.raises(EarVAEError, match=r"were made by a model with the fingerprint .* other has"):
        of(folder, other).setup("fit")


def test_resuming_on_other_data_is_reported(
    tmp_path: Path, folder: Path, vae: EarVAE, caplog: pytest.LogCaptureFixture
) -> None:
    data = of(folder, vae)
    data.setup("fit")
    state = data.state_dict()
    assert state["items"] == 6
    with caplog.at_level(logging.WARNING):
        data.load_state_dict(state)
        assert not caplog.records
        data.load_state_dict({**state, "seed": 5, "items": 7})
    assert "items: 7 there, 6 here; seed: 5 there, 4 here" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_frames": 0}, "crop_frames must be an integer of 1 or more"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"crops_per_epoch": 0}, "crops_per_epoch must be"),
        ({"num_workers": -1}, "num_workers must be"),
        ({"model": None, "validation_folder": "songs"}, "validation encodes audio: give the model"),
        ({"validation_folder": []}, "an empty list of folders"),
    ],
)
def test_arguments_that_are_refused(vae: EarVAE, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EarVAEError, match=message):
        LatentDataModule("latents", **({"model": vae} | settings))


def test_what_cannot_be_trained_on_is_said(tmp_path: Path, folder: Path, vae: EarVAE) -> None:
    with pytest.raises(EarVAEError, match=r"absent: is no folder; give the output of ear-vae encode-dataset"):
        of(tmp_path / "absent", vae).setup("fit")
    with pytest.raises(EarVAEError, match="the latents are not open yet"):
        of(folder, vae).train_dataloader()
    with pytest.raises(EarVAEError, match="the data have no model"):
        _ = LatentDataModule(folder).vae
    few = of(folder, vae, crops_per_epoch=1)
    few.setup("fit")
    with pytest.raises(EarVAEError, match=r"1 segments, but one step takes 2; .*crops_per_epoch"):
        few.train_dataloader()


def test_statistics_do_not_outlive_the_encoder_that_they_are_of(tmp_path: Path, vae: EarVAE) -> None:
    """A decoder that is trained further keeps the latents, and their statistics."""
    copy = EarVAE(vae.config, name="mine")
    copy.load_state_dict(vae.state_dict())
    copy.set_latent_statistics([0.5] * 64, [2.0] * 64)
    copy.save_pretrained(tmp_path / "mine")
    settings: dict[str, Any] = {"pretrained": str(tmp_path / "mine"), "discriminator": None}
    assert EarVAEModule(**settings).folded().config.latents_mean is None
    assert EarVAEModule(**settings, train_encoder=False).folded().config.latents_mean == (0.5,) * 64
    with pytest.raises(EarVAEError, match="a new model has no latents yet"):
        EarVAEModule(config=copy.config, discriminator=None)
