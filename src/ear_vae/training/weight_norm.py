"""Weight norm on every convolution while training, folded away everywhere else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ear_vae.network.blocks import convolutions


class WeightNorm(nn.Module):
    """Makes weight = g · v / ‖v‖ per kernel of dimension 0 (an input channel of a transposed convolution).

    Unlike the one in torch it starts from v of unit length, so that the learning rate turns every
    kernel equally fast whatever its gain, and takes an all-zero kernel: g = 0 with a random direction.

    Reference: Salimans and Kingma, "Weight Normalization" (2016).
    """

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """Returns the weight of the lengths `g` and the directions `v`."""
        return v * (g / _norm(v))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the lengths and directions of a weight."""
        g = _norm(weight)
        direction = torch.where(g == 0, torch.randn_like(weight), weight)
        return g, direction / _norm(direction)


def apply_weight_norm(network: nn.Module) -> None:
    """Puts weight norm on every convolution of `network`; its output does not change."""
    for conv in convolutions(network):
        parametrize.register_parametrization(conv, "weight", WeightNorm())


def plain_weights(network: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Returns the named tensors of a network with weight norm as a network without it has them."""
    # A parametrized module computes its folded weight when asked for it by name.
    return {name: getattr(*_owner(network, name)).detach().clone() for name in names}


@torch.no_grad()
def load_plain_weights(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts the tensors of a network without weight norm into one with it."""
    for name, tensor in state.items():
        owner, attribute = _owner(network, name)
        if parametrize.is_parametrized(owner, attribute):
            setattr(owner, attribute, tensor)
        else:
            getattr(owner, attribute).copy_(tensor)


def _owner(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, attribute = name.rpartition(".")
    return network.get_submodule(module), attribute


def _norm(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)
