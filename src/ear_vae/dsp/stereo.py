"""Mid and side."""

from __future__ import annotations

import torch
from torch import Tensor

from ear_vae.errors import EarVAEError


def mid_side_left_right(stereo: Tensor, dim: int = -2) -> Tensor:
    """M = (L + R) / 2, S = (L − R) / 2, L and R of a stereo signal or of its complex spectra.

    Args:
        stereo: A tensor with two channels (left, right) along `dim`.
        dim: The channel axis.

    Returns:
        The same with four channels (mid, side, left, right). A signal in one channel only has mid and
        side at half its amplitude, a signal that is equal in both has the mid at its own amplitude.

    Raises:
        EarVAEError: There are not two channels along `dim`.
    """
    if stereo.shape[dim] != 2:
        raise EarVAEError(f"mid and side need 2 channels, got shape {list(stereo.shape)}")
    left, right = stereo.split(1, dim=dim)
    return torch.cat(((left + right) / 2, (left - right) / 2, left, right), dim=dim)
