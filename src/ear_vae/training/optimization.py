"""Optimizers, their schedule, and steps that must not be taken."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ear_vae.errors import EarVAEError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, with a linear warm-up and a cosine decay to a fraction of the rate over the Trainer's steps.

    Args:
        learning_rate: After the warm-up.
        betas: Of AdamW.
        weight_decay: Of AdamW.
        warmup_steps: Steps of the VAE from zero to the full rate.
        final_fraction: Of the learning rate, at the Trainer's last step; 1 keeps it constant.
        gradient_clip: Largest norm of the gradient over all weights; larger ones are scaled down to it.

    Raises:
        EarVAEError: A value is out of range.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.8, 0.99)
    weight_decay: float = 1e-3
    warmup_steps: int = 1_000
    final_fraction: float = 0.1
    gradient_clip: float = 10.0

    def __post_init__(self) -> None:
        if not (0 <= self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf):
            raise EarVAEError(
                "learning_rate and weight_decay must be finite and 0 or more, "
                f"got {self.learning_rate} and {self.weight_decay}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise EarVAEError(f"betas must be in [0, 1), got {list(self.betas)}")
        if self.warmup_steps < 0 or not 0 <= self.final_fraction <= 1 or not self.gradient_clip > 0:
            raise EarVAEError(
                "warmup_steps must be 0 or more, final_fraction within [0, 1] and gradient_clip above 0, "
                f"got {self.warmup_steps}, {self.final_fraction} and {self.gradient_clip}"
            )

    def factor(self, step: int, total_steps: int) -> float:
        """The learning rate at `step` as a fraction of `learning_rate`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_fraction + (1 - self.final_fraction) * cosine

    def build(
        self, parameters: Iterable[nn.Parameter], total_steps: int
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """The optimizer of `parameters` and its schedule; on a GPU a step is one kernel."""
        parameters = list(parameters)
        optimizer = torch.optim.AdamW(
            parameters,
            lr=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            fused=True if all(parameter.is_cuda for parameter in parameters) else None,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.factor(step, total_steps))
        return optimizer, schedule


def trained(network: nn.Module) -> list[nn.Parameter]:
    """The parameters of a network that are not frozen."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


class SkippedSteps:
    """Counts steps whose gradient was not finite, and gives up after too many in a row.

    Args:
        limit: How many in a row are borne.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = 0
        self.in_a_row = 0

    def allows(self, gradient_norm: Tensor, what: str) -> bool:
        """Whether a step with that gradient may be taken.

        Args:
            gradient_norm: Over all weights; the same on every process.
            what: Whose step it is.

        Raises:
            EarVAEError: `limit` steps in a row were not finite.
        """
        if bool(gradient_norm.isfinite()):
            self.in_a_row = 0
            return True
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            raise EarVAEError(
                f"the gradient of the {what} was not finite in {self.in_a_row} steps in a row; lower the "
                "learning rate, look for NaN in the data, or train in float32, and resume from the last "
                "checkpoint"
            )
        return False
