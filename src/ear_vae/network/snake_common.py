"""What the Snake and its kernels agree on: constants, dtypes, layouts, and what is switched on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Keeps 1/β finite.
BETA_EPSILON = 1e-9

Sine = Literal["exact", "reduced", "approx"]


@dataclass
class Switches:
    """What is written for GPUs and not measured on one: off until it is.

    Attributes:
        sine: How the kernels compute sin²(αx) in float32. "exact" squares the sine of CUDA's library, which
            takes any x, with an error of at most 1.3e-7. "reduced" takes fewer instructions: a reduction
            modulo π/2 and a polynomial, with an error of at most 6e-8 while |αx| is below 100,000. "approx"
            is the same reduction and the sine of the special function units, with an error of at most 7e-7.
        fused_sums: A convolution's bias and the input of a residual unit are added by the Snake behind them.
        traced_formula: torch.compile gets the plain formula, which it may fuse with what stands around it,
            instead of the operator.
    """

    sine: Sine = "exact"
    fused_sums: bool = False
    traced_formula: bool = False


switches = Switches()


def compute_dtype(x: Tensor, residual: Tensor | None = None) -> torch.dtype:
    """What sum and sine are computed in."""
    return torch.promote_types(sum_dtype(x, residual), torch.float32)


def sum_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """Dtype of a sum, as of x + residual: a bias follows its convolution."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def keeps_float32(x: Tensor) -> bool:
    """Whether what residual units add to stays in float32 at least: in inference on a CPU, see `blocks`.

    There an activation is in the cache, and its width costs little; on a GPU bytes are what takes the time.
    """
    return x.device.type == "cpu" and x.ndim == 4


def narrower(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """The dtype of fewer bytes."""
    return first if first.itemsize <= second.itemsize else second


def layout(x: Tensor) -> torch.memory_format:
    """How results lie in memory: with the channels last where those of `x` do, else in the plain order."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
