"""Mean, standard deviation and covariance of latent channels, gathered piece by piece in float64."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ear_vae.encoding.reading import LatentFolder, open_latents, read_receipt, receipts
from ear_vae.errors import EarVAEError
from ear_vae.limits import integer, shown

_KEYS = ("count", "mean", "co_moment")


class LatentStatistics:
    """Statistics of the latent frames that it was given.

    It keeps the number of frames, their mean, and the sums of products of their deviations from it. Two of
    them merge exactly but for rounding, in any order: those of shards into those of a data set.

    Args:
        latent_dim: Channels D of the latents.

    Attributes:
        count: Number of frames.
        mean: Mean of each channel, [D], float64.

    Reference: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979, equations 2.1.
    """

    def __init__(self, latent_dim: int) -> None:
        self.count = 0
        self.mean = np.zeros(latent_dim)
        self._co_moment = np.zeros((latent_dim, latent_dim))

    @property
    def latent_dim(self) -> int:
        """Channels D of the latents."""
        return len(self.mean)

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of each channel, [D], with the number of frames as divisor.

        Raises:
            EarVAEError: There were no frames.
        """
        self._require_frames()
        deviations: np.ndarray = np.sqrt(np.diagonal(self._co_moment) / self.count)
        return deviations

    @property
    def covariance(self) -> np.ndarray:
        """Covariance of the channels, [D, D], with the number of frames as divisor.

        Raises:
            EarVAEError: There were no frames.
        """
        self._require_frames()
        covariance: np.ndarray = self._co_moment / self.count
        return covariance

    def update(self, latents: Tensor | np.ndarray, mask: Tensor | np.ndarray | None = None) -> None:
        """Takes latents into account.

        Args:
            latents: [D, N] or [B, D, N], floating point.
            mask: [N] or [B, N], true for the frames that count; all by default.

        Raises:
            EarVAEError: Wrong shapes, or values that are not finite.
        """
        z = _as_float64(latents)
        if z.ndim not in (2, 3) or z.shape[-2] != self.latent_dim:
            raise EarVAEError(
                f"latents have shape {list(z.shape)}; expected [{self.latent_dim}, N] or "
                f"[B, {self.latent_dim}, N]"
            )
        frames = z.swapaxes(-1, -2).reshape(-1, self.latent_dim)
        if mask is not None:
            chosen = np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask, dtype=bool)
            if chosen.shape != (*z.shape[:-2], z.shape[-1]):
                raise EarVAEError(
                    f"the mask has shape {list(chosen.shape)}, the latents {list(z.shape)}; expected one "
                    "value for each frame"
                )
            frames = frames[chosen.reshape(-1)]
        if not len(frames):
            return
        if not np.isfinite(frames).all():
            raise EarVAEError("the latents hold NaN or infinity")
        mean = frames.mean(axis=0)
        deviations = frames - mean
        self._add(len(frames), mean, deviations.T @ deviations)

    def merge(self, other: LatentStatistics) -> None:
        """Takes all frames of another one into account.

        Raises:
            EarVAEError: It has another number of channels.
        """
        if other.latent_dim != self.latent_dim:
            raise EarVAEError(
                f"statistics of {other.latent_dim} channels cannot be merged with those of {self.latent_dim}"
            )
        self._add(other.count, other.mean, other._co_moment)

    def to_dict(self) -> dict[str, Any]:
        """Returns them as JSON-ready values; `from_dict` takes them back without loss."""
        return {"count": self.count, "mean": self.mean.tolist(), "co_moment": self._co_moment.tolist()}

    @classmethod
    def from_dict(cls, values: Any) -> LatentStatistics:
        """Builds statistics from what `to_dict` returned.

        Raises:
            EarVAEError: The values are not such.
        """
        if not isinstance(values, Mapping) or set(values) != set(_KEYS):
            raise EarVAEError(f"no statistics of latents: expected an object of {', '.join(_KEYS)}")
        count = integer(values["count"])
        try:
            mean, co_moment = (np.array(values[key], dtype=np.float64) for key in ("mean", "co_moment"))
        except (TypeError, ValueError) as error:
            raise EarVAEError("damaged statistics of latents: mean and co_moment must be numbers") from error
        if count is None or count < 0 or mean.ndim != 1 or co_moment.shape != (len(mean), len(mean)):
            raise EarVAEError(
                f"damaged statistics of latents: {shown(values['count'])} frames, mean {list(mean.shape)}, "
                f"co_moment {list(co_moment.shape)}"
            )
        if not (np.isfinite(mean).all() and np.isfinite(co_moment).all()):
            raise EarVAEError("damaged statistics of latents: they hold NaN or infinity")
        statistics = cls(len(mean))
        statistics.count, statistics.mean, statistics._co_moment = count, mean, co_moment
        return statistics

    def _add(self, count: int, mean: np.ndarray, co_moment: np.ndarray) -> None:
        if not count:
            return
        total = self.count + count
        difference = mean - self.mean
        self._co_moment = (
            self._co_moment + co_moment + np.outer(difference, difference) * (self.count / total * count)
        )
        self.mean = self.mean + difference * (count / total)
        self.count = total

    def _require_frames(self) -> None:
        if not self.count:
            raise EarVAEError("no latent frames: there is nothing to compute statistics of")


def latent_statistics(folder: str | os.PathLike[str] | LatentFolder) -> LatentStatistics:
    """Returns the statistics of the posterior means of a data set, padding left out.

    Where the shards of the data set carry theirs, these are merged and no latents are read.

    Args:
        folder: The output of `ear-vae encode-dataset`, in any format, or what `open_latents` returned.

    Raises:
        EarVAEError: There are no latents in the folder, it is not complete, or damaged.
    """
    latents = folder if isinstance(folder, LatentFolder) else open_latents(folder)
    statistics = LatentStatistics(latents.latent_dim)
    if noted := receipts(latents.folder):
        for path in noted:
            statistics.merge(_noted_in(path))
    else:
        for item in latents:
            statistics.update(item.posterior().mode())
    return statistics


def _noted_in(receipt: Path) -> LatentStatistics:
    values = read_receipt(receipt).get("statistics")
    try:
        return LatentStatistics.from_dict(values)
    except EarVAEError as error:
        raise EarVAEError(f"{receipt}: {error}") from error


def _as_float64(latents: Tensor | np.ndarray) -> np.ndarray:
    if isinstance(latents, Tensor):
        return latents.detach().to("cpu", torch.float64).numpy()
    return np.asarray(latents, dtype=np.float64)
