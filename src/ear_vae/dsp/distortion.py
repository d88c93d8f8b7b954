"""How far a rebuilt waveform is from the original."""

from __future__ import annotations

from torch import Tensor


def si_sdr_db(estimate: Tensor, target: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB, averaged over channels.

    Each channel is made zero-mean, the target is scaled to fit the estimate best, and what remains of
    the estimate is distortion.

    Args:
        estimate: [..., C, T].
        target: Same shape; not silent.

    Returns:
        [...], infinite for a perfect estimate, NaN or -infinite where the target is silent.

    Reference: Le Roux et al., "SDR - Half-baked or Well Done?" (2019), equation 3.
    """
    estimate = estimate - estimate.mean(dim=-1, keepdim=True)
    target = target - target.mean(dim=-1, keepdim=True)
    gain = (estimate * target).sum(-1, keepdim=True) / target.square().sum(-1, keepdim=True)
    scaled = gain * target
    ratio = scaled.square().sum(-1) / (estimate - scaled).square().sum(-1)
    return 10 * ratio.log10().mean(dim=-1)
