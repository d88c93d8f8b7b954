"""Optimizers, learning-rate schedules, and steps that must not be taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau, SequentialLR

from ear_vae.errors import EarVAEError
from ear_vae.limits import finite_number, shown, whole_number


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or another optimizer, its learning-rate schedule, warm-up and gradient clipping.

    Without `algorithm` it is AdamW with the first three arguments, without `schedule` a cosine decay to a
    fraction of the learning rate over the Trainer's steps. Warm-up and clipping apply to any of them.

    Args:
        learning_rate: AdamW learning rate after the warm-up.
        betas: AdamW betas.
        weight_decay: AdamW weight decay.
        warmup_steps: Steps of the VAE over which the learning rate grows linearly from zero.
        final_fraction: Fraction of the learning rate that the cosine decay ends at, at the Trainer's last
            step; 1 keeps the rate constant.
        gradient_clip: Largest norm of the gradient over all weights; larger ones are scaled down to it.
        algorithm: Optimizer to use instead of AdamW, with its own settings: in a config file the `class_path`
            and `init_args` of any optimizer of torch, in Python a function from parameters to an optimizer,
            such as `functools.partial(torch.optim.SGD, lr=0.1)`.
        schedule: Schedule to follow the warm-up instead of the cosine decay: in a config file the
            `class_path` and `init_args` of any scheduler of torch, in Python a function from an optimizer to
            a scheduler.

    Raises:
        EarVAEError: A value is out of range, or the optimizer or schedule needs more than the gradient and
            the number of the step.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.8, 0.99)
    weight_decay: float = 1e-3
    warmup_steps: int = 1_000
    final_fraction: float = 0.1
    gradient_clip: float = 10.0
    algorithm: Callable[[Iterable[Any]], Optimizer] | None = None
    schedule: Callable[[Optimizer], LRScheduler] | None = None

    def __post_init__(self) -> None:
        if not all(finite_number(v) and v >= 0 for v in (self.learning_rate, self.weight_decay)):
            raise EarVAEError(
                "learning_rate and weight_decay must be finite and 0 or more, "
                f"got {self.learning_rate} and {self.weight_decay}"
            )
        betas = self.betas if isinstance(self.betas, (list, tuple)) else ()
        if len(betas) != 2 or not all(finite_number(beta) and 0 <= beta < 1 for beta in betas):
            raise EarVAEError(f"betas must be two numbers in [0, 1), got {shown(self.betas)}")
        whole_number(self.warmup_steps, "warmup_steps", lowest=0)
        if not 0 <= self.final_fraction <= 1 or not self.gradient_clip > 0:
            raise EarVAEError(
                "final_fraction must be within [0, 1] and gradient_clip above 0, "
                f"got {self.final_fraction} and {self.gradient_clip}"
            )
        optimizer, schedule = self._example()
        if isinstance(optimizer, torch.optim.LBFGS):
            raise EarVAEError("optimizer: LBFGS evaluates the loss several times a step; choose another one")
        if isinstance(schedule, ReduceLROnPlateau):
            raise EarVAEError("schedule: ReduceLROnPlateau needs a metric every step; choose another one")

    def factor(self, step: int, total_steps: int) -> float:
        """Returns the learning rate at `step` as a fraction of `learning_rate`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_fraction + (1 - self.final_fraction) * cosine

    def build(self, parameters: Iterable[nn.Parameter], total_steps: int) -> tuple[Optimizer, LRScheduler]:
        """Builds the optimizer of `parameters` and its schedule; on a GPU a step of AdamW is one kernel.

        Args:
            parameters: Parameters to train.
            total_steps: Number of steps of the whole training, over which the cosine decays.

        Raises:
            EarVAEError: The optimizer does not accept these parameters.
        """
        optimizer = self._optimizer(list(parameters))
        if self.schedule is None:
            return optimizer, LambdaLR(optimizer, lambda step: self.factor(step, total_steps))
        # The warm-up first: a schedule changes the optimizer's rate as soon as it is made.
        warmup = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, self.warmup_steps)))
        schedule = self.schedule(optimizer)
        if self.warmup_steps:
            schedule = SequentialLR(optimizer, [warmup, schedule], [self.warmup_steps])
        return optimizer, schedule

    def described(self) -> dict[str, Any]:
        """Returns the settings as numbers and words, for people to read."""
        shared = {"warmup_steps": self.warmup_steps, "gradient_clip": self.gradient_clip}
        optimizer, schedule = self._example()
        if self.algorithm is None:
            settings: dict[str, Any] = {
                "learning_rate": self.learning_rate,
                "betas": self.betas,
                "weight_decay": self.weight_decay,
            }
        else:
            settings = {
                name: v for name, v in optimizer.defaults.items() if isinstance(v, (int, float, tuple))
            }
        decay = {"final_fraction": self.final_fraction} if schedule is None else {"schedule": _name(schedule)}
        return {"algorithm": self.name, **settings, **shared, **decay}

    @property
    def name(self) -> str:
        """The optimizer's class name, such as `AdamW`."""
        return _name(self._example()[0])

    def _example(self) -> tuple[Optimizer, LRScheduler | None]:
        """Returns an optimizer of one weight, with the schedule that replaces the cosine decay, if any."""
        optimizer = self._optimizer([nn.Parameter(torch.zeros(1, 1))])
        if self.schedule is None:
            return optimizer, None
        try:
            schedule = self.schedule(optimizer)
        except (TypeError, ValueError) as error:
            raise EarVAEError(f"the schedule cannot be made: {error}") from error
        return optimizer, schedule

    def _optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        if self.algorithm is not None:
            try:
                optimizer = self.algorithm(parameters)
            except (TypeError, ValueError) as error:
                raise EarVAEError(f"the optimizer cannot be made: {error}") from error
            if not isinstance(optimizer, Optimizer):
                raise EarVAEError(f"algorithm must give an optimizer of torch, got {shown(optimizer)}")
            return optimizer
        return torch.optim.AdamW(
            parameters,
            lr=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            fused=True if all(parameter.is_cuda for parameter in parameters) else None,
        )


def trained(network: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters of a network that are not frozen."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def skips_by_itself(optimizer: Optimizer) -> bool:
    """Whether the optimizer skips a step by a flag on the device (`found_inf`), as fused ones do."""
    return all(group.get("fused") for group in optimizer.param_groups)


class SkippedSteps:
    """Counts steps whose gradient was not finite, and gives up after too many in a row.

    Args:
        limit: Number of such steps in a row that ends the training.

    Attributes:
        total: Number of such steps so far.
        in_a_row: Number of such steps since the last good one.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = 0
        self.in_a_row = 0

    def count(self, finite: bool, what: str) -> None:
        """Counts a step.

        Args:
            finite: Whether the gradient was finite; the same on every process.
            what: The network whose step it is, for the message.

        Raises:
            EarVAEError: `limit` steps in a row were not finite.
        """
        if finite:
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            raise EarVAEError(
                f"the gradient of the {what} was not finite in {self.in_a_row} steps in a row; lower the "
                "learning rate, look for NaN in the data, or train in float32, and resume from the last "
                "checkpoint"
            )


def _name(thing: object) -> str:
    return type(thing).__name__
