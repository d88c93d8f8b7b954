"""Audio files as training and validation data."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader

from ear_vae.errors import EarVAEError
from ear_vae.limits import sample_rate_of, whole_number
from ear_vae.training.checkpoint_reading import changes
from ear_vae.training.data.dataset import Augmentation, MiddleExcerpts, SegmentDataset
from ear_vae.training.data.loader import SegmentLoader
from ear_vae.training.data.sources import AudioFile, Policy, find_usable_files, listed_sources

_LOG = logging.getLogger(__name__)


class ResumableDataModule(L.LightningDataModule):
    """A data module that warns where a run resumes on other data, by what `state_dict` says of them."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warns where the data differ from those of the checkpoint that is resumed from."""
        changed = changes(state_dict, self.state_dict())
        if changed and (self.trainer is None or self.trainer.is_global_zero):
            _LOG.warning(
                "resuming on other data than the checkpoint's, so not as if it had never stopped: %s", changed
            )

    def leave_validation_out(self) -> None:
        """Has the Trainer validate on nothing."""
        if self.trainer is not None:
            # An empty loader would do the same, but each rank and epoch would warn of it.
            self.trainer.limit_val_batches = 0


class AudioDataModule(ResumableDataModule):
    """Random training segments and fixed validation excerpts of audio files in any format.

    Which segments a step trains on depends on `seed` and the number of the step alone: not on the number of
    workers or processes, and not on interruptions.

    Args:
        folder: Training audio: a folder, which is searched recursively, a manifest (see
            `ear_vae.training.data.sources.find_usable_files`), or a list of these.
        validation_folder: Validation audio, given like `folder`; without it there is no validation.
        sample_rate: Sample rate in Hz to which everything is resampled; that of the model.
        segment_seconds: Length of a training segment, rounded to whole `segment_multiple`s.
        segment_multiple: Number of samples of which segments are multiples; the model's downsampling ratio.
        validation_seconds: Length of a validation excerpt, taken from the middle of each file.
        batch_size: Number of segments per step and process.
        segments_per_epoch: Number of segments per epoch of the Trainer, over all processes.
        num_workers: Number of processes that read ahead.
        augmentation: Changes to training segments; None for none.
        min_level_db: Lowest root mean square of a training segment in dB relative to full scale; quieter ones
            are drawn again. None keeps silence.
        mono: Treatment of mono files: `duplicate` makes two equal channels of them; `skip` leaves them out,
            and draws segments with two equal channels again.
        min_bandwidth_hz: Lowest bandwidth of a training file in Hz; the spectrum of many mp3s breaks off at
            16 kHz. Measuring it takes a while, once.
        cache_dir: Folder in which lengths and bandwidths of files are cached; in the user's cache by default.
        seed: Seed that fixes which segments are drawn.

    Raises:
        EarVAEError: A value is out of range; on `setup`, nothing usable is found.
    """

    def __init__(
        self,
        # A list first: as text, any text would do.
        folder: list[str] | str | Path,
        validation_folder: list[str] | str | Path | None = None,
        sample_rate: int = 44_100,
        segment_seconds: float = 1.5,
        segment_multiple: int = 1024,
        validation_seconds: float = 8.0,
        batch_size: int = 8,
        segments_per_epoch: int = 8_000,
        num_workers: int = 2,
        augmentation: Augmentation | None = Augmentation(),
        min_level_db: float | None = -60.0,
        mono: Literal["duplicate", "skip"] = "duplicate",
        min_bandwidth_hz: float | None = None,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        lowest = {
            "batch_size": 1,
            "segments_per_epoch": 1,
            "segment_multiple": 1,
            "num_workers": 0,
            "seed": 0,
        }
        given = (batch_size, segments_per_epoch, segment_multiple, num_workers, seed)
        for (name, least), value in zip(lowest.items(), given, strict=True):
            whole_number(value, name, lowest=least)
        sample_rate = sample_rate_of(sample_rate)
        if not 0 < segment_seconds < math.inf or not 0 < validation_seconds < math.inf:
            raise EarVAEError("segment_seconds and validation_seconds must be finite and more than 0")
        if min_level_db is not None and not math.isfinite(min_level_db):
            raise EarVAEError(f"min_level_db must be a level in dB or null, got {min_level_db}")
        self.sources = listed_sources(folder)
        self.validation_sources = [] if validation_folder is None else listed_sources(validation_folder)
        self.sample_rate = sample_rate
        self.segment_samples = (
            max(1, round(segment_seconds * sample_rate / segment_multiple)) * segment_multiple
        )
        self.validation_seconds = validation_seconds
        self.batch_size = batch_size
        self.segments_per_epoch = segments_per_epoch
        self.num_workers = num_workers
        self.augmentation = augmentation
        self.min_level_db = min_level_db
        speed = 0.0 if augmentation is None else augmentation.speed
        self.policy = Policy(self.segment_samples / sample_rate * (1 + speed), min_bandwidth_hz, mono)
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.seed = seed
        self.train_files: list[AudioFile] = []
        self.validation_files: list[AudioFile] = []

    def setup(self, stage: str) -> None:
        """Finds the files; called by the Trainer.

        Raises:
            EarVAEError: There are none, or testing or predicting has no validation folder to do it with.
        """
        if stage in ("test", "predict") and not self.validation_sources:
            raise EarVAEError(f"to {stage}, the data module needs a validation_folder")
        if stage == "fit" and not self.train_files:
            self.train_files = find_usable_files(self.sources, self.policy, cache_dir=self.cache_dir)
        if self.validation_sources and not self.validation_files:
            policy = Policy(self.validation_seconds)
            self.validation_files = find_usable_files(
                self.validation_sources, policy, cache_dir=self.cache_dir
            )
        if not self.validation_sources:
            self.leave_validation_out()

    def state_dict(self) -> dict[str, Any]:
        """Returns what is trained on as plain values, for checkpoints."""
        return {
            "data": [str(source).encode(errors="backslashreplace").decode() for source in self.sources],
            "files": len(self.train_files),
            "seconds": round(sum(file.duration_seconds for file in self.train_files)),
            "weight": round(sum(file.weight for file in self.train_files), 6),
            "segment samples": self.segment_samples,
            "batch size": self.batch_size,
            "segments per epoch": self.segments_per_epoch,
            "seed": self.seed,
        }

    def segments(self, *, samples: int | None = None) -> SegmentDataset:
        """Returns training segments as they are in the files, without augmentation.

        Args:
            samples: Length of a segment in samples; that of the training segments by default.
        """
        return self._dataset(samples or self.segment_samples, None)

    def train_dataloader(self) -> SegmentLoader:
        """Returns a loader of batches [B, 2, segment_samples] of random segments."""
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return SegmentLoader(
            self._dataset(self.segment_samples, self.augmentation),
            batch_size=self.batch_size,
            segments_per_epoch=self.segments_per_epoch,
            rank=0 if self.trainer is None else self.trainer.global_rank,
            processes=1 if self.trainer is None else self.trainer.world_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=on_gpu,
        )

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Returns a loader of one excerpt [1, 2, T] of each validation file."""
        dataset = MiddleExcerpts(self.validation_files, self.sample_rate, self.validation_seconds)
        return DataLoader(dataset, batch_size=1)

    def test_dataloader(self) -> DataLoader[Tensor]:
        """Returns the loader of `val_dataloader`, for `Trainer.test`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """Returns the loader of `val_dataloader`, for `Trainer.predict`."""
        return self.val_dataloader()

    def _dataset(self, segment_samples: int, augmentation: Augmentation | None) -> SegmentDataset:
        return SegmentDataset(
            self.train_files,
            sample_rate=self.sample_rate,
            segment_samples=segment_samples,
            seed=self.seed,
            augmentation=augmentation,
            min_level_db=self.min_level_db,
            mono=self.policy.mono,
        )
