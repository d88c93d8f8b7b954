"""What happens beside the training steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from ear_vae.errors import EarVAEError
from ear_vae.training.module import EarVAEModule
from ear_vae.training.pictures import spectrogram_picture


class Checkpoints(Checkpoint):
    """Writes `last.ckpt` at regular steps, when the process is told to terminate, and at the end.

    A run resumed from it goes on exactly as if it had not stopped. The file is complete before it takes
    the place of the one before.

    Args:
        every_n_steps: Steps of the VAE between two checkpoints.
        keep_every_n_steps: Also leaves one for good, as `step-N.ckpt`; none by default.
        directory: `checkpoints` in the Trainer's root folder by default.

    Raises:
        EarVAEError: An interval below 1; during training, a checkpoint that cannot be written.
    """

    def __init__(
        self,
        every_n_steps: int = 1_000,
        keep_every_n_steps: int | None = None,
        directory: str | None = None,
    ) -> None:
        if every_n_steps < 1 or (keep_every_n_steps is not None and keep_every_n_steps < 1):
            raise EarVAEError("every_n_steps and keep_every_n_steps must be at least 1")
        self.every_n_steps = every_n_steps
        self.keep_every_n_steps = keep_every_n_steps
        self.directory = directory
        self._saved_step = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Does not write again what was just resumed from."""
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes a checkpoint if it is time, or the last chance."""
        step = trainer.global_step
        if step % self.every_n_steps == 0 or trainer.received_sigterm:
            self._save(trainer, "last")
        if self.keep_every_n_steps and step % self.keep_every_n_steps == 0:
            self._save(trainer, f"step-{step}", again=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes what training ended with."""
        self._save(trainer, "last")

    def _save(self, trainer: L.Trainer, name: str, again: bool = False) -> None:
        if trainer.global_step == self._saved_step and not again:
            return
        folder = Path(self.directory or Path(trainer.default_root_dir) / "checkpoints")
        path, temporary = folder / f"{name}.ckpt", folder / f".{name}.ckpt.part"
        try:
            trainer.save_checkpoint(temporary, weights_only=False)
            if trainer.is_global_zero:
                os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
            temporary.unlink(missing_ok=True)
            raise EarVAEError(
                f"{path}: the checkpoint could not be written ({error}); the one before it is still there"
            ) from error
        self._saved_step = trainer.global_step


class ExportModel(L.Callback):
    """Writes the model as a folder for `EarVAE.from_pretrained` after each validation and at the end.

    Args:
        directory: The folder; `model` in the Trainer's root folder by default.
    """

    def __init__(self, directory: str | None = None) -> None:
        self.directory = directory

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports, except on the check before training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._export(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports what training ended with."""
        self._export(trainer, pl_module)

    def _export(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, EarVAEModule)
        if trainer.is_global_zero:
            module.export(self.directory or Path(trainer.default_root_dir) / "model")


class ListeningExamples(L.Callback):
    """Sends rebuilt validation excerpts and their spectrograms to TensorBoard.

    The originals go there once. Other loggers get the figures only.

    Args:
        count: Of excerpts, the first ones.

    Raises:
        EarVAEError: A negative count.
    """

    def __init__(self, count: int = 4) -> None:
        if count < 0:
            raise EarVAEError(f"count must be 0 or more, got {count}")
        self.count = count
        self._sent_originals = False

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Tensor,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Rebuilds the excerpt once more and sends it."""
        writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if batch_idx >= self.count or not writers or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, EarVAEModule)
        signals = {"rebuilt": pl_module.reconstruct(batch).audio[0]}
        if not self._sent_originals:
            signals["original"] = batch[0]
        for writer in writers:
            for name, audio in signals.items():
                # TensorBoard plays one channel.
                mono = audio.mean(dim=0).clamp(-1, 1).cpu()
                tag, step = f"{name}/{batch_idx}", trainer.global_step
                writer.add_audio(tag, mono, step, sample_rate=pl_module.vae.sample_rate)
                writer.add_image(tag, spectrogram_picture(mono, pl_module.vae.sample_rate), step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes that the originals are there."""
        self._sent_originals = True
