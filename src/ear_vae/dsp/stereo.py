"""Mid and side, and how alike left and right are."""

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


def stereo_correlation(stereo: Tensor) -> Tensor:
    """Correlation of left and right, from -1 (opposite) to 1 (equal); NaN where one of them is silent.

    Args:
        stereo: [..., 2, T].

    Returns:
        [...] in float64.

    Raises:
        EarVAEError: There are not two channels.
    """
    _, _, left, right = mid_side_left_right(stereo.double()).unbind(dim=-2)
    energies = left.square().sum(dim=-1) * right.square().sum(dim=-1)
    return (left * right).sum(dim=-1) / energies.sqrt()


def side_to_mid_db(stereo: Tensor) -> Tensor:
    """Energy of the side relative to that of the mid in dB; -infinite for equal channels, NaN for silence.

    Args:
        stereo: [..., 2, T].

    Returns:
        [...] in float64.

    Raises:
        EarVAEError: There are not two channels.
    """
    mid, side, _, _ = mid_side_left_right(stereo.double()).unbind(dim=-2)
    return 10 * (side.square().sum(dim=-1) / mid.square().sum(dim=-1)).log10()
