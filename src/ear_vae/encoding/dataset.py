"""Random crops of stored latents, each determined by the seed and its number alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ear_vae.encoding.reading import LatentFolder, open_latents
from ear_vae.errors import EarVAEError
from ear_vae.limits import whole_number


class LatentDataset(Dataset[dict[str, Any]]):
    """Draws crops of the items of a data set of latents, and latents from their mean and std.

    Numbers go on beyond the length: 0 to len − 1 are each item once, in random order, len to 2 len − 1 each
    item once more, elsewhere in the item and with other noise. What a number stands for depends on `seed`
    alone, so that a run that resumes, or is shared among workers and ranks, sees what any other would:

        loader = DataLoader(
            dataset, batch_size, sampler=range(first, last), collate_fn=dataset.collate, num_workers=4
        )

    `ear_vae.training.LatentDataModule` keeps count of that. A loader that asks for the numbers below len in
    each epoch, as with `shuffle=True`, would get the same crops again.

    An item, which `collate` makes batches of:

    - `latents`: Tensor [D, crop_frames], float32. Not normalized, see `EarVAE.normalize`.
    - `padding_mask`: Boolean tensor [crop_frames], true where the item has frames, as in stable-audio-tools.
    - `seconds_start`: Place of the crop in the source file in seconds, a float.
    - `seconds_total`: Length of the source file in seconds, a float.
    - `metadata`: The user's columns as they were, such as `prompt`, and the source's `path` and `relpath`.

    Args:
        folder: The output of `ear-vae encode-dataset` in any format, or what `open_latents` returned.
        crop_frames: Number of latent frames of a crop; shorter items are padded with silence.
        seed: Seed that fixes all draws.
        sample: Draw latents from the posterior; with False they are its mean.
        silence: Latents of silence, [D, M], such as `EarVAE.silence(64)`: their middle frame is what short
            items are padded with. By default that of the folder.

    Raises:
        EarVAEError: There are no latents in the folder, it is not complete, or an argument is out of range.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | LatentFolder,
        *,
        crop_frames: int,
        seed: int = 0,
        sample: bool = True,
        silence: Tensor | None = None,
    ) -> None:
        self.items = folder if isinstance(folder, LatentFolder) else open_latents(folder)
        self.crop_frames = whole_number(crop_frames, "crop_frames", lowest=1)
        self.seed = whole_number(seed, "seed", lowest=0)
        self.sample = sample
        if silence is None:
            self.silence = self.items.silence()
        elif silence.ndim == 2 and silence.shape[0] == self.items.latent_dim and silence.shape[1]:
            middle = silence.shape[1] // 2
            self.silence = silence[:, middle : middle + 1].detach().to("cpu", torch.float32)
        else:
            raise EarVAEError(
                f"silence has the shape {list(silence.shape)}; expected [{self.items.latent_dim}, M]"
            )
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields a crop of each item, once."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Draws the crop of a number from 0, without an upper limit.

        Raises:
            IndexError: The number is negative.
            EarVAEError: The item cannot be read, or is to be padded and there is no silence to do so.
        """
        if index < 0:
            raise IndexError(index)
        item = self.items[self._number(index)]
        random = np.random.default_rng((self.seed, index))
        length = min(self.crop_frames, item.num_frames)
        start = int(random.integers(item.num_frames - length + 1))
        posterior = item.posterior(start, length)
        if self.sample:
            generator = torch.Generator().manual_seed(int(random.integers(2**63)))
            latents = posterior.sample(generator)
        else:
            latents = posterior.mode()
        return {
            "latents": self._padded(latents, item.where),
            "padding_mask": torch.arange(self.crop_frames) < length,
            "seconds_start": item.seconds_start + start * item.downsampling_ratio / item.sample_rate,
            "seconds_total": item.seconds_total,
            "metadata": dict(item.metadata),
        }

    @staticmethod
    def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Makes a batch of items.

        Returns:
            `latents` [B, D, N], `padding_mask` [B, N], `seconds_start` and `seconds_total` [B] in float32,
            and `metadata`, a list of B.
        """
        return {
            "latents": torch.stack([item["latents"] for item in items]),
            "padding_mask": torch.stack([item["padding_mask"] for item in items]),
            "seconds_start": torch.tensor([item["seconds_start"] for item in items]),
            "seconds_total": torch.tensor([item["seconds_total"] for item in items]),
            "metadata": [item["metadata"] for item in items],
        }

    def _number(self, index: int) -> int:
        """Returns the item that a number stands for: each pass over all items has an order of its own."""
        pass_number, place = divmod(index, len(self))
        if self._order[0] != pass_number:
            # The last word keeps it apart from what is drawn of an item.
            random = np.random.default_rng((self.seed, pass_number, 1))
            self._order = pass_number, random.permutation(len(self))
        return int(self._order[1][place])

    def _padded(self, latents: Tensor, where: str) -> Tensor:
        missing = self.crop_frames - latents.shape[1]
        if not missing:
            return latents
        if self.silence is None:
            raise EarVAEError(
                f"{where}: has {latents.shape[1]} of {self.crop_frames} frames, and the data set holds no "
                "silence to pad with; give that of the model",
                argument="silence",
                value=...,
            )
        return torch.cat([latents, self.silence.expand(-1, missing)], dim=1)
