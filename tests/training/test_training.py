"""The training path on a CPU with a narrow model."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import lightning as L
import pytest
import soundfile
import torch

from ear_vae import EarVAE, EarVAEConfig, EarVAEError
from ear_vae.cli.fit import run_fit, shipped_configs
from ear_vae.training import AudioDataModule, EarVAEModule
from ear_vae.training.module import ObjectiveConfig
from ear_vae.training.optimization import OptimizerConfig

TINY = EarVAEConfig(channels=4, channel_multipliers=(1, 2, 2, 2, 2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two readable files at two rates, one mono, and two that are of no use."""
    music = tmp_path / "music"
    music.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name, rate, channels, seconds in (
        ("a.wav", 44_100, 2, 4),
        ("b.flac", 48_000, 1, 3),
        ("short.wav", 44_100, 2, 0.1),
    ):
        time = torch.arange(int(rate * seconds)) / rate
        tones = [
            torch.sin(2 * math.pi * hz * time) for hz in 100 + 900 * torch.rand(channels, generator=generator)
        ]
        soundfile.write(music / name, 0.3 * torch.stack(tones, 1).numpy(), rate)
    (music / "broken.mp3").write_bytes(b"not audio")
    return music


def trainer(tmp_path: Path, **settings: object) -> L.Trainer:
    defaults: dict[str, object] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return L.Trainer(**(defaults | settings))  # type: ignore[arg-type]


def data(folder: Path, **settings: object) -> AudioDataModule:
    defaults: dict[str, object] = {
        "segment_seconds": 0.19,
        "batch_size": 2,
        "num_workers": 0,
        "validation_seconds": 1,
    }
    return AudioDataModule(folder, folder, **(defaults | settings))  # type: ignore[arg-type]


def test_step_zero_is_the_pretrained_model(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    EarVAE(TINY, name="start").save_pretrained(tmp_path / "start")
    vae = EarVAE.from_pretrained(tmp_path / "start")
    module = EarVAEModule(pretrained=str(tmp_path / "start"))
    audio = 0.1 * torch.randn(1, 2, 8192)
    with torch.no_grad():
        torch.testing.assert_close(module.vae(audio).audio, vae(audio).audio, rtol=1e-4, atol=1e-5)
    module.export(tmp_path / "out")
    again = EarVAE.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(again.reconstruct(audio), vae.reconstruct(audio), rtol=1e-4, atol=1e-5)
    assert {name for name, _ in again.named_parameters()} == {name for name, _ in vae.named_parameters()}


def test_training_moves_every_weight_and_exports_what_it_reached(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = EarVAEModule(TINY)
    before = {name: p.detach().clone() for name, p in module.vae.named_parameters()}
    datamodule = data(folder, segments_per_epoch=6)
    run = trainer(tmp_path, max_steps=3, num_sanity_val_steps=0)
    run.fit(module, datamodule)
    assert run.global_step == 3
    assert all(not torch.equal(before[name], p) for name, p in module.vae.named_parameters())
    metrics = run.callback_metrics
    assert {f"validation/{n}" for n in ("log_magnitude", "correlation", "kl", "total", "si_sdr_db")} <= set(
        metrics
    )
    assert {f"train/{n}" for n in ("spectral_convergence", "group_delay", "instantaneous_frequency")} <= set(
        metrics
    )
    assert "train/waveform" not in metrics
    module.export(tmp_path / "model")
    audio = 0.1 * torch.randn(1, 2, 8192)
    with torch.no_grad():
        expected = module.vae(audio).audio
    torch.testing.assert_close(
        EarVAE.from_pretrained(tmp_path / "model").reconstruct(audio), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_a_hundred_steps_on_one_batch_lower_every_term(training_music: Path) -> None:
    """From a random start, on real music."""
    torch.manual_seed(0)
    module = EarVAEModule(
        EarVAEConfig(channels=8),
        objective=ObjectiveConfig(weights={"waveform": 1.0}),
    )
    datamodule = AudioDataModule(training_music, segment_seconds=0.37)
    datamodule.setup("fit")
    segments = datamodule.segments()
    batch = torch.stack([segments[index] for index in range(4)])
    optimizer = torch.optim.AdamW(module.vae.parameters(), lr=2e-3, betas=(0.8, 0.99))
    history = []
    for _ in range(100):
        estimate, posterior = module.vae(batch, sample=True)
        terms = module.objective.terms(estimate, batch, posterior)
        optimizer.zero_grad()
        module.objective.total(terms).backward()
        torch.nn.utils.clip_grad_norm_(module.vae.parameters(), 1.0)
        optimizer.step()
        history.append({name: float(value.detach()) for name, value in terms.items()})
    for name in history[0]:
        first, last = (sum(step[name] for step in part) / 10 for part in (history[:10], history[-10:]))
        if name != "kl":
            assert last < first, (name, first, last)


def test_filter_bank_start_is_a_codec_and_a_checkpoint_is_not_overwritten_by_it(
    folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = EarVAEConfig(
        channels=8, channel_multipliers=(2, 2, 16, 16), strides=(2, 4, 4, 8), transformer_depth=0
    )
    module = EarVAEModule(config, initialization="filter_bank", optimizer=OptimizerConfig(learning_rate=0.0))
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(module, data(folder))
    run.save_checkpoint(tmp_path / "start.ckpt")
    audio, _ = soundfile.read(folder / "a.wav", dtype="float32", always_2d=True)
    target = torch.from_numpy(audio.T.copy())
    from ear_vae.dsp.si_sdr import scale_invariant_sdr_db

    assert scale_invariant_sdr_db(module.folded().reconstruct(target), target) > 6
    resumed = EarVAEModule(config, initialization="filter_bank", optimizer=OptimizerConfig(learning_rate=0.0))
    run = trainer(tmp_path, max_steps=2, limit_val_batches=0)
    run.fit(resumed, data(folder), ckpt_path=tmp_path / "start.ckpt", weights_only=True)
    for one, other in zip(module.vae.parameters(), resumed.vae.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_learning_rate_warms_up_and_decays() -> None:
    schedule = OptimizerConfig(warmup_steps=10, final_fraction=0.1)
    assert schedule.factor(0, 100) == pytest.approx(0.1)
    assert schedule.factor(9, 100) == pytest.approx(1.0)
    assert schedule.factor(55, 100) == pytest.approx(0.55)
    assert schedule.factor(100, 100) == pytest.approx(0.1)
    assert schedule.factor(500, 100) == pytest.approx(0.1)


def test_fit_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped config with overrides: a log of named terms, a checkpoint, an exported model."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", "tiny", "--data.folder", str(folder), "--data.validation_folder", str(folder)]
    arguments += ["--model.config.channel_multipliers", "[2,2,16,16]", "--data.num_workers", "0"]
    arguments += ["--model.compiled", "false"]
    arguments += [
        "--data.batch_size",
        "1",
        "--data.segments_per_epoch",
        "2",
        "--data.validation_seconds",
        "1",
    ]
    arguments += ["--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"]
    arguments += ["--checkpoints.every_n_steps", "1"]
    assert run_fit([*arguments, "--trainer.max_steps", "2"]) == 0
    run = tmp_path / "runs" / "tiny"
    vae = EarVAE.from_pretrained(run / "model")
    assert (vae.name, vae.sample_rate, vae.config.channels) == ("model", 44_100, 8)
    with next(run.glob("log/*/metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    assert {"train/log_magnitude", "train/waveform", "validation/si_sdr_db"} <= set(rows[0])
    assert (
        run_fit(
            [*arguments, "--trainer.max_steps", "4", "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
        )
        == 0
    )
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4


NARROW = ["--model.config.channels", "4", "--model.config.channel_multipliers", "[1,2,2,2,2]"]
SHORT = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "2", "--trainer.enable_progress_bar", "false"]
SHORT += ["--trainer.enable_model_summary", "false", "--trainer.logger", "false", "--data.num_workers", "0"]
SHORT += ["--data.segment_seconds", "0.19", "--data.batch_size", "1", "--data.validation_seconds", "1"]
SMALL_JUDGE = ["--model.discriminator.channels", "4", "--model.discriminator.window_sizes", "[512,128]"]


@pytest.mark.slow
def test_the_three_stages_and_fine_tuning(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each goes on from the model that the one before exported, and leaves one that loads."""
    monkeypatch.chdir(tmp_path)
    data = ["--data.folder", str(folder), "--data.validation_folder", str(folder)]
    assert run_fit(["--config", "warmup", *data, *NARROW, *SHORT]) == 0
    before = "warmup"
    for stage in ("adversarial", "continuation", "finetune", "finetune_decoder"):
        start = ["--model.pretrained", f"runs/{before}/model"]
        if stage.startswith("finetune"):
            start += ["--model.variant", "null", "--model.adversarial_after", "1"]
        assert run_fit(["--config", stage, *start, *data, *SMALL_JUDGE, *SHORT]) == 0
        one, other = (EarVAE.from_pretrained(f"runs/{name}/model") for name in (before, stage))
        assert one.config == other.config == EarVAEConfig(channels=4, channel_multipliers=(1, 2, 2, 2, 2))
        assert one.weights_sha256 != other.weights_sha256
        content = torch.load(f"runs/{stage}/checkpoints/last.ckpt", weights_only=True)
        assert content["global_step"] == 2
        assert content["ear_vae"]["discriminator"]["channels"] == 4
        before = stage
    frozen = [torch.cat([p.flatten() for p in vae.encoder.parameters()]) for vae in (one, other)]
    assert torch.equal(*frozen)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["warmup"],
            {"discriminator: null", "max_steps: 100000", "warmup_steps: 1000", "every_n_steps: 1000"},
        ),
        (["adversarial"], {"max_steps: 400000", "channels: 64", "precision: null", "ema_decay: 0.999"}),
        (["adversarial", "one_gpu"], {"max_steps: 400000", "devices: 1", "precision: bf16-mixed"}),
        (
            ["adversarial", "gpu_24gb"],
            {"batch_size: 4", "accumulate_grad_batches: 4", "precision: bf16-mixed"},
        ),
        (
            ["adversarial", "gpu_48gb"],
            {"batch_size: 8", "accumulate_grad_batches: 2", "precision: bf16-mixed"},
        ),
        (["continuation", "multi_gpu"], {"strategy: ddp_find_unused_parameters_true", "warmup_steps: 500"}),
        (
            ["warmup", "one_cpu"],
            {"accelerator: cpu", "batch_size: 2", "max_steps: 100000", "warmup_steps: 20"},
        ),
        (["finetune"], {"pretrained: ear_vae_44k", "variant: null", "train_encoder: true"}),
        (["finetune_decoder"], {"train_encoder: false", "adversarial_after: 1000"}),
        (["smoke"], {"max_steps: 20", "default_root_dir: runs/smoke"}),
    ],
)
def test_shipped_configs_override_one_base(
    arguments: list[str], expected: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    configs = [f"--config={name}" for name in arguments]
    with pytest.raises(SystemExit) as left:
        run_fit([*configs, "--data.folder", "music", "--print_config"])
    assert left.value.code == 0
    lines = {line.strip() for line in capsys.readouterr().out.splitlines()}
    assert expected <= lines


def test_unknown_configs() -> None:
    assert {"base", "warmup", "adversarial", "continuation", "smoke", "tiny", "tiny_quiet"} <= set(
        shipped_configs()
    )
    with pytest.raises(EarVAEError, match=r"no config 'warmupp': did you mean warmup\?.*tiny"):
        run_fit(["--config", "warmupp"])
    with pytest.raises(EarVAEError, match=r"no config 'nowhere\.yaml'"):
        run_fit(["--config=nowhere.yaml"])


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EarVAEError, match="either a config"):
        EarVAEModule(TINY, pretrained="ear-vae-tiny")
    with pytest.raises(EarVAEError, match="unknown loss terms"):
        EarVAEModule(TINY, objective=ObjectiveConfig(weights={"mel": 1.0}))
    with pytest.raises(EarVAEError, match="data is at 48000 Hz, the model works at 44100 Hz"):
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(
            EarVAEModule(TINY), data(folder, sample_rate=48_000)
        )
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(EarVAEModule(TINY), data(folder))
    run.save_checkpoint(tmp_path / "tiny.ckpt")
    other = EarVAEModule(EarVAEConfig(channels=4))
    with pytest.raises(EarVAEError, match="another architecture"):
        trainer(tmp_path, max_steps=2).fit(
            other, data(folder), ckpt_path=tmp_path / "tiny.ckpt", weights_only=True
        )
    (tmp_path / "empty").mkdir()
    with pytest.raises(EarVAEError, match="no usable audio: 0 audio files"):
        trainer(tmp_path, max_steps=1).fit(EarVAEModule(TINY), data(tmp_path / "empty"))
