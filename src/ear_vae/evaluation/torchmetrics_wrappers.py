"""The metrics as `torchmetrics.Metric`, for validation loops."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ear_vae.errors import EarVAEError
from ear_vae.evaluation.metrics import METRICS, measure, why_undefined


class ReconstructionMetrics(Metric):
    """Means of several metrics over all pairs seen, by name; faster than one Metric for each.

    A pair for which a metric is undefined, such as SI-SDR for a silent target, is left out of that
    metric's mean; `undefined` counts them.

    Args:
        sample_rate: Sample rate of the audio in Hz.
        names: Names of metrics, out of `ear_vae.evaluation.METRICS`.
        kwargs: Arguments of `torchmetrics.Metric`.

    Raises:
        EarVAEError: An unknown name or none.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, sample_rate: int, names: Sequence[str] = METRICS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not names or set(names) - set(METRICS):
            raise EarVAEError(f"unknown metrics {list(names)}; choose from {', '.join(METRICS)}")
        self.sample_rate = sample_rate
        self.names = tuple(names)
        for name in self.names:
            # Named after the metric, because a MetricCollection merges metrics of equal states.
            for state in ("total", "count", "undefined"):
                self.add_state(f"{name}_{state}", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, estimate: Tensor, target: Tensor) -> None:
        """Adds one pair or a batch of them.

        Args:
            estimate: Rebuilt audio, [C, T] or [B, C, T].
            target: Original audio, same shape but for T.

        Raises:
            EarVAEError: As `measure`.
        """
        with torch.no_grad():
            figures = measure(estimate, target, sample_rate=self.sample_rate, names=self.names)
        for name in self.names:
            defined = figures[name].isfinite()
            self._add(name, "total", figures[name].masked_fill(~defined, 0).sum())
            self._add(name, "count", defined.sum())
            self._add(name, "undefined", (~defined).sum())

    def compute(self) -> Any:
        """Returns means by name, in float64; NaN, with a warning, where no pair had a value."""
        return {name: self._mean(name) for name in self.names}

    @property
    def undefined(self) -> dict[str, int]:
        """Number of pairs that each mean leaves out."""
        return {name: int(getattr(self, f"{name}_undefined")) for name in self.names}

    def _add(self, name: str, state: str, value: Tensor) -> None:
        setattr(self, f"{name}_{state}", getattr(self, f"{name}_{state}") + value)

    def _mean(self, name: str) -> Tensor:
        total, count = getattr(self, f"{name}_total"), getattr(self, f"{name}_count")
        if not count:
            warnings.warn(f"{name} is NaN: {why_undefined(name)} in every pair", stacklevel=2)
        return total / count


class SingleMetric(ReconstructionMetrics):
    """Mean of one metric over all pairs seen, a scalar; its subclasses say of which.

    Args:
        sample_rate: Sample rate of the audio in Hz.
        kwargs: Arguments of `torchmetrics.Metric`.
    """

    name: str

    def __init__(self, sample_rate: int, **kwargs: Any) -> None:
        super().__init__(sample_rate, (self.name,), **kwargs)

    def compute(self) -> Tensor:
        """Returns the mean over all pairs seen, in float64; NaN, with a warning, where none had a value."""
        return self._mean(self.name)


class SiSdr(SingleMetric):
    """Mean of `si_sdr_db` over pairs, see `SingleMetric`."""

    name, higher_is_better = "si_sdr_db", True


class MelDistance(SingleMetric):
    """Mean of `mel_distance` over pairs, see `SingleMetric`."""

    name, higher_is_better = "mel_distance", False


class StftDistance(SingleMetric):
    """Mean of `stft_distance` over pairs, see `SingleMetric`."""

    name, higher_is_better = "stft_distance", False


class Icpc(SingleMetric):
    """Mean of `icpc` over pairs, see `SingleMetric`."""

    name, higher_is_better = "icpc", True


class Ccpc(SingleMetric):
    """Mean of `ccpc` over pairs, see `SingleMetric`."""

    name, higher_is_better = "ccpc", True


class TruePeakDistance(SingleMetric):
    """Mean of `true_peak_distance_db` over pairs, see `SingleMetric`."""

    name, higher_is_better = "true_peak_distance_db", False


class LoudnessDistance(SingleMetric):
    """Mean of `loudness_distance_lu` over pairs, see `SingleMetric`."""

    name, higher_is_better = "loudness_distance_lu", False


class LoudnessRangeDistance(SingleMetric):
    """Mean of `loudness_range_distance_lu` over pairs, see `SingleMetric`."""

    name, higher_is_better = "loudness_range_distance_lu", False
