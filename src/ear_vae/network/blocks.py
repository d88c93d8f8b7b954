"""The convolutions, the activation and the residual unit that encoder and decoder share.

All of them take [B, C, N], and [B, C, 1, N] as well. The second form is for inference: with its channels last
in memory, a convolution is a plain matrix product on what lies side by side, and nothing is reordered on the
way in and out, which on a CPU takes as long as the products themselves. `channels_last_weights` does the same
for the weights. Where a gradient is recorded that form is the slower one: [B, C, N] then goes with weights in
their plain order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ear_vae.network.snake import snake

RESIDUAL_DILATIONS = (1, 3, 9)
RESIDUAL_KERNEL_SIZE = 7


class Conv1d(nn.Conv1d):
    """`torch.nn.Conv1d` that also takes [B, C, 1, N]."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            return self._conv_forward(x, self.weight.contiguous(), self.bias)
        (stride,), (dilation,), padding = self.stride, self.dilation, self.padding
        assert not isinstance(padding, str)
        return functional.conv2d(
            x,
            self.weight.unsqueeze(-2),
            self.bias,
            stride=(1, stride),
            padding=(0, padding[0]),
            dilation=(1, dilation),
        )


class ConvTranspose1d(nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` that also takes [B, C, 1, N]."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        (stride,), padding = self.stride, self.padding
        assert not isinstance(padding, str)
        if x.ndim == 3:
            return functional.conv_transpose1d(
                x, self.weight.contiguous(), self.bias, stride=stride, padding=padding[0]
            )
        return functional.conv_transpose2d(
            x, self.weight.unsqueeze(-2), self.bias, stride=(1, stride), padding=(0, padding[0])
        )


def channels_last_weights(network: nn.Module) -> None:
    """Stores the kernels of all convolutions as [O, K, C], in place; their shape stays [O, C, K]."""
    for module in network.modules():
        if isinstance(module, (Conv1d, ConvTranspose1d)):
            weight = module.weight.data
            module.weight.data = weight.transpose(1, 2).contiguous().transpose(1, 2)


class Snake(nn.Module):
    """x + sin²(αx) / (β + 1e-9), with α and β per channel, stored as logarithms.

    The sine is computed in at least float32 whatever the input's dtype: a bfloat16 argument of a
    few hundred has lost its phase. The output has the input's dtype.

    Attributes:
        compiled: Whether `ear_vae.network.snake.compile_snake` has been called for it.

    Reference: Ziyin et al., "Neural Networks Fail to Learn Periodic Functions and How to Fix It"
    (2020); two-parameter form of Lee et al., "BigVGAN" (2023).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.zeros(channels))
        self.log_beta = nn.Parameter(torch.zeros(channels))
        self.compiled = False

    def forward(self, x: Tensor) -> Tensor:
        return snake(x, self.log_alpha, self.log_beta, compiled=self.compiled)


class ResidualUnit(nn.Module):
    """x + conv1(snake(conv7(snake(x)))), the dilated convolution zero-padded to keep the length.

    One Snake serves both places, as in the published weights.
    """

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        padding = dilation * (RESIDUAL_KERNEL_SIZE - 1) // 2
        self.snake = Snake(channels)
        self.conv_dilated = Conv1d(
            channels, channels, RESIDUAL_KERNEL_SIZE, dilation=dilation, padding=padding
        )
        self.conv_pointwise = Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_dilated(self.snake(x))
        return x + self.conv_pointwise(self.snake(y))


def residual_units(channels: int) -> nn.Sequential:
    """The three residual units of one block, with dilations 1, 3 and 9."""
    return nn.Sequential(*(ResidualUnit(channels, dilation) for dilation in RESIDUAL_DILATIONS))
