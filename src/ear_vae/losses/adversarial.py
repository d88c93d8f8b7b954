"""The losses between the VAE and its discriminator; like all, they take (estimate, target)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ear_vae._dtype import upcast

if TYPE_CHECKING:
    from ear_vae.network.discriminator import Judgement


def discriminator_loss(estimate: Sequence[Judgement], target: Sequence[Judgement]) -> Tensor:
    """What the discriminator minimises: D(estimate)² + (1 − D(target))², averaged over resolutions.

    Args:
        estimate: What it says of rebuilt audio that no gradient flows to.
        target: What it says of the originals.

    Returns:
        Scalar; 0 when it tells all apart, 0.5 when it answers 0.5 to everything.

    Reference: Mao et al., "Least Squares Generative Adversarial Networks" (2017), equation 2 without ½.
    """
    terms = [
        upcast(x.logits).square().mean() + (1 - upcast(y.logits)).square().mean()
        for x, y in zip(estimate, target, strict=True)
    ]
    return torch.stack(terms).mean()


def adversarial(estimate: Sequence[Judgement]) -> Tensor:
    """What the VAE minimises: (1 − D(estimate))², averaged over resolutions.

    Returns:
        Scalar; 0 when the discriminator takes all of it for real.

    Reference: as `discriminator_loss`.
    """
    return torch.stack([(1 - upcast(x.logits)).square().mean() for x in estimate]).mean()


def feature_matching(estimate: Sequence[Judgement], target: Sequence[Judgement]) -> Tensor:
    """Mean absolute difference of hidden activations, averaged over layers and resolutions.

    Args:
        estimate: What the discriminator says of rebuilt audio.
        target: What it says of the originals; no gradient flows through it.

    Returns:
        Scalar, 0 for equal audio.

    Reference: Kumar et al., "MelGAN" (2019), equation 4, as a mean.
    """
    # A copy of all features in float32 would be most of a step's memory: only the sums are taken in it.
    terms = [
        (a - b.detach()).abs().mean(dtype=torch.promote_types(a.dtype, torch.float32))
        for x, y in zip(estimate, target, strict=True)
        for a, b in zip(x.features, y.features, strict=True)
    ]
    return torch.stack(terms).mean()
