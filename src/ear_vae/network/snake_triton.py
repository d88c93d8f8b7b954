"""Triton kernels of the Snake function; imported only where Triton is.

Triton launches on the current device, which need not be that of its arguments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def forward(x: Tensor, alpha: Tensor, inverse_beta: Tensor) -> Tensor:
    """As `ear_vae.network.snake.snake`, reading and writing every value once."""
    x, inner = _dense(x)
    y = torch.empty_like(x)
    size = x.numel()
    with torch.cuda.device_of(x):
        _forward_kernel[(triton.cdiv(size, _BLOCK),)](
            x, alpha, inverse_beta, y, size, x.shape[1], inner, BLOCK=_BLOCK
        )
    return y


def backward(grad: Tensor, x: Tensor, alpha: Tensor, inverse_beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, α and 1/β in one pass and a sum over its parts."""
    x, grad = x.contiguous(), grad.contiguous()
    for_x = torch.empty_like(x)
    rows, channels = x.shape[0] * x.shape[1], x.shape[1]
    length = x.numel() // rows
    parts = triton.cdiv(length, _BLOCK)
    # Sums within a part only, so that the result does not depend on which part is done first.
    sums = torch.empty(2, x.shape[0], channels, parts, dtype=alpha.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _backward_kernel[(rows, parts)](
            grad, x, alpha, inverse_beta, for_x, sums[0], sums[1], length, channels, parts, BLOCK=_BLOCK
        )
    for_alpha, for_inverse_beta = sums.sum(dim=-1).sum(dim=1)
    return for_x, for_alpha, for_inverse_beta


def _dense(x: Tensor) -> tuple[Tensor, int]:
    """Without gaps in memory, and how many values of a channel lie side by side."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return x, 1
    x = x.contiguous()
    return x, x.numel() // (x.shape[0] * x.shape[1])


@triton.jit
def _forward_kernel(x, alpha, inverse_beta, y, size, channels, inner, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    channel = (offsets // inner) % channels
    a = tl.load(alpha + channel, mask=inside)
    wide = tl.load(x + offsets, mask=inside).to(a.dtype)
    sine = tl.sin(wide * a)
    result = wide + tl.load(inverse_beta + channel, mask=inside) * sine * sine
    tl.store(y + offsets, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    x,
    alpha,
    inverse_beta,
    for_x,
    for_alpha,
    for_inverse_beta,
    length,
    channels,
    parts,
    BLOCK: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    positions = part * BLOCK + tl.arange(0, BLOCK)
    inside = positions < length
    offsets = row * length + positions
    channel = row % channels
    a, ib = tl.load(alpha + channel), tl.load(inverse_beta + channel)
    wide = tl.load(x + offsets, mask=inside, other=0.0).to(a.dtype)
    g = tl.load(grad + offsets, mask=inside, other=0.0).to(a.dtype)
    sine = tl.sin(wide * a)
    # sin(2αx) = 2 sin(αx) cos(αx)
    weighted = g * ib * 2.0 * sine * tl.cos(wide * a)
    tl.store(for_x + offsets, (g + a * weighted).to(for_x.dtype.element_ty), mask=inside)
    tl.store(for_alpha + row * parts + part, tl.sum(weighted * wide))
    tl.store(for_inverse_beta + row * parts + part, tl.sum(g * sine * sine))
