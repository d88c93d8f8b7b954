"""The Snake function x + sin²(αx)/β in as few passes over memory as the device allows.

On a GPU it is one pass: a Triton kernel behind `torch.ops.ear_vae.snake`, an operator that compilers and
exporters take as a whole; where Triton is missing, that operator computes the plain formula. Elsewhere it is
a handful of passes over what should lie in the cache, see `ear_vae.tiling`, or one that torch.compile writes.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor


def snake(x: Tensor, alpha: Tensor, inverse_beta: Tensor, *, compiled: bool = False) -> Tensor:
    """x + sin²(αx)/β, the sine in at least float32 whatever the dtype of `x`.

    Args:
        x: [B, C, N], or [B, C, 1, N] with channels first or last in memory.
        alpha: α, [C], in float32 at least.
        inverse_beta: 1/β, likewise, above 0.
        compiled: Use what `compile_snake` has tried, where no gradient is recorded and `x` is [B, C, 1, N].

    Returns:
        Shape, dtype and memory layout of `x`.
    """
    if x.is_cuda:
        result: Tensor = torch.ops.ear_vae.snake(x, alpha, inverse_beta)
        return result
    recorded = torch.is_grad_enabled() and (x.requires_grad or alpha.requires_grad)
    if compiled and not recorded and x.ndim == 4:
        return _one_pass(x, alpha, inverse_beta)
    wide, alpha, inverse_beta = x.to(alpha.dtype), _like(alpha, x), _like(inverse_beta, x)
    if recorded:
        return _SnakeFunction.apply(wide, alpha, inverse_beta).to(x.dtype)
    # sin²(αx)/β as the square of sin(αx)/√β: a pass over memory less.
    sine = torch.mul(wide, alpha).sin_().mul_(inverse_beta.sqrt())
    return torch.addcmul(wide, sine, sine).to(x.dtype)


def compile_snake(device: torch.device, dtype: torch.dtype) -> None:
    """Compiles what `snake` uses with `compiled=True` on input of that kind, which takes some seconds.

    Raises:
        RuntimeError, OSError: torch cannot compile here; most often there is no C++ compiler.
    """
    x = torch.zeros(2, 4, 1, 8, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    alpha = torch.ones(4, device=device, dtype=torch.promote_types(dtype, torch.float32))
    _one_pass(x, alpha, alpha.clone())


@torch.no_grad()
def _one_pass(x: Tensor, alpha: Tensor, inverse_beta: Tensor) -> Tensor:
    """[B, C, 1, N], fastest with the channels last in memory."""
    last = x.movedim(1, -1)
    # As rows that are no view of something, and without gradients: one compilation then serves all tiles.
    rows = last.flatten(0, -2).data
    return _compiled()(rows, alpha, inverse_beta).view(last.shape).movedim(-1, 1)


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(_formula_of_rows, dynamic=True)


def _formula_of_rows(rows: Tensor, alpha: Tensor, inverse_beta: Tensor) -> Tensor:
    wide = rows.to(alpha.dtype)
    return (wide + torch.sin(wide * alpha).square() * inverse_beta).to(rows.dtype)


def _like(per_channel: Tensor, x: Tensor) -> Tensor:
    """[C] so that it goes with the channels of [B, C, ...]."""
    return per_channel.view(-1, *(1 for _ in x.shape[2:]))


class _SnakeFunction(torch.autograd.Function):
    """The same formula for training: keeps only its input, where autograd would keep four copies of it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, alpha: Tensor, inverse_beta: Tensor) -> Tensor:
        return torch.mul(x, alpha).sin_().square_().mul_(inverse_beta).add_(x)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
        return _gradients(grad, *ctx.saved_tensors)


def _gradients(grad: Tensor, x: Tensor, alpha: Tensor, inverse_beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # With s = sin(αx): dy/dx = 1 + α/β sin(2αx), dy/dα = x/β sin(2αx), dy/d(1/β) = s².
    angle = x * alpha
    grad_inverse_beta = _sum_per_channel(angle.sin().square_().mul_(grad))
    weighted = angle.mul_(2).sin_().mul_(grad).mul_(inverse_beta)
    grad_alpha = _sum_per_channel(weighted * x)
    return weighted.mul_(alpha).add_(grad), grad_alpha, grad_inverse_beta


def _sum_per_channel(x: Tensor) -> Tensor:
    """[B, C, ...] to [C, 1, ...]."""
    return x.flatten(2).sum(dim=-1).sum(dim=0).view(-1, *(1 for _ in x.shape[2:]))


@torch.library.custom_op("ear_vae::snake", mutates_args=())
def _snake_operator(x: Tensor, alpha: Tensor, inverse_beta: Tensor) -> Tensor:
    wide = x.to(alpha.dtype)
    sine = torch.sin(wide * _like(alpha, x))
    return (wide + sine.square() * _like(inverse_beta, x)).to(x.dtype)


@torch.library.custom_op("ear_vae::snake_backward", mutates_args=())
def _snake_backward_operator(
    grad: Tensor, x: Tensor, alpha: Tensor, inverse_beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide, wide_grad = x.to(alpha.dtype), grad.to(alpha.dtype)
    for_x, for_alpha, for_inverse_beta = _gradients(wide_grad, wide, _like(alpha, x), _like(inverse_beta, x))
    return for_x.to(x.dtype), for_alpha.flatten(), for_inverse_beta.flatten()


@_snake_operator.register_fake
def _(x: Tensor, alpha: Tensor, inverse_beta: Tensor) -> Tensor:
    return torch.empty_like(x)


@_snake_backward_operator.register_fake
def _(grad: Tensor, x: Tensor, alpha: Tensor, inverse_beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(alpha), torch.empty_like(inverse_beta)


def _keep(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.ear_vae.snake_backward(grad, *ctx.saved_tensors)
    return result


_snake_operator.register_autograd(_backward, setup_context=_keep)

if importlib.util.find_spec("triton") is not None:

    @_snake_operator.register_kernel("cuda")
    def _(x: Tensor, alpha: Tensor, inverse_beta: Tensor) -> Tensor:
        from ear_vae.network import snake_triton

        return snake_triton.forward(x, alpha, inverse_beta)

    @_snake_backward_operator.register_kernel("cuda")
    def _(grad: Tensor, x: Tensor, alpha: Tensor, inverse_beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from ear_vae.network import snake_triton

        return snake_triton.backward(grad, x, alpha, inverse_beta)
