"""Triton kernels of the Snake function; imported only where Triton is.

α and β come as logarithms, as they are stored, and are computed where they are used. Triton launches on the
current device, which need not be that of its arguments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ear_vae.network.snake_common import BETA_EPSILON, compute_dtype, layout, sum_dtype, switches

_BLOCK = 1024
# Of a tile with channels last: so many channels at most, so that α and β serve many positions.
_MOST_CHANNELS = 128

_EPSILON = tl.constexpr(BETA_EPSILON)
# π/2 as float32 has it, and how much less it is in truth. A multiple of the first leaves an angle without
# rounding: both are multiples of 2⁻²³ or so, and what is left is less than 1.
_HALF_PI, _HALF_PI_EXCESS = tl.constexpr(1.5707963705062866), tl.constexpr(4.371138828673793e-08)
_TWO_OVER_PI = tl.constexpr(0.6366197723675814)
# Added to a float32, this rounds it to a whole number, which is odd where the last bit is set.
_ROUND = tl.constexpr(12582912.0)
# Minimax polynomial of sin² within ±π/4, as t + t² (Q_0 + Q_1 t + …) of t = v², wrong by 3e-10 at most.
_Q_0, _Q_1 = tl.constexpr(-3.3333322406e-01), tl.constexpr(4.4443231076e-02)
_Q_2, _Q_3 = tl.constexpr(-3.1699731480e-03), tl.constexpr(1.3370595116e-04)
# Minimax polynomial of sin within ±π/2, v + v³ (S_1 + S_2 v² + …), wrong by 5e-9 at most.
_S_1, _S_2 = tl.constexpr(-1.6666657059e-01), tl.constexpr(8.3330163547e-03)
_S_3, _S_4 = tl.constexpr(-1.9806547052e-04), tl.constexpr(2.5999031411e-06)


def forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    log_alpha: Tensor,
    log_beta: Tensor,
    keep_sum: bool,
) -> tuple[Tensor, Tensor]:
    """As `ear_vae.network.snake.plain_forward`, reading and writing every value once."""
    memory_format = layout(x)
    x = x.contiguous(memory_format=memory_format)
    if residual is not None:
        residual = residual.contiguous(memory_format=memory_format)
    y = torch.empty_like(x, dtype=sum_dtype(x, residual), memory_format=memory_format)
    total = torch.empty_like(y) if keep_sum else None
    given = (x, bias, residual, log_alpha, log_beta, y, total)
    settings = _settings(y)
    channels = x.shape[1]
    with torch.cuda.device_of(x):
        if memory_format == torch.channels_last:
            rows = x.numel() // channels
            width = min(_MOST_CHANNELS, triton.next_power_of_2(channels))
            height = _BLOCK // width
            grid = (triton.cdiv(rows, height), triton.cdiv(channels, width))
            _forward_last[grid](*given, rows, channels, HEIGHT=height, WIDTH=width, **settings)
        else:
            rows = x.shape[0] * channels
            length = x.numel() // rows
            grid = (rows, triton.cdiv(length, _BLOCK))
            _forward_rows[grid](*given, length, channels, BLOCK=_BLOCK, **settings)
    return y.new_empty(0) if total is None else total, y


def backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    log_alpha: Tensor,
    log_beta: Tensor,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `ear_vae.network.snake.plain_backward`, in one pass and a sum over its parts for each parameter."""
    memory_format, dtype = layout(x), compute_dtype(x, residual)
    rows, channels = x.shape[0] * x.shape[1], x.shape[1]
    grad, x = grad.contiguous(), x.contiguous()
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    residual = None if residual is None else residual.contiguous()
    for_sum = torch.empty_like(x, dtype=sum_dtype(x, residual), memory_format=torch.contiguous_format)
    length = x.numel() // rows
    parts = triton.cdiv(length, _BLOCK)
    # Sums within a part only, so that the result does not depend on which part is done first.
    for_alpha, for_beta, for_bias = (
        torch.empty(x.shape[0], channels, parts, dtype=dtype, device=x.device) if wanted else None
        for wanted in (True, True, of_bias)
    )
    with torch.cuda.device_of(x):
        _backward_rows[(rows, parts)](
            *(grad, grad_sum, x, bias, residual, log_alpha, log_beta),
            *(for_sum, for_bias, for_alpha, for_beta),
            *(length, channels, parts),
            BLOCK=_BLOCK,
            **_settings(for_sum),
        )
    assert for_alpha is not None
    assert for_beta is not None
    return (
        for_sum.contiguous(memory_format=memory_format),
        for_alpha.new_empty(0) if for_bias is None else for_bias.sum(dim=(0, 2)),
        for_alpha.sum(dim=(0, 2)).to(log_alpha.dtype),
        for_beta.sum(dim=(0, 2)).to(log_beta.dtype),
    )


def _settings(total: Tensor) -> dict[str, object]:
    wide = compute_dtype(total) is torch.float64
    return {"WIDE": tl.float64 if wide else tl.float32, "SINE": "exact" if wide else switches.sine}


@triton.jit
def _alpha_of(log_alpha, index, mask, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.exp(tl.load(log_alpha + index, mask=mask, other=0.0).to(WIDE))


@triton.jit
def _beta_of(log_beta, index, mask, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.exp(tl.load(log_beta + index, mask=mask, other=0.0).to(WIDE))


@triton.jit
def _sum_of(  # type: ignore[no-untyped-def]
    x, bias, residual, offsets, inside, index, there, WIDE: tl.constexpr, STORED: tl.constexpr
):
    """The sum of x and of the bias and residual that are given, rounded as if it had been stored."""
    total = tl.load(x + offsets, mask=inside, other=0.0).to(WIDE)
    if bias is not None:
        total = total + tl.load(bias + index, mask=there, other=0.0).to(WIDE)
    if residual is not None:
        total = total + tl.load(residual + offsets, mask=inside, other=0.0).to(WIDE)
    return total.to(STORED).to(WIDE)


@triton.jit
def _reduced(angle):  # type: ignore[no-untyped-def]
    """A multiple of π/2 less, within ±π/4, as a sum of two; and whether that multiple is odd."""
    shifted = tl.fma(angle, _TWO_OVER_PI, _ROUND)
    turns = shifted - _ROUND
    odd = (shifted.to(tl.int32, bitcast=True) & 1) == 1
    return tl.fma(-turns, _HALF_PI, angle), turns * _HALF_PI_EXCESS, odd


@triton.jit
def _squared_sine(angle, SINE: tl.constexpr):  # type: ignore[no-untyped-def]
    if SINE == "exact":
        sine = tl.sin(angle)
        return sine * sine
    else:
        v, rest, odd = _reduced(angle)
        if SINE == "approx":
            sine = libdevice.fast_sinf(v + rest)
            square = sine * sine
        else:
            # (v + rest)², and what is lost when that is rounded: near 1 it would be half of the error.
            cross = rest * tl.fma(2.0, v, rest)
            t = tl.fma(v, v, cross)
            lost = tl.fma(v, v, -t) + cross
            series = tl.fma(tl.fma(tl.fma(_Q_3, t, _Q_2), t, _Q_1), t, _Q_0)
            square = t + tl.fma(t * t, series, lost)
        # A quarter of a turn further it is the cosine.
        return tl.where(odd, 1.0 - square, square)


@triton.jit
def _sine_of_twice(angle, SINE: tl.constexpr):  # type: ignore[no-untyped-def]
    if SINE == "exact":
        return 2.0 * tl.sin(angle) * tl.cos(angle)
    else:
        v, rest, odd = _reduced(angle)
        twice = tl.fma(2.0, v, 2.0 * rest)
        if SINE == "approx":
            sine = libdevice.fast_sinf(twice)
        else:
            square = twice * twice
            series = tl.fma(tl.fma(tl.fma(_S_4, square, _S_3), square, _S_2), square, _S_1)
            sine = tl.fma(twice * square, series, twice)
        return tl.where(odd, -sine, sine)


@triton.jit
def _forward_last(  # type: ignore[no-untyped-def]
    x,
    bias,
    residual,
    log_alpha,
    log_beta,
    y,
    total,
    rows,
    channels,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    SINE: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT))[:, None]
    channel = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
    there = channel < channels
    alpha = _alpha_of(log_alpha, channel, there, WIDE)
    inverse_beta = 1.0 / (_beta_of(log_beta, channel, there, WIDE) + _EPSILON)
    offsets = row * channels + channel
    inside = (row < rows) & there
    wide = _sum_of(x, bias, residual, offsets, inside, channel, there, WIDE, y.dtype.element_ty)
    if total is not None:
        tl.store(total + offsets, wide.to(total.dtype.element_ty), mask=inside)
    result = wide + inverse_beta * _squared_sine(wide * alpha, SINE)
    tl.store(y + offsets, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _forward_rows(  # type: ignore[no-untyped-def]
    x,
    bias,
    residual,
    log_alpha,
    log_beta,
    y,
    total,
    length,
    channels,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    SINE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    positions = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = positions < length
    channel = row % channels
    alpha = _alpha_of(log_alpha, channel, True, WIDE)
    inverse_beta = 1.0 / (_beta_of(log_beta, channel, True, WIDE) + _EPSILON)
    offsets = row * length + positions
    wide = _sum_of(x, bias, residual, offsets, inside, channel, True, WIDE, y.dtype.element_ty)
    if total is not None:
        tl.store(total + offsets, wide.to(total.dtype.element_ty), mask=inside)
    result = wide + inverse_beta * _squared_sine(wide * alpha, SINE)
    tl.store(y + offsets, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_rows(  # type: ignore[no-untyped-def]
    grad,
    grad_sum,
    x,
    bias,
    residual,
    log_alpha,
    log_beta,
    for_sum,
    for_bias,
    for_alpha,
    for_beta,
    length,
    channels,
    parts,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    SINE: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    positions = part * BLOCK + tl.arange(0, BLOCK)
    inside = positions < length
    offsets = row * length + positions
    channel = row % channels
    alpha = _alpha_of(log_alpha, channel, True, WIDE)
    beta = _beta_of(log_beta, channel, True, WIDE)
    inverse_beta = 1.0 / (beta + _EPSILON)
    wide = _sum_of(x, bias, residual, offsets, inside, channel, True, WIDE, for_sum.dtype.element_ty)
    g = tl.load(grad + offsets, mask=inside, other=0.0).to(WIDE)
    # dy/dx = 1 + α/β sin(2αx), dy/dlog α = αx/β sin(2αx), dy/dlog β = −β/β² sin²(αx)
    weighted = g * inverse_beta * alpha * _sine_of_twice(wide * alpha, SINE)
    tl.store(for_alpha + row * parts + part, tl.sum(weighted * wide))
    squares = tl.sum(g * _squared_sine(wide * alpha, SINE))
    tl.store(for_beta + row * parts + part, -beta * inverse_beta * inverse_beta * squares)
    gradient = g + weighted
    if grad_sum is not None:
        gradient = gradient + tl.load(grad_sum + offsets, mask=inside, other=0.0).to(WIDE)
    tl.store(for_sum + offsets, gradient.to(for_sum.dtype.element_ty), mask=inside)
    if for_bias is not None:
        tl.store(for_bias + row * parts + part, tl.sum(gradient))
