"""A run that is stopped and resumed ends with the weights of one that never stopped, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import soundfile
import torch

from ear_vae import EarVAEConfig, EarVAEError
from ear_vae.network.discriminator import DiscriminatorConfig
from ear_vae.training import AudioDataModule, EarVAEModule
from ear_vae.training.callbacks import Checkpoints
from ear_vae.training.module import ObjectiveConfig
from ear_vae.training.optimization import OptimizerConfig

TINY = EarVAEConfig(channels=4, channel_multipliers=(1, 2, 2, 2, 2))
STEPS = 7
pytestmark = pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")


class Stop(L.Callback):
    """Ends the process in the middle of the third step's end, in one way or another."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step != 3:
            return
        if self.how == "exception":
            raise RuntimeError("pulled the plug")
        os.kill(os.getpid(), getattr(signal, self.how))


def train(folder: Path, root: Path, *callbacks: L.Callback, resume: bool = False) -> None:
    torch.manual_seed(0)
    module = EarVAEModule(
        TINY,
        discriminator=DiscriminatorConfig(window_sizes=(512, 128), channels=4),
        objective=ObjectiveConfig(balanced=True),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        discriminator_optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
    )
    data = AudioDataModule(
        folder, segment_seconds=0.1, batch_size=2, segments_per_epoch=10, num_workers=0, seed=5
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        callbacks=[*callbacks, Checkpoints(every_n_steps=2)],
    )
    checkpoint = root / "checkpoints" / "last.ckpt" if resume else None
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("music")
    generator = np.random.default_rng(0)
    for index in range(3):
        soundfile.write(folder / f"{index}.wav", 0.1 * generator.standard_normal((44_100, 2)), 44_100)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("uninterrupted")
    train(folder, root)
    return checkpoint_of(root)


def checkpoint_of(root: Path) -> dict[str, Any]:
    assert [path.name for path in (root / "checkpoints").iterdir()] == ["last.ckpt"]
    return torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same(one: Any, other: Any, where: str = "checkpoint") -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}/{index}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def assert_same_training(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Weights, averages, balancer, discriminator, both optimizers and both schedules."""
    assert one["global_step"] == STEPS
    assert {"vae", "ema", "discriminator", "balancer"} <= {n.partition(".")[0] for n in one["state_dict"]}
    assert len(one["optimizer_states"]) == len(one["lr_schedulers"]) == 2
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "ear_vae"):
        assert_same(one[part], other[part], part)


@pytest.mark.parametrize(("how", "saved_at"), [("exception", 2), ("SIGTERM", 3)])
def test_stopped_in_the_middle_of_an_epoch(
    how: str, saved_at: int, folder: Path, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    with pytest.raises((RuntimeError, SystemExit)):
        train(folder, tmp_path, Stop(how))
    assert checkpoint_of(tmp_path)["global_step"] == saved_at
    train(folder, tmp_path, resume=True)
    assert_same_training(checkpoint_of(tmp_path), uninterrupted)


def test_killed(folder: Path, tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from test_resume import Stop, train\n"
        "train(Path(sys.argv[2]), Path(sys.argv[3]), Stop('SIGKILL'))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, Path(__file__).parent, folder, tmp_path],
        capture_output=True,
        check=False,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert checkpoint_of(tmp_path)["global_step"] == 2
    train(folder, tmp_path, resume=True)
    assert_same_training(checkpoint_of(tmp_path), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_interrupted_at_the_command_line(how: str, folder: Path, tmp_path: Path) -> None:
    """Ctrl-C and a job scheduler's signal reach the workers of the data, too; none of them falls over it."""
    script = (
        "import os, subprocess, sys, time; sys.path.insert(0, sys.argv.pop(1))\n"
        "import test_resume\n"
        # As from outside, for torch's workers look who sends it; and time for them to fall over it.
        "def kill(process, number):\n"
        "    sender = f'import os; os.killpg({os.getpgid(0)}, {int(number)})'\n"
        "    subprocess.run([sys.executable, '-c', sender], stderr=subprocess.DEVNULL)\n"
        "    time.sleep(1)\n"
        "os.kill = kill\n"
        "from ear_vae.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["fit", "--config", "smoke", "--data.folder", folder, "--data.num_workers", "1"]
    arguments += ["--model.config.channels", "4", "--model.config.channel_multipliers", "[1,2,2,2,2]"]
    stop = {"class_path": "test_resume.Stop", "init_args": {"how": how}}
    arguments += ["--trainer.callbacks", json.dumps([stop])]
    arguments += ["--trainer.default_root_dir", tmp_path, "--trainer.logger", "false"]
    result = subprocess.run(
        [sys.executable, "-c", script, Path(__file__).parent, *arguments],
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    assert result.returncode == 128 + signal.Signals[how], result.stderr
    assert "resume with: ear-vae fit" in result.stderr
    assert "KeyboardInterrupt" not in result.stderr
    assert "Received" not in result.stderr
    assert checkpoint_of(tmp_path)["global_step"] == 3


def test_the_end_of_an_epoch_is_no_special_place(
    folder: Path, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    """Five batches an epoch, so that step 5 ends one."""

    class StopAtFive(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="plug"):
        train(folder, tmp_path, StopAtFive())
    assert checkpoint_of(tmp_path)["global_step"] == 5
    train(folder, tmp_path, resume=True)
    assert_same_training(checkpoint_of(tmp_path), uninterrupted)


def test_a_full_disk_leaves_the_checkpoint_before(folder: Path, tmp_path: Path) -> None:
    """Files of this process may not grow beyond a size that no checkpoint fits in."""
    resource = pytest.importorskip("resource")

    class FullDisk(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(EarVAEError, match=r"last\.ckpt: the checkpoint could not be written"):
            train(folder, tmp_path, FullDisk())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert checkpoint_of(tmp_path)["global_step"] == 2
