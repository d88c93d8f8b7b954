"""Triton kernels of the Snake function; imported only where Triton is.

α and β come as logarithms, as they are stored, and are computed where they are used. Triton launches on the
current device, which need not be that of its arguments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ear_vae.network.snake import BETA_EPSILON, compute_dtype, layout, switches

_BLOCK = 1024
# Of a tile with channels last: so many channels at most, so that α and β serve many positions.
_MOST_CHANNELS = 128

_EPSILON = tl.constexpr(BETA_EPSILON)
# π in three parts. The first two have 12 bits, so that their products with small whole numbers are exact.
_PI_1, _PI_2, _PI_3 = (tl.constexpr(p) for p in (3.140625, 0.0009675025939941406, 1.5099580252808664e-07))
_INVERSE_PI = tl.constexpr(0.3183098861837907)
_HALF_PI = tl.constexpr(1.5707963267948966)
# Added to a float32 and subtracted again, this rounds it to a whole number.
_ROUND = tl.constexpr(12582912.0)
# Minimax polynomial of sin within ±π/2, v + v³ (S_1 + S_2 v² + …), wrong by 5e-9 at most.
_S_1, _S_2 = tl.constexpr(-1.6666657059e-01), tl.constexpr(8.3330163547e-03)
_S_3, _S_4 = tl.constexpr(-1.9806547052e-04), tl.constexpr(2.5999031411e-06)


def forward(x: Tensor, log_alpha: Tensor, log_beta: Tensor) -> Tensor:
    """As `ear_vae.network.snake.snake`, reading and writing every value once."""
    memory_format = layout(x)
    x = x.contiguous(memory_format=memory_format)
    y = torch.empty_like(x, memory_format=memory_format)
    settings = _settings(x)
    channels = x.shape[1]
    with torch.cuda.device_of(x):
        if memory_format == torch.channels_last:
            rows = x.numel() // channels
            width = min(_MOST_CHANNELS, triton.next_power_of_2(channels))
            height = _BLOCK // width
            grid = (triton.cdiv(rows, height), triton.cdiv(channels, width))
            _forward_last[grid](
                x, log_alpha, log_beta, y, rows, channels, HEIGHT=height, WIDTH=width, **settings
            )
        else:
            rows = x.shape[0] * channels
            length = x.numel() // rows
            grid = (rows, triton.cdiv(length, _BLOCK))
            _forward_rows[grid](x, log_alpha, log_beta, y, length, channels, BLOCK=_BLOCK, **settings)
    return y


def backward(grad: Tensor, x: Tensor, log_alpha: Tensor, log_beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, log α and log β in one pass and two sums over its parts."""
    memory_format = layout(x)
    rows, channels = x.shape[0] * x.shape[1], x.shape[1]
    x, grad = x.contiguous(), grad.contiguous()
    for_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    length = x.numel() // rows
    parts = triton.cdiv(length, _BLOCK)
    settings = _settings(x)
    # Sums within a part only, so that the result does not depend on which part is done first.
    for_alpha, for_beta = (
        torch.empty(x.shape[0], channels, parts, dtype=compute_dtype(x), device=x.device) for _ in range(2)
    )
    with torch.cuda.device_of(x):
        _backward_rows[(rows, parts)](
            *(grad, x, log_alpha, log_beta, for_x, for_alpha, for_beta),
            *(length, channels, parts),
            BLOCK=_BLOCK,
            **settings,
        )
    return (
        for_x.contiguous(memory_format=memory_format),
        for_alpha.sum(dim=(0, 2)).to(log_alpha.dtype),
        for_beta.sum(dim=(0, 2)).to(log_beta.dtype),
    )


def _settings(x: Tensor) -> dict[str, object]:
    wide = compute_dtype(x)
    return {
        "WIDE": tl.float64 if wide is torch.float64 else tl.float32,
        "REDUCED": switches.reduced_sine and wide is torch.float32,
    }


@triton.jit
def _alpha_of(log_alpha, index, mask, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.exp(tl.load(log_alpha + index, mask=mask, other=0.0).to(WIDE))


@triton.jit
def _beta_of(log_beta, index, mask, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.exp(tl.load(log_beta + index, mask=mask, other=0.0).to(WIDE))


@triton.jit
def _reduced(angle):  # type: ignore[no-untyped-def]
    """Less a multiple of π, within ±π/2."""
    turns = (angle * _INVERSE_PI + _ROUND) - _ROUND
    return ((angle - turns * _PI_1) - turns * _PI_2) - turns * _PI_3


@triton.jit
def _sine_within(v):  # type: ignore[no-untyped-def]
    """Within ±π/2."""
    square = v * v
    return v + v * square * (_S_1 + square * (_S_2 + square * (_S_3 + square * _S_4)))


@triton.jit
def _squared_sine(angle, REDUCED: tl.constexpr):  # type: ignore[no-untyped-def]
    if REDUCED:
        # sin²(r) = ½ + ½ sin(2|r| − π/2): half the error of a square near 1.
        return 0.5 + 0.5 * _sine_within(2.0 * tl.abs(_reduced(angle)) - _HALF_PI)
    else:
        sine = tl.sin(angle)
        return sine * sine


@triton.jit
def _sine_of_twice(angle, REDUCED: tl.constexpr):  # type: ignore[no-untyped-def]
    if REDUCED:
        twice = 2.0 * _reduced(angle)
        # The sine of π − w is that of w.
        folded = tl.minimum(tl.abs(twice), 2.0 * _HALF_PI - tl.abs(twice))
        sine = _sine_within(folded)
        return tl.where(twice < 0, -sine, sine)
    else:
        return 2.0 * tl.sin(angle) * tl.cos(angle)


@triton.jit
def _forward_last(  # type: ignore[no-untyped-def]
    x,
    log_alpha,
    log_beta,
    y,
    rows,
    channels,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    REDUCED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    there = channel < channels
    alpha = _alpha_of(log_alpha, channel, there, WIDE)
    inverse_beta = 1.0 / (_beta_of(log_beta, channel, there, WIDE) + _EPSILON)
    offsets = row[:, None] * channels + channel[None, :]
    inside = (row < rows)[:, None] & there[None, :]
    wide = tl.load(x + offsets, mask=inside, other=0.0).to(WIDE)
    result = wide + inverse_beta[None, :] * _squared_sine(wide * alpha[None, :], REDUCED)
    tl.store(y + offsets, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _forward_rows(  # type: ignore[no-untyped-def]
    x,
    log_alpha,
    log_beta,
    y,
    length,
    channels,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    REDUCED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    positions = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = positions < length
    alpha = _alpha_of(log_alpha, row % channels, True, WIDE)
    inverse_beta = 1.0 / (_beta_of(log_beta, row % channels, True, WIDE) + _EPSILON)
    offsets = row * length + positions
    wide = tl.load(x + offsets, mask=inside, other=0.0).to(WIDE)
    result = wide + inverse_beta * _squared_sine(wide * alpha, REDUCED)
    tl.store(y + offsets, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_rows(  # type: ignore[no-untyped-def]
    grad,
    x,
    log_alpha,
    log_beta,
    for_x,
    for_alpha,
    for_beta,
    length,
    channels,
    parts,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    REDUCED: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    positions = part * BLOCK + tl.arange(0, BLOCK)
    inside = positions < length
    offsets = row * length + positions
    alpha = _alpha_of(log_alpha, row % channels, True, WIDE)
    beta = _beta_of(log_beta, row % channels, True, WIDE)
    inverse_beta = 1.0 / (beta + _EPSILON)
    wide = tl.load(x + offsets, mask=inside, other=0.0).to(WIDE)
    g = tl.load(grad + offsets, mask=inside, other=0.0).to(WIDE)
    # dy/dx = 1 + α/β sin(2αx), dy/dlog α = αx/β sin(2αx), dy/dlog β = −β/β² sin²(αx)
    weighted = g * inverse_beta * alpha * _sine_of_twice(wide * alpha, REDUCED)
    tl.store(for_x + offsets, (g + weighted).to(for_x.dtype.element_ty), mask=inside)
    tl.store(for_alpha + row * parts + part, tl.sum(weighted * wide))
    squares = tl.sum(g * _squared_sine(wide * alpha, REDUCED))
    tl.store(for_beta + row * parts + part, -beta * inverse_beta * inverse_beta * squares)
