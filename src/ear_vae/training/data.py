"""Folders of music as training data."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ear_vae.audio import audio_info, find_audio_files, read_audio, resample
from ear_vae.errors import EarVAEError

_LOG = logging.getLogger(__name__)
# Samples read around a segment that has to be resampled, so that its edges see their neighbours.
_RESAMPLING_CONTEXT = 512


@dataclass(frozen=True)
class AudioFile:
    """One readable file and what its header says."""

    path: Path
    sample_rate: int
    num_samples: int

    @property
    def duration_seconds(self) -> float:
        return self.num_samples / self.sample_rate


def scan_folder(folder: Path, min_seconds: float) -> list[AudioFile]:
    """The audio files below `folder` that are at least `min_seconds` long, in the order of their paths.

    Files that cannot be read and files that are too short are reported through `logging` and left out.

    Raises:
        EarVAEError: The folder does not exist, or nothing usable is in it.
    """
    paths = find_audio_files(folder)
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(_probe, paths))
    readable = [file for file in found if isinstance(file, AudioFile)]
    for error in (entry for entry in found if isinstance(entry, EarVAEError)):
        _LOG.warning("skipped: %s", error)
    usable = [file for file in readable if file.duration_seconds >= min_seconds]
    if len(usable) < len(readable):
        _LOG.warning("skipped %d files shorter than %.2f s", len(readable) - len(usable), min_seconds)
    if not usable:
        raise EarVAEError(
            f"{folder}: nothing to train on: {len(paths)} audio files, {len(readable)} of them readable, "
            f"none at least {min_seconds:.2f} s long"
        )
    return usable


class SegmentDataset(Dataset[Tensor]):
    """Random segments of files; item `index` is always the same segment for one seed.

    A file is drawn with a probability proportional to its duration, a position in it uniformly. The
    segment is read by seeking and resampled if needed; mono files become stereo.

    Args:
        files: What to draw from.
        sample_rate: Of the segments, in Hz.
        segment_samples: Length of a segment.
        seed: Fixes which segment an index stands for.
        augment: Draw a gain of -6 to 0 dB, a channel swap and a polarity flip, none of which
            changes the relation between the channels' phases.
    """

    def __init__(
        self,
        files: list[AudioFile],
        *,
        sample_rate: int,
        segment_samples: int,
        seed: int,
        augment: bool,
    ) -> None:
        self.files = files
        self.sample_rate = sample_rate
        self.segment_samples = segment_samples
        self.seed = seed
        self.augment = augment
        self._weights = torch.tensor([file.duration_seconds for file in files], dtype=torch.float64)

    def __getitem__(self, index: int) -> Tensor:
        """Segment [2, segment_samples]; a file that fails to decode is replaced by another, and reported."""
        generator = torch.Generator().manual_seed(hash((self.seed, index)) % 2**63)
        for _ in range(len(self.files)):
            file = self.files[int(torch.multinomial(self._weights, 1, generator=generator))]
            try:
                segment = self._read(file, float(torch.rand(1, generator=generator)))
            except EarVAEError as error:
                _LOG.warning("skipped: %s", error)
                continue
            return self._augmented(segment, generator) if self.augment else segment
        raise EarVAEError(f"none of the {len(self.files)} training files could be read")

    def _read(self, file: AudioFile, position: float) -> Tensor:
        length = -(-self.segment_samples * file.sample_rate // self.sample_rate)
        start = int(position * (file.num_samples - length + 1))
        if file.sample_rate == self.sample_rate:
            audio, _ = read_audio(file.path, start=start, num_samples=length)
        else:
            before = min(start, _RESAMPLING_CONTEXT)
            audio, _ = read_audio(
                file.path, start=start - before, num_samples=before + length + _RESAMPLING_CONTEXT
            )
            audio = resample(audio, file.sample_rate, self.sample_rate)
            audio = audio[:, before * self.sample_rate // file.sample_rate :]
        audio = audio[:, : self.segment_samples]
        audio = torch.nn.functional.pad(audio, (0, self.segment_samples - audio.shape[1]))
        return audio.expand(2, -1) if audio.shape[0] == 1 else audio

    @staticmethod
    def _augmented(segment: Tensor, generator: torch.Generator) -> Tensor:
        gain_db, swap, flip = torch.rand(3, generator=generator).tolist()
        gain = 10 ** (-6 * gain_db / 20) * (-1 if flip < 0.5 else 1)
        return gain * (segment.flip(0) if swap < 0.5 else segment)


class SegmentSampler(Sampler[int]):
    """Consecutive indices, each epoch continuing where the one before ended."""

    def __init__(self, segments_per_epoch: int) -> None:
        self.segments_per_epoch = segments_per_epoch
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.segments_per_epoch

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * self.segments_per_epoch
        yield from range(start, start + self.segments_per_epoch)


class AudioDataModule(L.LightningDataModule):
    """Random training segments and fixed validation segments from folders of audio in any format.

    Args:
        folder: Training audio, searched recursively.
        validation_folder: Validation audio; without one the Trainer skips validation.
        sample_rate: What everything is resampled to, in Hz; the model's.
        segment_seconds: Length of a training segment, rounded to whole `segment_multiple`s.
        segment_multiple: In samples; the model's downsampling ratio.
        validation_seconds: Length of a validation excerpt, taken from the middle of each file.
        batch_size: Segments per step.
        segments_per_epoch: After which the Trainer's epoch ends.
        num_workers: Processes that read ahead.
        augment: Random gain, channel swap and polarity on training segments.
        seed: Fixes the order and position of all segments.

    Raises:
        EarVAEError: A value is out of range; on `setup`, a folder holds nothing usable.
    """

    def __init__(
        self,
        folder: str | Path,
        validation_folder: str | Path | None = None,
        sample_rate: int = 44_100,
        segment_seconds: float = 1.5,
        segment_multiple: int = 1024,
        validation_seconds: float = 8.0,
        batch_size: int = 8,
        segments_per_epoch: int = 8_000,
        num_workers: int = 2,
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(batch_size, segments_per_epoch, segment_multiple) < 1 or num_workers < 0:
            raise EarVAEError(
                "batch_size, segments_per_epoch and segment_multiple must be at least 1, num_workers 0"
            )
        self.folder = Path(folder)
        self.validation_folder = Path(validation_folder) if validation_folder else None
        self.sample_rate = sample_rate
        self.segment_samples = (
            max(1, round(segment_seconds * sample_rate / segment_multiple)) * segment_multiple
        )
        self.validation_seconds = validation_seconds
        self.batch_size = batch_size
        self.segments_per_epoch = segments_per_epoch
        self.num_workers = num_workers
        self.augment = augment
        self.seed = seed
        self.train_files: list[AudioFile] = []
        self.validation_files: list[AudioFile] = []

    def setup(self, stage: str) -> None:
        """Reads the headers of all files; called by the Trainer."""
        if stage == "fit" and not self.train_files:
            self.train_files = scan_folder(self.folder, self.segment_samples / self.sample_rate)
        if self.validation_folder and not self.validation_files:
            self.validation_files = scan_folder(self.validation_folder, self.validation_seconds)

    def train_dataset(
        self, *, segment_samples: int | None = None, augment: bool | None = None
    ) -> SegmentDataset:
        """The training segments, optionally of another length or without augmentation."""
        return SegmentDataset(
            self.train_files,
            sample_rate=self.sample_rate,
            segment_samples=segment_samples or self.segment_samples,
            seed=self.seed,
            augment=self.augment if augment is None else augment,
        )

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Batches [B, 2, segment_samples] of random segments."""
        return DataLoader(
            self.train_dataset(),
            batch_size=self.batch_size,
            sampler=SegmentSampler(self.segments_per_epoch),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            drop_last=True,
        )

    def val_dataloader(self) -> DataLoader[Tensor] | list[DataLoader[Tensor]]:
        """One excerpt [1, 2, T] per validation file."""
        if not self.validation_files:
            return []
        dataset = _MiddleExcerpts(self.validation_files, self.sample_rate, self.validation_seconds)
        return DataLoader(dataset, batch_size=1)


class _MiddleExcerpts(Dataset[Tensor]):
    def __init__(self, files: list[AudioFile], sample_rate: int, seconds: float) -> None:
        self.files, self.sample_rate, self.seconds = files, sample_rate, seconds

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        file = self.files[index]
        length = int(self.seconds * file.sample_rate)
        audio, _ = read_audio(file.path, start=(file.num_samples - length) // 2, num_samples=length)
        audio = resample(audio, file.sample_rate, self.sample_rate)
        return audio.expand(2, -1) if audio.shape[0] == 1 else audio


def _probe(path: Path) -> AudioFile | EarVAEError:
    try:
        info = audio_info(path)
    except EarVAEError as error:
        return error
    return AudioFile(path, info.sample_rate, info.num_samples)
