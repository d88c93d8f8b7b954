"""Weights of loss terms that hold whatever the scale of their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ear_vae.errors import EarVAEError

_EPSILON = 1e-12


class LossBalancer(nn.Module):
    """Gives every term its weight's share of the gradient on the decoder's output.

    Each term's gradient is divided by the running mean of its own norm, so that a weight says how much of
    the step a term decides, not how large the term happens to be. A term may be absent from some steps: the
    others share them, and its running mean is over the steps it took part in.

    Args:
        names: Names of the terms, in the order of the running means in the state dict.
        total_norm: Norm of the gradient of one item of the batch (before the mean over the batch) when the
            gradients of all terms have their mean norms and point in one direction.
        decay: Decay of the running means, from 0 to below 1.

    Raises:
        EarVAEError: No terms, or a decay outside [0, 1).

    Reference: Défossez et al., "High Fidelity Neural Audio Compression" (2022), section 3.4, equation 5.
    """

    norms: Tensor
    updates: Tensor

    def __init__(self, names: Sequence[str], *, total_norm: float = 1.0, decay: float = 0.999) -> None:
        super().__init__()
        if not names or not 0 <= decay < 1:
            raise EarVAEError(f"the balancer needs terms and a decay in [0, 1), got {names} and {decay}")
        self.names = tuple(names)
        self.total_norm = total_norm
        self.decay = decay
        self.register_buffer("norms", torch.zeros(len(self.names), dtype=torch.float64))
        self.register_buffer("updates", torch.zeros(len(self.names), dtype=torch.int64))

    def forward(self, terms: Mapping[str, Tensor], weights: Mapping[str, float], output: Tensor) -> Tensor:
        """Computes the balanced gradient with respect to `output`.

        Args:
            terms: Scalars that depend on `output`, by name; one or more of the balancer's terms.
            weights: Weight of each term by name, 0 or more; at least one of those in `terms` above 0.
            output: Output of the decoder, [B, C, T].

        Returns:
            Gradient with the shape of `output`, to call `output.backward(gradient)` with. NaN where the
            gradient of a term is not finite; the running means then stay as they were.

        Raises:
            EarVAEError: There are no terms, or others than the balancer was made for.
        """
        if not terms or not set(terms) <= set(self.names):
            raise EarVAEError(f"the balancer was made for {sorted(self.names)}, got {sorted(terms)}")
        present = [index for index, name in enumerate(self.names) if name in terms]
        names = [self.names[index] for index in present]
        gradients = [torch.autograd.grad(terms[name], output, retain_graph=True)[0] for name in names]
        # The terms are means over the batch: an item's own gradient is that many times as large.
        items = len(output)
        now = torch.stack([items * g.flatten(1).double().norm(dim=1).mean() for g in gradients])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # The norm of one process is of its own part of the batch, all of them scale alike.
            torch.distributed.all_reduce(now)
            now = now / torch.distributed.get_world_size()
        if not bool(now.isfinite().all()):
            return torch.full_like(output, torch.nan)
        self.updates[present] += 1
        self.norms[present] = self.decay * self.norms[present] + (1 - self.decay) * now
        means = self.norms[present] / (1 - self.decay ** self.updates[present].double())
        total = sum(weights[name] for name in names)
        scales = [
            self.total_norm * weights[name] / total / (float(mean) + _EPSILON)
            for name, mean in zip(names, means, strict=True)
        ]
        return torch.stack([scale * g for scale, g in zip(scales, gradients, strict=True)]).sum(dim=0)
