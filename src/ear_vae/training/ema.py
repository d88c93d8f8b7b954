"""The exponential moving average of the weights, which is what users get."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ear_vae.errors import EarVAEError
from ear_vae.training.weight_norm import plain_weights


class EMA(nn.Module):
    """Keeps an exponential moving average of a network's weights, without weight norm.

    It starts as an exact copy. The decay grows from 0.1 to `decay` as (1 + n) / (10 + n), so that the
    start is soon forgotten.

    Args:
        network: Network to average, before weight norm is put on it.
        decay: Decay of the average per update, in [0, 1).

    Attributes:
        network: A frozen network with the averages as its weights.
        updates: Number of updates so far.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.decay = decay
        # A Python number: read from a GPU, it would make every step wait for the one before.
        self.updates = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Moves the average towards the current weights of `network`, which may have weight norm."""
        averages = dict(self.network.named_parameters())
        present = plain_weights(network, averages)
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        mix = get_ema_multi_avg_fn(decay)
        mix(list(averages.values()), list(present.values()), self.updates)
        self.updates += 1

    def get_extra_state(self) -> Tensor:
        """Returns the number of updates, for the state dict."""
        return torch.tensor(self.updates)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes the number of updates from a state dict.

        Raises:
            EarVAEError: The number is negative.
        """
        if state < 0:
            raise EarVAEError(f"the average of the weights cannot have had {int(state)} updates")
        self.updates = int(state)
