"""The activation and the residual unit that encoder and decoder share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

RESIDUAL_DILATIONS = (1, 3, 9)
RESIDUAL_KERNEL_SIZE = 7
_BETA_EPSILON = 1e-9


class Snake(nn.Module):
    """x + sin²(αx) / (β + 1e-9), with α and β per channel, stored as logarithms.

    The sine is computed in at least float32 whatever the input's dtype: a bfloat16 argument of a
    few hundred has lost its phase. The output has the input's dtype.

    Reference: Ziyin et al., "Neural Networks Fail to Learn Periodic Functions and How to Fix It"
    (2020); two-parameter form of Lee et al., "BigVGAN" (2023).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.zeros(channels))
        self.log_beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        compute_dtype = torch.promote_types(x.dtype, torch.float32)
        alpha = self.log_alpha.to(compute_dtype).exp().unsqueeze(-1)
        inverse_beta = 1 / (self.log_beta.to(compute_dtype).exp().unsqueeze(-1) + _BETA_EPSILON)
        wide = x.to(compute_dtype)
        if torch.is_grad_enabled():
            return _SnakeFunction.apply(wide, alpha, inverse_beta).to(x.dtype)
        return torch.mul(wide, alpha).sin_().square_().mul_(inverse_beta).add_(wide).to(x.dtype)


class _SnakeFunction(torch.autograd.Function):
    """The same formula for training: keeps only its input, where autograd would keep four copies of it."""

    @staticmethod
    def forward(ctx, x: Tensor, alpha: Tensor, inverse_beta: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, alpha, inverse_beta)
        return torch.mul(x, alpha).sin_().square_().mul_(inverse_beta).add_(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
        x, alpha, inverse_beta = ctx.saved_tensors
        # With s = sin(αx): dy/dx = 1 + α/β sin(2αx), dy/dα = x/β sin(2αx), dy/d(1/β) = s².
        angle = x * alpha
        grad_inverse_beta = _sum_per_channel(angle.sin().square_().mul_(grad))
        weighted = angle.mul_(2).sin_().mul_(grad).mul_(inverse_beta)
        grad_alpha = _sum_per_channel(weighted * x)
        return weighted.mul_(alpha).add_(grad), grad_alpha, grad_inverse_beta


def _sum_per_channel(x: Tensor) -> Tensor:
    return x.sum(dim=-1, keepdim=True).sum(dim=tuple(range(x.ndim - 2)))


class ResidualUnit(nn.Module):
    """x + conv1(snake(conv7(snake(x)))), the dilated convolution zero-padded to keep the length.

    One Snake serves both places, as in the published weights.
    """

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        padding = dilation * (RESIDUAL_KERNEL_SIZE - 1) // 2
        self.snake = Snake(channels)
        self.conv_dilated = nn.Conv1d(
            channels, channels, RESIDUAL_KERNEL_SIZE, dilation=dilation, padding=padding
        )
        self.conv_pointwise = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_dilated(self.snake(x))
        return x + self.conv_pointwise(self.snake(y))


def residual_units(channels: int) -> nn.Sequential:
    """The three residual units of one block, with dilations 1, 3 and 9."""
    return nn.Sequential(*(ResidualUnit(channels, dilation) for dilation in RESIDUAL_DILATIONS))
