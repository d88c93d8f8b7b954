"""Stored latents as training data, and audio as validation data, for generative models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ear_vae.encoding import LatentDataset
from ear_vae.errors import EarVAEError
from ear_vae.limits import name_in_a_line, whole_number
from ear_vae.training.data.dataset import MiddleExcerpts
from ear_vae.training.data.loader import SegmentLoader
from ear_vae.training.data.module import ResumableDataModule
from ear_vae.training.data.sources import AudioFile, Policy, find_usable_files, listed_sources
from ear_vae.vae import EarVAE


class LatentDataModule(ResumableDataModule):
    """Random crops of stored latents to train on, and latents of audio files to validate on.

    Batches are those of `ear_vae.encoding.LatentDataset.collate`: `latents` [B, D, crop_frames], not
    normalized, `padding_mask`, `seconds_start`, `seconds_total` and `metadata`. Which crops a step trains on,
    and with which noise, depends on `seed` and the number of the step alone: not on the number of workers or
    processes, and not on interruptions.

    Validation batches are the same, and hold the `audio` [1, 2, T] besides: the middle of each file, encoded
    on the Trainer's device when its turn comes. Stored latents would hide what has changed in the model or in
    how the data set was made.

    Args:
        folder: The output of `ear-vae encode-dataset`, in any format.
        model: Name or folder of the model that made the latents, or the model; needed for validation, and to
            pad with silence where the data set holds none.
        validation_folder: Audio to validate on: folders and manifests as for `AudioDataModule`; without it
            there is no validation.
        crop_frames: Number of latent frames of a crop; shorter items are padded with silence.
        batch_size: Number of crops per step and process.
        crops_per_epoch: Number of crops per epoch of the Trainer, over all processes; by default one of each
            item.
        num_workers: Number of processes that read ahead.
        sample: Draw latents from the posterior; with False they are its mean. In validation they are the
            mean.
        seed: Seed that fixes all draws.

    Raises:
        EarVAEError: A value is out of range; on `setup`, nothing usable is found, or another model made the
            latents.
    """

    def __init__(
        self,
        folder: str | Path,
        model: str | Path | EarVAE | None = None,
        # A list first: as text, any text would do.
        validation_folder: list[str] | str | Path | None = None,
        crop_frames: int = 256,
        batch_size: int = 16,
        crops_per_epoch: int | None = None,
        num_workers: int = 2,
        sample: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        lowest = {"crop_frames": 1, "batch_size": 1, "num_workers": 0, "seed": 0}
        given = (crop_frames, batch_size, num_workers, seed)
        for (name, least), value in zip(lowest.items(), given, strict=True):
            whole_number(value, name, lowest=least)
        if crops_per_epoch is not None:
            whole_number(crops_per_epoch, "crops_per_epoch", lowest=1)
        if validation_folder is not None and model is None:
            raise EarVAEError("validation encodes audio: give the model that made the latents as model")
        self.folder = Path(folder)
        self.validation_sources = [] if validation_folder is None else listed_sources(validation_folder)
        self.crop_frames = crop_frames
        self.batch_size = batch_size
        self.crops_per_epoch = crops_per_epoch
        self.num_workers = num_workers
        self.sample = sample
        self.seed = seed
        self.dataset: LatentDataset | None = None
        self.validation_files: list[AudioFile] = []
        self._model = model
        self._vae = model if isinstance(model, EarVAE) else None

    @property
    def vae(self) -> EarVAE:
        """The model that made the latents, loaded when it is first asked for.

        Raises:
            EarVAEError: There is no such model, or none was given.
        """
        if self._vae is None:
            if self._model is None or isinstance(self._model, EarVAE):
                raise EarVAEError("the data have no model: give the one that made the latents as model")
            self._vae = EarVAE.from_pretrained(os.fspath(self._model))
        return self._vae

    def setup(self, stage: str) -> None:
        """Opens the latents and finds the validation files; called by the Trainer."""
        if stage == "fit" and self.dataset is None:
            # It is opened first: what is wrong with it is sooner said.
            dataset = LatentDataset(
                self.folder, crop_frames=self.crop_frames, seed=self.seed, sample=self.sample
            )
            if self._model is not None:
                self._require_made_by_the_model(dataset)
                dataset.silence = dataset.silence if dataset.silence is not None else self._silence()
            self.dataset = dataset
        if self.validation_sources and not self.validation_files:
            self.validation_files = find_usable_files(
                self.validation_sources, Policy(self._validation_seconds())
            )
        if not self.validation_sources:
            self.leave_validation_out()

    def state_dict(self) -> dict[str, Any]:
        """Returns what is trained on as plain values, for checkpoints; nothing where there is no training."""
        if (dataset := self.dataset) is None:
            return {}
        return {
            "data": str(self.folder).encode(errors="backslashreplace").decode(),
            "items": len(dataset),
            "model": dataset.items.weights_sha256,
            "crop frames": self.crop_frames,
            "batch size": self.batch_size,
            "crops per epoch": self.crops_per_epoch or len(dataset),
            "sample": self.sample,
            "seed": self.seed,
        }

    def train_dataloader(self) -> SegmentLoader:
        """Returns a loader of batches of random crops."""
        dataset = self._opened()
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return SegmentLoader(
            dataset,
            batch_size=self.batch_size,
            segments_per_epoch=self.crops_per_epoch or len(dataset),
            rank=0 if self.trainer is None else self.trainer.global_rank,
            processes=1 if self.trainer is None else self.trainer.world_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=on_gpu,
            collate_fn=dataset.collate,
        )

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Returns a loader of the audio of one excerpt of each validation file."""
        excerpts = _Excerpts(self.validation_files, self.vae.sample_rate, self._validation_seconds())
        # Without automatic batching: files differ by a sample where they are resampled.
        return DataLoader(excerpts, batch_size=None)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Encodes audio, where a batch holds it; called by the Trainer."""
        if "audio" not in batch:
            return batch
        audio: Tensor = batch["audio"]
        with torch.no_grad():
            posterior = self.vae.to(audio.device).encode(audio)
        latents = posterior.mode()
        mask = torch.ones(latents.shape[0], latents.shape[2], dtype=torch.bool, device=latents.device)
        return {**batch, "latents": latents, "padding_mask": mask}

    def _opened(self) -> LatentDataset:
        if self.dataset is None:
            raise EarVAEError("the latents are not open yet; call setup('fit')")
        return self.dataset

    def _silence(self) -> Tensor:
        silence = self.vae.silence(64)
        return silence[:, 32:33].cpu()

    def _validation_seconds(self) -> float:
        return self.crop_frames / self.vae.latent_rate

    def _require_made_by_the_model(self, dataset: LatentDataset) -> None:
        ours, theirs = self.vae.weights_sha256, dataset.items.weights_sha256
        if ours != theirs:
            raise EarVAEError(
                f"{self.folder}: its latents were made by a model with the fingerprint "
                f"{name_in_a_line(theirs)}, {self.vae.name} has {ours}; give the model that made them"
            )


class _Excerpts(Dataset[dict[str, Any]]):
    """The middle of each file with the facts of a batch of one."""

    def __init__(self, files: list[AudioFile], sample_rate: int, seconds: float) -> None:
        self.files, self.excerpts = files, MiddleExcerpts(files, sample_rate, seconds)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = self.files[index]
        start = (file.num_samples - int(self.excerpts.seconds * file.sample_rate)) // 2
        return {
            "audio": self.excerpts[index][None],
            "seconds_start": torch.tensor([start / file.sample_rate]),
            "seconds_total": torch.tensor([file.duration_seconds]),
            "metadata": [{"path": str(file.path)}],
        }
