"""The convolutions, the activation and the residual unit that encoder and decoder share.

All of them take [B, C, N], and [B, C, 1, N] as well. The second form is for inference: with its channels
last in memory, a convolution is a plain matrix product on what lies side by side, and the activations are not
reordered on the way in and out, which on a CPU takes as long as the products themselves. Where a gradient is
recorded that form is the slower one: [B, C, N] it is then.

Weights lie in the plain order of torch, [O, C, K], whatever form they are used in. Channels last has them
reordered call by call, which is little beside the product where many positions share them; `keep_kernels` has
it done once for several calls. Where few positions share a large kernel, the convolution is one product with
the weights as they lie.

A convolution computes in the dtype of its input. Weights in bfloat16 have it given bfloat16 by the Snake
before it; on a CPU what the residual units add to stays float32 all the same, and so do the first and the
last convolution of each network: that is cheap, and most of what bfloat16 would get wrong. In training, where
autocast is set to bfloat16, a CPU computes the sums of the residual units and all narrow convolutions in
float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ear_vae._dtype import upcast
from ear_vae.network.snake import DeferredSum, fuses_residuals, fuses_sums, snake, snake_of_sum
from ear_vae.network.snake_common import compute_dtype, keeps_float32, narrower

KeptKernels = dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]]
"""Reordered kernels by their parameter's identity and their dtype, with the parameter so that no other takes
that over."""
_kept_kernels: ContextVar[KeptKernels | None] = ContextVar("kept_kernels", default=None)

# A convolution that changes the rate between fewer channels than these computes in float32 on a CPU; under
# autocast in training, every one of fewer channels does. It is little work, and bfloat16 makes it no faster.
# With AMX, oneDNN 3.12 (in torch 2.13) even gets it wrong where channels are fewer than 16 and the stride is
# 4 or more.
_NARROW_CHANNELS = 64
RESIDUAL_DILATIONS = (1, 3, 9)
RESIDUAL_KERNEL_SIZE = 7


class Conv1d(nn.Conv1d):
    """`torch.nn.Conv1d` that also takes [B, C, 1, N]."""

    @property
    def in_float32(self) -> bool:
        """Whether it computes in float32 on a CPU, whatever the dtype of its input."""
        return self.stride[0] > 1 and _is_narrow(self)

    def forward(self, x: Tensor, *, add_bias: bool = True) -> Tensor:
        """Convolves [B, C, N] or [B, C, 1, N]; form and dtype are kept."""
        if _reduced(x) and (self.in_float32 or (_trained_under_autocast(x) and _is_narrow(self))):
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x.float(), add_bias=add_bias).to(x.dtype)
        bias = _like(x, self.bias) if add_bias and self.bias is not None else None
        (kernel,), (stride,), (dilation,), padding = (
            self.kernel_size,
            self.stride,
            self.dilation,
            self.padding,
        )
        assert not isinstance(padding, str)
        if x.ndim == 3:
            return functional.conv1d(
                x, _like(x, self.weight), bias, stride=stride, padding=padding[0], dilation=dilation
            )
        num_outputs = (x.shape[-1] + 2 * padding[0] - dilation * (kernel - 1) - 1) // stride + 1
        if kernel > 1 and _few(x, num_outputs, self.out_channels):
            rows = functional.pad(x.squeeze(-2).mT, (0, 0, padding[0], padding[0]))
            windows = rows.unfold(1, dilation * (kernel - 1) + 1, stride)[..., ::dilation].flatten(2)
            return functional.conv2d(
                windows.mT.unsqueeze(-2), _like(x, self.weight).flatten(1)[..., None, None], bias
            )
        return functional.conv2d(
            x,
            _image_kernel(self.weight, x),
            bias,
            stride=(1, stride),
            padding=(0, padding[0]),
            dilation=(1, dilation),
        )


class ConvTranspose1d(nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` that also takes [B, C, 1, N]."""

    @property
    def in_float32(self) -> bool:
        """Whether it computes in float32 on a CPU, whatever the dtype of its input."""
        return _is_narrow(self)

    def forward(self, x: Tensor, *, add_bias: bool = True) -> Tensor:  # type: ignore[override]
        """Convolves [B, C, N] or [B, C, 1, N], transposed; form and dtype are kept."""
        if self.in_float32 and _reduced(x):
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x.float(), add_bias=add_bias).to(x.dtype)
        bias = _like(x, self.bias) if add_bias and self.bias is not None else None
        (kernel,), (stride,), padding = self.kernel_size, self.stride, self.padding
        assert not isinstance(padding, str)
        if x.ndim == 3:
            return functional.conv_transpose1d(
                x, _like(x, self.weight), bias, stride=stride, padding=padding[0]
            )
        if _few(x, x.shape[-1], self.out_channels):
            # Item by item: a batched product would copy the weight for each.
            kernels = _like(x, self.weight).flatten(1).T
            windows = torch.stack([kernels @ item for item in x.squeeze(-2).unbind()])
            length = (x.shape[-1] - 1) * stride - 2 * padding[0] + kernel
            y = functional.fold(
                windows, (1, length), (1, kernel), padding=(0, padding[0]), stride=(1, stride)
            )
            return _channels_last(y if bias is None else y + bias[:, None, None])
        return functional.conv_transpose2d(
            x, _image_kernel(self.weight, x), bias, stride=(1, stride), padding=(0, padding[0])
        )


def convolve(convolution: Conv1d | ConvTranspose1d, x: Tensor) -> Tensor | DeferredSum:
    """Applies a convolution that a Snake follows, and leaves its bias to that where it adds sums."""
    if not fuses_sums(x):
        result: Tensor = convolution(x)
        return result
    return DeferredSum(convolution(x, add_bias=False), convolution.bias)


def total(x: Tensor | DeferredSum) -> Tensor:
    """The tensor itself, or the sum added up."""
    return x.total() if isinstance(x, DeferredSum) else x


@contextmanager
def keep_kernels(kept: KeptKernels | None = None) -> Iterator[None]:
    """Has kernels reordered once for all convolutions of [B, C, 1, N] within the block, without gradients.

    The parameters stay as they are; a copy of each kernel that is used is held until the block is left, or
    as long as `kept` lives, where the next block is given it again. Weights must not change meanwhile.

    Args:
        kept: Where to keep them; by default where the enclosing block does, else for this block alone.
    """
    if kept is None:
        kept = _kept_kernels.get()
    token = _kept_kernels.set({} if kept is None else kept)
    try:
        yield
    finally:
        _kept_kernels.reset(token)


def _is_narrow(convolution: Conv1d | ConvTranspose1d) -> bool:
    return min(convolution.in_channels, convolution.out_channels) < _NARROW_CHANNELS


def _reduced(x: Tensor) -> bool:
    """Whether a convolution would compute in bfloat16 on a CPU."""
    if x.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.dtype == torch.bfloat16


def _trained_under_autocast(x: Tensor) -> bool:
    """Whether autocast has a CPU compute in bfloat16 what gradients are recorded of, see the top."""
    return x.ndim == 3 and torch.is_autocast_enabled("cpu") and _reduced(x)


def _like(x: Tensor, weight: Tensor) -> Tensor:
    """A weight in the dtype of the input; autocast casts by itself."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return weight
    return weight.to(x.dtype)


def _image_kernel(weight: Tensor, x: Tensor) -> Tensor:
    """A kernel [O, C, K] as [O, C, 1, K] for an input, with the channels last in memory where it is kept."""
    kept = _kept_kernels.get()
    # What a parametrization or a transform computes is new each time.
    if kept is None or torch.compiler.is_compiling() or not isinstance(weight, nn.Parameter):
        return _like(x, weight.unsqueeze(-2))
    key = id(weight), x.dtype
    if key not in kept:
        image = _like(x, weight.unsqueeze(-2))
        kept[key] = weight, image.contiguous(memory_format=torch.channels_last)
    return kept[key][1]


def _few(x: Tensor, positions: int, out_channels: int) -> bool:
    """Whether a kernel outweighs the input's windows, so that reordering it would take the longer."""
    return x.device.type == "cpu" and x.shape[0] * positions < out_channels


def _channels_last(x: Tensor) -> Tensor:
    """[B, C, 1, N] as the next layer takes it; by hand, which torch.vmap takes too."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


class Snake(nn.Module):
    """x + sin²(αx) / (β + 1e-9), with α and β per channel, stored as logarithms.

    The sine is computed in at least float32 whatever the input's dtype: a bfloat16 argument of a
    few hundred has lost its phase. The output has the input's dtype; in inference on a CPU that of
    the parameters where that is the narrower one, as the convolution behind it takes it.

    Args:
        channels: Channels C.
        wide: Whether, in inference on a CPU, the output is float32 at least: the convolution behind it then
            computes in that.

    Attributes:
        compiled: Whether `ear_vae.network.snake.compile_snake` has been called for it.
        compiled_with_gradients: Whether `compile_snake_with_gradients` has.

    Reference: Ziyin et al., "Neural Networks Fail to Learn Periodic Functions and How to Fix It"
    (2020); two-parameter form of Lee et al., "BigVGAN" (2023).
    """

    def __init__(self, channels: int, *, wide: bool = False) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.zeros(channels))
        self.log_beta = nn.Parameter(torch.zeros(channels))
        self.wide = wide
        self.compiled = False
        self.compiled_with_gradients = False

    def forward(self, x: Tensor | DeferredSum) -> Tensor:
        """Applies the function to each channel of [B, C, N] or [B, C, 1, N]."""
        if isinstance(x, DeferredSum):
            return snake_of_sum(
                x,
                self.log_alpha,
                self.log_beta,
                keep_sum=False,
                wide=self.wide,
                compiled=self.compiled,
            )[1]
        dtype = x.dtype
        if keeps_float32(x):
            dtype = compute_dtype(x) if self.wide else narrower(dtype, self.log_alpha.dtype)
        return snake(
            x,
            self.log_alpha,
            self.log_beta,
            dtype=dtype,
            compiled=self.compiled,
            compiled_with_gradients=self.compiled_with_gradients,
        )

    def with_input(self, x: DeferredSum) -> tuple[Tensor, Tensor]:
        """The sum, added up, and the function of it."""
        return snake_of_sum(x, self.log_alpha, self.log_beta, keep_sum=True, compiled=self.compiled)


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

    def forward(self, x: Tensor | DeferredSum) -> Tensor | DeferredSum:
        """Maps [B, C, N] or [B, C, 1, N] to the same shape; where sums are deferred, to that of its parts."""
        if isinstance(x, DeferredSum):
            x, activated = self.snake.with_input(x)
        else:
            activated = self.snake(x)
        y = convolve(self.conv_dilated, activated)
        # Memory for the next.
        del activated
        second = self.snake if self.snake2 is None else self.snake2
        y = convolve(self.conv_pointwise, second(y))
        if isinstance(y, DeferredSum):
            return y.plus(x)
        if isinstance(self.snake, Snake) and self.snake.compiled and fuses_residuals(y):
            return DeferredSum(y, residual=x)
        return (upcast(x) if keeps_float32(x) or _trained_under_autocast(x) else x) + y


def residual_units(channels: int, num_snakes: int = 1) -> nn.Sequential:
    """The three residual units of one block, with dilations 1, 3 and 9.

    Args:
        channels: Channels of input and output.
        num_snakes: Snakes of each unit, 1 or 2.
    """
    return nn.Sequential(*(ResidualUnit(channels, dilation, num_snakes) for dilation in RESIDUAL_DILATIONS))


def convolutions(network: nn.Module) -> list[nn.Conv1d | nn.ConvTranspose1d]:
    """The one-dimensional convolutions of a network, in the order they are registered and run in."""
    return [module for module in network.modules() if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d))]
