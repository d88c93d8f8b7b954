"""The convolutions, the activation and the residual unit that encoder and decoder share.

All of them take [B, C, N], and [B, C, 1, N] as well. The second form is for inference: with its channels
last in memory, a convolution is a plain matrix product on what lies side by side, and the activations are not
reordered on the way in and out, which on a CPU takes as long as the products themselves. Where a gradient is
recorded that form is the slower one: [B, C, N] it is then.

Weights lie in the plain order of torch, [O, C, K], whatever form they are used in. Channels last has them
reordered call by call, which is little beside the product where many positions share them; where few do, the
convolution is one product with the weights as they lie.
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
        """Convolves [B, C, N] or [B, C, 1, N]; the form is kept."""
        if x.ndim == 3:
            return super().forward(x)
        (kernel,), (stride,), (dilation,), padding = (
            self.kernel_size,
            self.stride,
            self.dilation,
            self.padding,
        )
        assert not isinstance(padding, str)
        num_outputs = (x.shape[-1] + 2 * padding[0] - dilation * (kernel - 1) - 1) // stride + 1
        if kernel > 1 and _few(x, num_outputs, self.out_channels):
            windows = functional.unfold(
                x, (1, kernel), dilation=(1, dilation), padding=(0, padding[0]), stride=(1, stride)
            )
            return _channels_last(_product(self.weight.flatten(1), windows, self.bias).unsqueeze(-2))
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
        """Convolves [B, C, N] or [B, C, 1, N], transposed; the form is kept."""
        if x.ndim == 3:
            return super().forward(x)
        (kernel,), (stride,), padding = self.kernel_size, self.stride, self.padding
        assert not isinstance(padding, str)
        if _few(x, x.shape[-1], self.out_channels):
            windows = _product(self.weight.flatten(1).T, x.squeeze(-2), None)
            length = (x.shape[-1] - 1) * stride - 2 * padding[0] + kernel
            y = functional.fold(
                windows, (1, length), (1, kernel), padding=(0, padding[0]), stride=(1, stride)
            )
            return _channels_last(y if self.bias is None else y + self.bias[:, None, None])
        return functional.conv_transpose2d(
            x, self.weight.unsqueeze(-2), self.bias, stride=(1, stride), padding=(0, padding[0])
        )


def _few(x: Tensor, positions: int, out_channels: int) -> bool:
    """Whether a kernel outweighs the input's windows, so that reordering it would take the longer."""
    return x.device.type == "cpu" and x.shape[0] * positions < out_channels


def _channels_last(x: Tensor) -> Tensor:
    """[B, C, 1, N] as the next layer takes it; by hand, which torch.vmap takes too."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _product(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Weight [O, I] times each item of [B, I, N], plus the bias [O]: [B, O, N]."""
    # Item by item: a batched product would copy the weight for each.
    if bias is None:
        return torch.stack([weight @ item for item in x.unbind()])
    return torch.stack([torch.addmm(bias[:, None], weight, item) for item in x.unbind()])


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
        """Applies the function to each channel of [B, C, N] or [B, C, 1, N]."""
        return snake(x, self.log_alpha, self.log_beta, compiled=self.compiled)


class ResidualUnit(nn.Module):
    """x + conv1(snake(conv7(snake(x)))), the dilated convolution zero-padded to keep the length.

    Args:
        channels: Channels of input and output.
        dilation: Dilation of the convolution of size 7.
        num_snakes: 1 for one Snake that serves both places, as in the published εar-VAE weights; 2 for one
            each, as in Oobleck.
    """

    def __init__(self, channels: int, dilation: int, num_snakes: int = 1) -> None:
        super().__init__()
        padding = dilation * (RESIDUAL_KERNEL_SIZE - 1) // 2
        self.snake = Snake(channels)
        self.conv_dilated = Conv1d(
            channels, channels, RESIDUAL_KERNEL_SIZE, dilation=dilation, padding=padding
        )
        self.snake2 = Snake(channels) if num_snakes == 2 else None
        self.conv_pointwise = Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, N] or [B, C, 1, N] to the same shape."""
        y = self.conv_dilated(self.snake(x))
        second = self.snake if self.snake2 is None else self.snake2
        return x + self.conv_pointwise(second(y))


def residual_units(channels: int, num_snakes: int = 1) -> nn.Sequential:
    """The three residual units of one block, with dilations 1, 3 and 9.

    Args:
        channels: Channels of input and output.
        num_snakes: Snakes of each unit, 1 or 2.
    """
    return nn.Sequential(*(ResidualUnit(channels, dilation, num_snakes) for dilation in RESIDUAL_DILATIONS))
