"""What a person sees of a run: figures, rebuilt audio and spectrograms in TensorBoard."""

from __future__ import annotations

import io
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import soundfile
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from ear_vae import EarVAE, EarVAEConfig
from ear_vae.audio import read_audio
from ear_vae.errors import EarVAEError
from ear_vae.evaluation import measure
from ear_vae.network.discriminator import DiscriminatorConfig
from ear_vae.training import AudioDataModule, EarVAEModule
from ear_vae.training.callbacks import ListeningExamples
from ear_vae.training.pictures import spectrogram_picture

events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    (tmp_path / "music").mkdir()
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / "music" / name, 0.1 * random.standard_normal((88_200, 2)), 44_100)
    module = EarVAEModule(
        EarVAEConfig(channels=4, channel_multipliers=(1, 2, 2, 2, 2)),
        discriminator=DiscriminatorConfig(window_sizes=(512, 128), channels=4),
    )
    data = AudioDataModule(
        tmp_path / "music",
        tmp_path / "music",
        segment_seconds=0.1,
        validation_seconds=0.5,
        batch_size=2,
        segments_per_epoch=4,
        num_workers=0,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        logger=TensorBoardLogger(tmp_path / "log"),
        callbacks=[ListeningExamples(1)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    module.export(tmp_path / "model")
    return Path(trainer.logger.log_dir)


def test_figures_audio_and_pictures(log: Path) -> None:
    seen = events.EventAccumulator(str(log), size_guidance={"audio": 0, "images": 0})
    seen.Reload()
    tags = seen.Tags()
    assert {
        *(f"train/{n}" for n in ("log_magnitude", "correlation", "adversarial", "feature_matching", "kl")),
        *(
            f"train/{n}"
            for n in (
                "discriminator",
                "total",
                "learning_rate",
                "discriminator_learning_rate",
                "skipped_steps",
            )
        ),
        *(f"train/{n}" for n in ("gradient_norm", "discriminator_gradient_norm")),
        *(
            f"validation/{n}"
            for n in ("log_magnitude", "total", "si_sdr_db", "mel_distance", "stft_distance", "icpc", "ccpc")
        ),
    } <= set(tags["scalars"])
    assert [e.step for e in seen.Scalars("train/total")] == [0, 1, 2, 3]
    trained = EarVAE.from_pretrained(log.parents[2] / "model")
    figures = []
    for name in ("a.wav", "b.wav"):
        target, _ = read_audio(log.parents[2] / "music" / name, start=33_075, num_samples=22_050)
        figures.append(
            measure(trained.reconstruct(target), target, sample_rate=44_100, names=("ccpc", "si_sdr_db"))
        )
    for name in figures[0]:
        mean = sum(float(figure[name]) for figure in figures) / 2
        assert seen.Scalars(f"validation/{name}")[-1].value == pytest.approx(mean, rel=1e-3), name
    assert set(tags["audio"]) == {"original/0", "rebuilt/0"}
    assert set(tags["images"]) == {"original/0", "rebuilt/0"}
    assert [e.step for e in seen.Audio("rebuilt/0")] == [2, 4]
    assert [e.step for e in seen.Images("rebuilt/0")] == [2, 4]
    (original,) = seen.Audio("original/0")
    heard, rate = soundfile.read(io.BytesIO(original.encoded_audio_string), dtype="float32")
    assert rate == 44_100
    expected, _ = read_audio(log.parents[2] / "music" / "a.wav", start=33_075, num_samples=22_050)
    np.testing.assert_allclose(heard, expected.mean(dim=0).numpy(), atol=1 / 32_000)


def test_a_tone_is_a_line_at_its_height() -> None:
    """Rows are a logarithmic scale of frequencies, the highest one on top."""
    time = torch.arange(44_100) / 44_100
    rows = []
    for hz in (200, 800, 3_200):
        picture = spectrogram_picture(torch.sin(2 * torch.pi * hz * time), 44_100)
        assert picture.shape[0] == 3
        brightness = picture.float().sum(dim=(0, 2))
        rows.append(int(brightness.argmax()))
    assert rows[0] > rows[1] > rows[2]
    # Two octaves apart, twice.
    assert rows[0] - rows[1] == pytest.approx(rows[1] - rows[2], abs=0.1 * (rows[0] - rows[2]))


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(EarVAEError, match="count must be 0 or more"):
        ListeningExamples(-1)
