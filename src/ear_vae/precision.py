"""In what precision the sums are taken."""

from __future__ import annotations

import torch
from torch import Tensor


def single_at_least(x: Tensor) -> Tensor:
    """What is in less than float32, in float32; float64 stays what it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
