"""The moving average of the weights, which is what users get."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ear_vae.training.weight_norm import plain_weights


class AveragedWeights(nn.Module):
    """An exponential moving average of a network's weights, without weight norm.

    It starts as an exact copy. The decay grows from 0.1 to `decay` as (1 + n) / (10 + n), so that the
    start is soon forgotten.

    Args:
        network: What to average, before weight norm is put on it.
        decay: Of the average, in [0, 1).

    Attributes:
        network: A frozen network with the averages as its weights.
        updates: How many there were.
    """

    updates: Tensor

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.decay = decay
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Moves towards the present weights of `network`, which may have weight norm."""
        n = int(self.updates)
        averages = dict(self.network.named_parameters())
        present = plain_weights(network, averages)
        weight = 1 - min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(list(averages.values()), list(present.values()), weight)
        self.updates += 1
