"""Callbacks of training: checkpoints, exported models, a progress bar and listening examples."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from ear_vae.errors import EarVAEError
from ear_vae.training.module import EarVAEModule
from ear_vae.training.pictures import spectrogram_picture

# Of the loss that the bar shows, in a step.
_LOSS_DECAY = 0.98
_REFRESH_STEPS = 5


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint completely before it replaces the previous one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes to a file beside `path`, then renames it.

        Raises:
            EarVAEError: The checkpoint cannot be written.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.part")
        try:
            super().save_checkpoint(checkpoint, temporary, storage_options)
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
            temporary.unlink(missing_ok=True)
            raise EarVAEError(
                f"{path}: the checkpoint could not be written ({error}); an earlier one is still there"
            ) from error


class Checkpoints(ModelCheckpoint):
    """Writes `last.ckpt` at regular steps, when the process is told to terminate, and at the end.

    A run resumed from it continues exactly as if it had not stopped. A file is complete before it replaces
    the previous one. With `monitor`, Lightning's `ModelCheckpoint` also keeps the best ones.

    Args:
        every_n_steps: Steps of the VAE between two checkpoints.
        keep_every_n_steps: Steps of the VAE between checkpoints that are kept, as `step-N.ckpt`; none by
            default.
        directory: Folder of the checkpoints, `checkpoints` in the Trainer's root folder by default.
        monitor: Logged value to keep the best checkpoints by, such as `validation/si_sdr_db`, as
            `best-step=N.ckpt` after a validation; none by default.
        mode: Whether the largest (`max`) or the smallest (`min`) value is the best.
        save_top_k: Number of best checkpoints to keep.

    Raises:
        EarVAEError: An interval or `save_top_k` below 1; a value of the validation to monitor where nothing
            is validated; a checkpoint that cannot be written.
    """

    def __init__(
        self,
        every_n_steps: int = 1_000,
        keep_every_n_steps: int | None = None,
        directory: str | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "max",
        save_top_k: int = 1,
    ) -> None:
        if every_n_steps < 1 or (keep_every_n_steps is not None and keep_every_n_steps < 1):
            raise EarVAEError("every_n_steps and keep_every_n_steps must be at least 1")
        if save_top_k < 1:
            raise EarVAEError(f"save_top_k must be at least 1, got {save_top_k}")
        super().__init__(
            dirpath=directory,
            filename="best-{step}",
            monitor=monitor,
            mode=mode,
            save_top_k=0 if monitor is None else save_top_k,
            every_n_epochs=1,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.every_n_steps = every_n_steps
        self.keep_every_n_steps = keep_every_n_steps
        self._saved: tuple[int, int] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Uses the Trainer's root folder by default, and has checkpoints replaced only by complete ones."""
        if self.dirpath is None:
            self.dirpath = os.path.join(trainer.default_root_dir, "checkpoints")
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remembers the checkpoint that was resumed from, which need not be written again."""
        super().on_train_start(trainer, pl_module)
        if (self.monitor or "").startswith("validation/") and not trainer.enable_validation:
            raise EarVAEError(
                f"the best checkpoints are to be kept by {self.monitor}, but nothing is validated; give the "
                "data a validation_folder, or leave monitor out"
            )
        self._saved = (trainer.global_step, 0) if trainer.ckpt_path is not None else None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes a checkpoint if one is due, or if the process is told to terminate."""
        step = trainer.global_step
        is_new = self._saved is None or step != self._saved[0]
        if trainer.received_sigterm or (step and step % self.every_n_steps == 0 and is_new):
            self._save_last(trainer, batch_idx)
        if self.keep_every_n_steps and step and step % self.keep_every_n_steps == 0:
            kept = Path(self.dirpath or "") / f"step-{step}{self.FILE_EXTENSION}"
            if not trainer.strategy.broadcast(kept.exists()):
                trainer.save_checkpoint(kept, weights_only=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the last checkpoint."""
        if self._saved is None or trainer.global_step != self._saved[0]:
            self._save_last(trainer, -1)

    def _save_last(self, trainer: L.Trainer, batch_index: int) -> None:
        moment = (trainer.global_step, batch_index)
        if moment == self._saved:
            return
        path = os.path.join(self.dirpath or "", f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
        trainer.save_checkpoint(path, weights_only=False)
        self._saved = moment


class ExportModel(L.Callback):
    """Writes the model as a folder for `EarVAE.from_pretrained` with each checkpoint and at the end.

    Args:
        directory: Folder of the model; `model` in the Trainer's root folder by default.
    """

    def __init__(self, directory: str | None = None) -> None:
        self.directory = directory
        self._exported_step = -1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets the models of earlier runs."""
        self._exported_step = -1

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Exports the model of the checkpoint."""
        if trainer.state.fn == "fit":
            self._export(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports the final model."""
        self._export(trainer, pl_module)

    def _export(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, EarVAEModule)
        if trainer.is_global_zero and trainer.global_step != self._exported_step:
            module.export(self.directory or Path(trainer.default_root_dir) / "model")
        self._exported_step = trainer.global_step


class StepProgressBar(TQDMProgressBar):
    """Shows progress over the steps of the whole training, with a smoothed loss."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=_REFRESH_STEPS)
        self._every = _REFRESH_STEPS
        self._smoothed: float | None = None
        self._step = -1

    def on_train_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Shows all steps at once: a run that is resumed within an epoch comes to the start of none."""
        super().on_train_start(trainer, *arguments)
        # Reading the loss waits for a GPU; a CPU has just computed it, and its steps may take many seconds.
        self._every = 1 if trainer.strategy.root_device.type == "cpu" else _REFRESH_STEPS
        self._show_all_steps(trainer)
        # The bar's rate is that of the steps since then.
        self.train_progress_bar.initial = trainer.global_step

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Leaves the bar as it is: it is about the whole training, not the batches of an epoch."""
        self._show_all_steps(trainer)

    def _show_all_steps(self, trainer: L.Trainer) -> None:
        bar = self.train_progress_bar
        bar.total = trainer.max_steps if trainer.max_steps > 0 else None
        bar.n = self._step = trainer.global_step
        bar.set_description("Training")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar when a step is complete."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step % self._every == 0 or self._step == trainer.max_steps:
            self.train_progress_bar.n = self._step
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def state_dict(self) -> dict[str, Any]:
        """Returns the smoothed loss, with which a resumed run goes on."""
        return {"smoothed": self._smoothed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the smoothed loss of the run that is resumed."""
        smoothed = state_dict.get("smoothed")
        self._smoothed = smoothed if isinstance(smoothed, float) else None

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Returns the smoothed total of the loss terms, and the SI-SDR of the last validation."""
        metrics = trainer.callback_metrics
        shown = {}
        if (total := metrics.get("train/total")) is not None:
            value = float(total)
            before = value if self._smoothed is None else self._smoothed
            if value == value:  # the average would never recover from NaN
                decay = _LOSS_DECAY**self._every
                self._smoothed = decay * before + (1 - decay) * value
            shown["total"] = f"{before if self._smoothed is None else self._smoothed:.3f}"
        if (quality := metrics.get("validation/si_sdr_db")) is not None:
            shown["SI-SDR"] = f"{float(quality):.2f} dB"
        return shown


class ListeningExamples(L.Callback):
    """Sends rebuilt validation excerpts and their spectrograms to TensorBoard.

    The originals go there once. Other loggers get the figures only.

    Args:
        count: Number of excerpts, beginning with the first.

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
        """Rebuilds the excerpt again and sends it."""
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
        """Remembers that the originals were sent."""
        self._sent_originals = True
