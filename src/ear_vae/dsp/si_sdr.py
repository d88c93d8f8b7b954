"""Scale-invariant signal-to-distortion ratio of a rebuilt waveform."""

from __future__ import annotations

import torch
from torch import Tensor

# Keeps the ratio finite: a perfect estimate reaches the dB of its energy + 80, a silent one -80.
_EPSILON = 1e-8
# A signal whose changes are this far below its mean square is a constant with rounding errors.
_CONSTANT_RATIO = 1e-12
_BLOCK_SAMPLES = 2**17


def scale_invariant_sdr_db(estimate: Tensor, target: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB, averaged over channels.

    Each channel is made zero-mean, the target is scaled to fit the estimate best, and what remains of
    the estimate is distortion. A channel whose target is silent or constant has no ratio and is left out
    of the average.

    Args:
        estimate: [..., C, T].
        target: Same shape.

    Returns:
        [...] in the dtype of the estimate; above 120 for a perfect estimate of audible music, -80 for a
        silent estimate, NaN where all channels of the target are silent or constant.

    Reference: Le Roux et al., "SDR - Half-baked or Well Done?" (2019), equation 3, with the epsilons of
    auraloss 0.4.
    """
    sums = [
        torch.stack((x.sum(-1), y.sum(-1), (x * x).sum(-1), (y * y).sum(-1), (x * y).sum(-1)))
        for x, y in (
            (estimate[..., start : start + _BLOCK_SAMPLES].double(), block.double())
            for start, block in zip(
                range(0, target.shape[-1], _BLOCK_SAMPLES), target.split(_BLOCK_SAMPLES, dim=-1), strict=True
            )
        )
    ]
    sum_x, sum_y, sum_xx, sum_yy, sum_xy = torch.stack(sums).sum(dim=0)
    num_samples = target.shape[-1]
    energy_x = sum_xx - sum_x.square() / num_samples
    energy_y = sum_yy - sum_y.square() / num_samples
    product = sum_xy - sum_x * sum_y / num_samples
    scaled = product.square() / (energy_y + _EPSILON).square() * energy_y
    distortion = (energy_x - product.square() / energy_y.clamp(min=_EPSILON**2)).clamp(min=0)
    ratios = 10 * (scaled / (distortion + _EPSILON) + _EPSILON).log10()
    ratios = ratios.masked_fill(energy_y <= _CONSTANT_RATIO * sum_yy, torch.nan)
    return ratios.nanmean(dim=-1).to(estimate.dtype)
