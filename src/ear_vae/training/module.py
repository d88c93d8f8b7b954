"""The LightningModule that trains an εar-VAE."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from ear_vae.config import EarVAEConfig
from ear_vae.dsp.distortion import si_sdr_db
from ear_vae.errors import EarVAEError
from ear_vae.losses import ReconstructionObjective
from ear_vae.losses.objective import DEFAULT_WINDOW_SIZES
from ear_vae.training import filter_bank
from ear_vae.training.data import AudioDataModule
from ear_vae.training.weight_norm import apply_weight_norm, remove_weight_norm
from ear_vae.vae import EarVAE

_FILTER_BANK_SEGMENTS = 192
_FILTER_BANK_FRAMES = 96


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, with a linear warm-up and a cosine decay to a fraction of the rate over the Trainer's steps.

    Args:
        learning_rate: After the warm-up.
        betas: Of AdamW.
        weight_decay: Of AdamW.
        warmup_steps: Optimizer steps from zero to the full rate.
        final_fraction: Of the learning rate, at the Trainer's last step; 1 keeps it constant.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.8, 0.99)
    weight_decay: float = 1e-3
    warmup_steps: int = 1_000
    final_fraction: float = 0.1

    def factor(self, step: int, total_steps: int) -> float:
        """The learning rate at `step` as a fraction of `learning_rate`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_fraction + (1 - self.final_fraction) * cosine


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights over `losses.objective.DEFAULT_LOSS_WEIGHTS` and STFT window sizes in samples."""

    weights: dict[str, float] = field(default_factory=dict)
    window_sizes: tuple[int, ...] = DEFAULT_WINDOW_SIZES


class EarVAEModule(L.LightningModule):
    """The VAE and its objective, for `lightning.Trainer`.

    Weight norm is put on at construction and folded away by `export`, so that neither the files nor
    the public class know of it. Terms are logged as `train/NAME` and `validation/NAME`.

    Args:
        config: Architecture of a new model.
        pretrained: Name or folder of a model to continue from, instead of `config`.
        objective: The loss terms.
        optimizer: The optimizer and its schedule.
        initialization: Of a new model: `random`, or `filter_bank` (see `ear_vae.training.filter_bank`),
            which needs the Trainer's data to choose its bands from.

    Raises:
        EarVAEError: Both or neither of `config` and `pretrained`, or an unknown loss term.
    """

    def __init__(
        self,
        config: EarVAEConfig | None = None,
        pretrained: str | None = None,
        objective: ObjectiveConfig = ObjectiveConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        initialization: Literal["random", "filter_bank"] = "random",
    ) -> None:
        super().__init__()
        if (config is None) == (pretrained is None):
            raise EarVAEError("give either a config for a new model or a pretrained one to continue from")
        if initialization not in ("random", "filter_bank"):
            raise EarVAEError(f"initialization must be random or filter_bank, got {initialization!r}")
        self.vae = EarVAE(config) if pretrained is None else EarVAE.from_pretrained(pretrained)
        self.vae.requires_grad_(True)
        self.initialization = initialization if pretrained is None else "random"
        self.optimizer_config = optimizer
        self.objective = ReconstructionObjective(
            self.vae.sample_rate, weights=objective.weights, window_sizes=objective.window_sizes
        )
        apply_weight_norm(self.vae)

    def setup(self, stage: str) -> None:
        """Starts a new model from the filter bank, unless a checkpoint is about to be loaded."""
        if stage == "fit" and self.initialization == "filter_bank" and self.trainer.ckpt_path is None:
            self._start_from_filter_bank(getattr(self.trainer, "datamodule", None))

    def training_step(self, batch: Tensor, batch_index: int) -> Tensor:
        """One step on audio [B, 2, T]: the weighted sum of the terms on a draw from the posterior."""
        estimate, posterior = self.vae(batch, sample=True)
        terms = self.objective.terms(estimate, batch, posterior)
        total = self.objective.total(terms)
        self._log_terms("train", {**terms, "total": total})
        return total

    def validation_step(self, batch: Tensor, batch_index: int) -> None:
        """The terms and the SI-SDR in dB on audio [1, 2, T], decoded from the posterior's mean."""
        estimate, posterior = self.vae(batch)
        terms = self.objective.terms(estimate, batch, posterior)
        terms["total"] = self.objective.total(terms)
        terms["si_sdr_db"] = si_sdr_db(estimate, batch).mean()
        self._log_terms("validation", terms)

    def on_train_start(self) -> None:
        """Refuses data at another rate than the model's."""
        rate = getattr(getattr(self.trainer, "datamodule", None), "sample_rate", self.vae.sample_rate)
        if rate != self.vae.sample_rate:
            raise EarVAEError(f"the data is at {rate} Hz, the model works at {self.vae.sample_rate} Hz")

    def configure_optimizers(self) -> Any:
        """AdamW over all weights, its learning rate set anew every step."""
        settings = self.optimizer_config
        optimizer = torch.optim.AdamW(
            self.vae.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        total_steps = int(min(self.trainer.estimated_stepping_batches, 2**31))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: settings.factor(step, total_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def folded(self, name: str | None = None) -> EarVAE:
        """A copy of the model as users load it: plain weights, evaluation mode, frozen, on the CPU."""
        vae = EarVAE(self.vae.config, name=name or self.vae.name)
        plain = {}
        for tensor_name in vae.state_dict():
            # A parametrized module computes its folded weight when asked for it by name.
            owner, _, attribute = tensor_name.rpartition(".")
            plain[tensor_name] = getattr(self.vae.get_submodule(owner), attribute).detach().cpu()
        vae.load_state_dict(plain)
        return vae.eval().requires_grad_(False)

    def export(self, directory: str | Path) -> None:
        """Writes the trained model as a folder that `EarVAE.from_pretrained` loads.

        Raises:
            EarVAEError: The folder cannot be written to.
        """
        self.folded(Path(directory).name).save_pretrained(directory)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the architecture, so that a checkpoint can be told from one of another model."""
        checkpoint["ear_vae_config"] = self.vae.config.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another architecture.

        Raises:
            EarVAEError: The checkpoint's architecture differs, or it is not one of this module.
        """
        saved = checkpoint.get("ear_vae_config")
        if saved != self.vae.config.to_dict():
            raise EarVAEError(
                f"the checkpoint holds another architecture: {saved}, not {self.vae.config.to_dict()}"
            )

    def _start_from_filter_bank(self, data: Any) -> None:
        if not isinstance(data, AudioDataModule):
            raise EarVAEError("initialization: filter_bank needs an AudioDataModule to choose its bands from")
        length = min(
            _FILTER_BANK_FRAMES * self.vae.downsampling_ratio,
            int(min(f.duration_seconds for f in data.train_files) * self.vae.sample_rate),
        )
        segments = data.train_dataset(segment_samples=length, augment=False)
        audio = torch.stack([segments[index] for index in range(_FILTER_BANK_SEGMENTS)])
        choice = filter_bank.plan(self.vae.config, filter_bank.analyse(self.vae.config, audio))
        remove_weight_norm(self.vae)
        filter_bank.initialize(self.vae, choice)
        apply_weight_norm(self.vae)

    def _log_terms(self, stage: str, terms: Mapping[str, Tensor]) -> None:
        values = {f"{stage}/{name}": value.detach() for name, value in terms.items()}
        self.log_dict(
            values,
            on_step=stage == "train",
            on_epoch=stage != "train",
            batch_size=1,
            sync_dist=stage != "train",
        )
