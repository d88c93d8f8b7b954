"""`ear-vae fit` as a newcomer meets it, through the real command line."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import soundfile
import torch
from huggingface_hub import constants
from torch.utils.data import DataLoader

from ear_vae import EarVAE, EarVAEConfig
from ear_vae.cli import main
from ear_vae.cli.fit import shipped_configs
from ear_vae.training import EarVAEModule, ObjectiveConfig
from ear_vae.training.callbacks import StepProgressBar

SHORT = ["--model.config.channels", "4", "--model.config.channel_multipliers", "[1,2,2,2,2]"]
SHORT += ["--trainer.accelerator", "cpu", "--data.num_workers", "0", "--data.segment_seconds", "0.1"]
SHORT += ["--data.batch_size", "1", "--data.segments_per_epoch", "10"]
NOISE = ("Tip:", "litlogger", "litmodels", "tensorboardX", "TPU", "FLOPs", "stopped: `max_steps", "Seed set")


def ear_vae(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ear_vae", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def music(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("music")
    soundfile.write(folder / "a.wav", 0.1 * np.random.default_rng(0).standard_normal((22_050, 2)), 44_100)
    return folder


@pytest.fixture(scope="module")
def first(music: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, str]:
    """The command of a run, its folder, and what it showed."""
    root = tmp_path_factory.mktemp("run")
    command = ["fit", "--data.folder", str(music), *SHORT, "--trainer.default_root_dir", str(root)]
    command += ["--trainer.max_steps", "2"]
    result = ear_vae(*command)
    assert result.returncode == 0, result.stderr
    return command, root, result.stdout + result.stderr


def test_a_run_ends_with_where_the_model_is_and_how_to_go_on(first: tuple[list[str], Path, str]) -> None:
    _, root, shown = first
    assert f"model: {root / 'model'}\n" in shown
    assert not any(word in shown for word in NOISE)
    (command,) = re.findall(r"train further with: ear-vae (.*)", shown)
    result = ear_vae(*shlex.split(command))
    assert result.returncode == 0, result.stderr
    content = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 4
    # The bar goes on where the run had stopped, to the steps of the whole.
    bars = re.findall(
        r"Training: *(\d+)%\|[^|]*\| (\d+)/(\d+).*?total=([\d.]+)", result.stdout + result.stderr
    )
    assert ("100", "4", "4") in {bar[:3] for bar in bars}
    assert {bar[2] for bar in bars} == {"4"}
    weights = sum(tensor.numel() for tensor in EarVAE.from_pretrained(root / "model").state_dict().values())
    assert f"training a model of {weights / 1e6:.2g} M weights on cpu, up to step 4\n" in result.stderr


def test_a_resumed_bar_goes_on_with_the_smoothed_loss() -> None:
    bar, resumed, foreign = StepProgressBar(), StepProgressBar(), StepProgressBar()
    trainer: Any = SimpleNamespace(callback_metrics={"train/total": torch.tensor(8.0)})
    assert bar.get_metrics(trainer, trainer) == {"total": "8.000"}
    resumed.load_state_dict(bar.state_dict())
    trainer.callback_metrics["train/total"] = torch.tensor(3.0)
    assert resumed.get_metrics(trainer, trainer) == {"total": "7.520"}
    foreign.load_state_dict({"smoothed": "a text"})
    assert foreign.get_metrics(trainer, trainer) == {"total": "3.000"}


def test_a_second_run_does_not_replace_the_first(
    first: tuple[list[str], Path, str], music: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, root, _ = first
    files = [root / "checkpoints" / "last.ckpt", root / "model" / "model.safetensors"]
    before = [file.read_bytes() for file in files]
    assert main(command) == 1
    error = capsys.readouterr().err
    for way in (f"--ckpt_path {files[0]}", "--trainer.default_root_dir FOLDER", "--force"):
        assert way in error
    # Nor one that goes on with a checkpoint from elsewhere.
    (tmp_path / "other.ckpt").write_bytes(before[0])
    assert main([*command, "--ckpt_path", str(tmp_path / "other.ckpt")]) == 1
    assert "left by another run" in capsys.readouterr().err
    # Nor where only the model is left.
    copied = tmp_path / "copy" / "model"
    EarVAE.from_pretrained(root / "model").save_pretrained(copied)
    assert main([*command, "--trainer.default_root_dir", str(copied.parent)]) == 1
    assert "left by another run" in capsys.readouterr().err
    assert [file.read_bytes() for file in files] == before
    assert main([*command, "--force", "--model.seed", "5"]) == 0
    assert files[0].read_bytes() != before[0]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="terminals close without a signal here")
def test_a_stopped_run_leaves_a_model(music: Path, tmp_path: Path) -> None:
    """When its terminal is closed after three steps, before any validation or interval."""
    script = (
        "import os, signal, sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "import test_resume\n"
        # Whoever runs the tests may have been started by nohup.
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "from ear_vae.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["fit", "--data.folder", music, *SHORT, "--trainer.default_root_dir", tmp_path]
    arguments += ["--trainer.callbacks", "[{class_path: test_resume.Stop, init_args: {how: SIGHUP}}]"]
    arguments += ["--trainer.max_steps", "9", "--trainer.logger", "false"]
    result = subprocess.run(
        [sys.executable, "-c", script, Path(__file__).parent, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 128 + signal.SIGHUP, result.stderr
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 3
    model = EarVAE.from_pretrained(tmp_path / "model").state_dict()
    for name, tensor in model.items():
        assert torch.equal(tensor, content["state_dict"][f"ema.network.{name}"]), name
    assert f"--ckpt_path {tmp_path / 'checkpoints' / 'last.ckpt'}" in result.stderr


def test_a_missing_folder_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("data: {folder: nowhere/from_a_config}")
    script = (
        "import sys; from ear_vae.cli import main\n"
        "for options in (['--data.folder', 'nowhere/alone'], ['--data.folder=[., nowhere/in_a_list]'],\n"
        "    ['--data.folder', '.', '--data.validation_folder', 'nowhere/validation'],\n"
        "    ['--config', sys.argv[1]]):\n"
        "    assert main(['fit', '--config', 'warmup', *options]) == 1\n"
        "print({'torch', 'lightning'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "mine.yaml"], capture_output=True, text=True, check=False
    )
    assert result.stdout == "set()\n", result.stderr
    names = ("alone", "in_a_list", "validation", "from_a_config")
    for line, name in zip(result.stderr.splitlines(), names, strict=True):
        assert line.endswith(f"nowhere/{name}: no such file or folder")


def test_help_fits_a_few_screens_and_is_true(capsys: pytest.CaptureFixture[str]) -> None:
    result = ear_vae("fit", "--help")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert len(lines) <= 72
    assert max(map(len, lines)) <= 110
    for name in shipped_configs():
        assert re.search(rf"\b{name}\b", result.stdout), name
    with pytest.raises(SystemExit) as left:
        main(["fit", "--help-all"])
    assert left.value.code == 0
    everything = capsys.readouterr().out
    assert "validate" not in everything.split("\n\n")[0]
    ours = {"--force", "--debug", "--help-all"}
    for option in set(re.findall(r"--[a-z_.-]+[a-z]", result.stdout)) - ours:
        # Of a part that may be absent, such as the discriminator, the help shows the whole only.
        assert option in everything or option.rpartition(".")[0] + " " in everything, option


def test_shortened_options_are_refused(music: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["fit", "--data.folder", str(music), "--trainer.max_step", "1"])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert "--trainer.max_step" in error
    assert not re.search(r"validate|predict", error)


def test_another_optimizer_from_a_config(
    music: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sgd.yaml").write_text(
        "model:\n  optimizer:\n    warmup_steps: 0\n    algorithm:\n      class_path: torch.optim.SGD\n"
        "      init_args: {lr: 0.25, momentum: 0.5}\n"
        "    schedule:\n      class_path: torch.optim.lr_scheduler.StepLR\n      init_args: {step_size: 1}\n"
    )
    command = [
        "fit",
        "--data.folder",
        str(music),
        *SHORT,
        "--trainer.default_root_dir",
        str(tmp_path / "run"),
    ]
    command += ["--config", str(tmp_path / "sgd.yaml"), "--trainer.max_steps", "2"]
    assert main(command) == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    (group,) = content["optimizer_states"][0]["param_groups"]
    assert (group["momentum"], group["initial_lr"]) == (0.5, 0.25)
    assert group["lr"] == pytest.approx(0.25 * 0.1**2)
    assert "algorithm SGD, lr 0.25, momentum 0.5" in content["ear_vae"]["settings"]["optimizer"]
    command[command.index("2")] = "3"
    assert main([*command, "--ckpt_path", str(last)]) == 0
    other = ["--model.optimizer.algorithm", "null", "--model.optimizer.schedule", "null"]
    assert main([*command, *other, "--ckpt_path", str(last)]) == 1
    assert "optimizers: ['SGD'] there, ['AdamW'] here" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_config_for_one_names_the_way_out(
    music: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fit", "--config", "warmup", "--config", "one_gpu", "--data.folder", str(music)]
    assert main([*command, "--trainer.default_root_dir", str(tmp_path)]) == 1
    assert (
        "torch sees no GPU here (ear-vae env says why); for a CPU give --config one_cpu"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("config", ["finetune", "finetune_decoder"])
def test_without_the_hub_the_option_that_does_without_is_named_and_works(
    config: str,
    music: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    command = ["fit", "--config", config, "--config", "one_cpu", "--data.folder", str(music)]
    command += ["--trainer.default_root_dir", str(tmp_path / "run"), "--model.discriminator.channels", "4"]
    assert main(command) == 1
    found = re.search(
        r"the Hub cannot be asked .*\((--model\.pretrained ear-vae-tiny)\)$", capsys.readouterr().err.strip()
    )
    assert found
    # Up to where the model is there.
    assert (
        main([*command, *found[1].split(), "--data.segment_seconds", "0.1", "--trainer.max_steps", "0"]) == 0
    )
    assert "training a model of 2.8 M weights" in capsys.readouterr().err


@pytest.mark.slow
def test_training_in_python_as_documented_says_what_it_does_and_no_more(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (code,) = (block for block in blocks if "L.Trainer(max_steps=1000" in block)
    code = code.replace("max_steps=1000", "max_steps=2").replace(
        "segment_seconds=0.75", "segment_seconds=0.1"
    )
    for folder in ("MUSIC", "OTHER_MUSIC"):
        (tmp_path / folder).mkdir()
        noise = 0.1 * np.random.default_rng(0).standard_normal((9 * 44_100, 2))
        soundfile.write(tmp_path / folder / "a.wav", noise, 44_100)
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    shown = result.stdout + result.stderr
    assert re.search(r"100%.* 2/2 .*total=", shown)
    assert not any(word in shown for word in (*NOISE, "SIGTERM", "LeafSpec"))
    assert EarVAE.from_pretrained(tmp_path / "my-model").latent_dim == 64


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_the_bar_of_a_run_resumed_within_an_epoch_knows_all_steps(tmp_path: Path) -> None:
    """Lightning starts no epoch then. The rate is that of the steps since the bar's initial one."""
    data = list(0.1 * torch.randn(3, 1, 2, 4096))

    def fit(steps: int, **options: Any) -> list[tuple[int, int, int]]:
        seen: list[tuple[int, int, int]] = []
        bar = StepProgressBar()

        class Look(L.Callback):
            def on_train_batch_start(self, *_: Any) -> None:
                shown = bar.train_progress_bar
                seen.append((shown.n, shown.total, shown.initial))

            def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
                if trainer.global_step == 2:
                    trainer.save_checkpoint(tmp_path / "within.ckpt")

        module = EarVAEModule(
            EarVAEConfig(channels=4, channel_multipliers=(1, 2, 2, 2, 2)),
            objective=ObjectiveConfig(window_sizes=(512, 128)),
        )
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[bar, Look()],
        )
        trainer.fit(module, DataLoader(data, batch_size=None), **options)
        return seen

    assert fit(4) == [(0, 4, 0), (1, 4, 0), (2, 4, 0), (3, 4, 0)]
    assert fit(4, ckpt_path=tmp_path / "within.ckpt") == [(2, 4, 2), (3, 4, 2)]
