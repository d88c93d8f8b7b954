"""The encoder's output as others name it."""

from __future__ import annotations

import torch
from torch import Tensor

from ear_vae.posterior import Posterior


def moments(posterior: Posterior, min_std: float) -> Tensor:
    """Mean ‖ scale before the softplus, [B, 2 D, N], of a posterior.

    Args:
        posterior: Posterior with tensors [B, D, N].
        min_std: `EarVAEConfig.min_std` of the model.
    """
    softplus = (posterior.std - min_std).clamp(min=torch.finfo(posterior.std.dtype).tiny)
    # The inverse of the softplus, without overflow where it is large.
    return torch.cat([posterior.mean, softplus + torch.log(-torch.expm1(-softplus))], dim=1)
