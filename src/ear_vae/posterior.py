"""The distribution that the encoder returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import register_dataclass
from torch.nn import functional

_VARIANCE_FLOOR = 1e-6


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents, q(z | audio).

    Attributes:
        mean: Means, [B, D, N] or [D, N].
        std: Standard deviations (the softplus of the encoder's scale, and `min_std`), same shape, positive.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def from_parameters(cls, parameters: Tensor, min_std: float = 0.0) -> Posterior:
        """Splits the encoder's output into mean ‖ scale; std = softplus(scale) + min_std.

        Args:
            parameters: Output of the encoder, [..., 2 D, N].
            min_std: Smallest standard deviation, `EarVAEConfig.min_std` of the model.
        """
        mean, scale = parameters.chunk(2, dim=-2)
        std = functional.softplus(scale)
        return cls(mean, std + min_std if min_std else std)

    def mode(self) -> Tensor:
        """The most likely latents, which are the mean: what to encode with when nothing random is wanted."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws latents of the mean's shape, differentiable in mean and std (mean + std · noise).

        Args:
            generator: Source of the noise, for repeatable draws; on a CPU generator the noise is drawn
                there and moved, so that one seed gives one result on every device.
        """
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def kl(self) -> Tensor:
        """Divergence from the standard normal prior, one value per item: [B], or [] for [D, N].

        Mean over frames of Σ_channels (mean² + var − ln var − 1) with var = std² + 1e-6: the
        published code's reduction, without the ½ of the textbook formula.
        """
        variance = self.std.square() + _VARIANCE_FLOOR
        return (self.mean.square() + variance - variance.log() - 1).sum(dim=-2).mean(dim=-1)


# So that torch.export and torch.func take functions that give one.
register_dataclass(Posterior, serialized_type_name="ear_vae.Posterior")
