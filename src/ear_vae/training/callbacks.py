"""What happens beside the training steps."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from ear_vae.training.module import EarVAEModule


class ExportModel(L.Callback):
    """Writes the model as a folder for `EarVAE.from_pretrained` after each validation and at the end.

    Args:
        directory: The folder; `model` in the Trainer's root folder by default.
    """

    def __init__(self, directory: str | None = None) -> None:
        self.directory = directory

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports, except on the check before training."""
        if not trainer.sanity_checking:
            self._export(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports what training ended with."""
        self._export(trainer, pl_module)

    def _export(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, EarVAEModule)
        if trainer.is_global_zero:
            module.export(self.directory or Path(trainer.default_root_dir) / "model")
