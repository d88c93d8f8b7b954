"""Adversarial losses of the VAE and its discriminator; like all losses, they take (estimate, target)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ear_vae._dtype import upcast

if TYPE_CHECKING:
    from ear_vae.network.discriminator import DiscriminatorOutput


def discriminator_loss(
    estimate: Sequence[DiscriminatorOutput], target: Sequence[DiscriminatorOutput]
) -> Tensor:
    """What the discriminator minimises: D(estimate)² + (1 − D(target))², averaged over resolutions.

    Args:
        estimate: Discriminator outputs for rebuilt audio that is detached from the VAE.
        target: Discriminator outputs for the originals.

    Returns:
        Scalar; 0 when the discriminator tells all apart, 0.5 when it answers 0.5 to everything.

    Reference: Mao et al., "Least Squares Generative Adversarial Networks" (2017), equation 2 without ½.
    """
    terms = [
        upcast(x.scores).square().mean() + (1 - upcast(y.scores)).square().mean()
        for x, y in zip(estimate, target, strict=True)
    ]
    return torch.stack(terms).mean()


def adversarial(estimate: Sequence[DiscriminatorOutput]) -> Tensor:
    """What the VAE minimises: (1 − D(estimate))², averaged over resolutions.

    Args:
        estimate: Discriminator outputs for rebuilt audio.

    Returns:
        Scalar; 0 when the discriminator takes all of it for real.

    Reference: as `discriminator_loss`.
    """
    return torch.stack([(1 - upcast(x.scores)).square().mean() for x in estimate]).mean()


def feature_matching(
    estimate: Sequence[DiscriminatorOutput], target: Sequence[DiscriminatorOutput]
) -> Tensor:
    """Mean absolute difference of hidden activations, averaged over layers and resolutions.

    Args:
        estimate: Discriminator outputs for rebuilt audio.
        target: Discriminator outputs for the originals; no gradient flows through them.

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
