"""The Snake function x + sin²(αx)/β in as few passes over memory as the device allows.

On a GPU it is one pass: a Triton kernel behind `torch.ops.ear_vae.snake`, an operator that compilers and
exporters take as a whole; where Triton is missing or cannot compile, that operator computes the plain
formula. Elsewhere it is a handful of passes over what should lie in the cache, see
`ear_vae.inference.tiling`, or one that torch.compile writes.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

# Keeps 1/β finite.
BETA_EPSILON = 1e-9


@dataclass
class Switches:
    """What is written for GPUs and not measured on one: off until it is.

    Attributes:
        reduced_sine: The kernels compute the sine by reduction modulo π and a polynomial, in a third of the
            instructions and wrong by 1.2e-7 at most while |αx| is below 10,000.
        traced_formula: torch.compile gets the plain formula, which it may fuse with what stands around it,
            instead of the operator.
    """

    reduced_sine: bool = False
    traced_formula: bool = False


switches = Switches()


def snake(x: Tensor, log_alpha: Tensor, log_beta: Tensor, *, compiled: bool = False) -> Tensor:
    """Snake activation x + sin²(αx)/β, the sine in at least float32 whatever the dtype of `x`.

    Args:
        x: [B, C, N], or [B, C, 1, N] with channels first or last in memory.
        log_alpha: Logarithm of α, [C].
        log_beta: Logarithm of β, [C].
        compiled: Use what `compile_snake` has tried, where no gradient is recorded and `x` is [B, C, 1, N].

    Returns:
        Shape, dtype and memory layout of `x`.
    """
    if x.is_cuda and not (switches.traced_formula and torch.compiler.is_compiling()):
        result: Tensor = torch.ops.ear_vae.snake(x, log_alpha, log_beta)
        return result
    alpha, inverse_beta = _rates(log_alpha, log_beta, compute_dtype(x))
    recorded = torch.is_grad_enabled() and (x.requires_grad or alpha.requires_grad)
    if compiled and not recorded and x.ndim == 4:
        return _one_pass(x, alpha, inverse_beta)
    if x.is_cuda:
        return _formula(x, alpha, inverse_beta)
    wide, alpha, inverse_beta = x.to(alpha.dtype), _like(alpha, x), _like(inverse_beta, x)
    if recorded:
        return _SnakeFunction.apply(wide, alpha, inverse_beta).to(x.dtype)
    # sin²(αx)/β as the square of sin(αx)/√β: a pass over memory less.
    sine = torch.mul(wide, alpha).sin_().mul_(inverse_beta.sqrt())
    return torch.addcmul(wide, sine, sine).to(x.dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What the sine of αx is computed in."""
    return torch.promote_types(x.dtype, torch.float32)


def layout(x: Tensor) -> torch.memory_format:
    """How results lie in memory: with the channels last where those of `x` do, else in the plain order."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


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


def _rates(log_alpha: Tensor, log_beta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """α and 1/β, [C]."""
    return log_alpha.to(dtype).exp(), 1 / (log_beta.to(dtype).exp() + BETA_EPSILON)


def _formula(x: Tensor, alpha: Tensor, inverse_beta: Tensor) -> Tensor:
    wide = x.to(alpha.dtype)
    return (wide + torch.sin(wide * _like(alpha, x)).square() * _like(inverse_beta, x)).to(x.dtype)


def _laid_out(result: Tensor, x: Tensor) -> Tensor:
    """As what is promised for `x`, also where that is dense in another order or has axes of one."""
    return torch.empty_like(x, memory_format=layout(x)).copy_(result)


def plain_forward(x: Tensor, log_alpha: Tensor, log_beta: Tensor) -> Tensor:
    """What `torch.ops.ear_vae.snake` computes where no kernel does."""
    return _laid_out(_formula(x, *_rates(log_alpha, log_beta, compute_dtype(x))), x)


def plain_backward(
    grad: Tensor, x: Tensor, log_alpha: Tensor, log_beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What `torch.ops.ear_vae.snake_backward` computes where no kernel does."""
    dtype = compute_dtype(x)
    alpha, inverse_beta = _rates(log_alpha, log_beta, dtype)
    for_x, for_alpha, for_inverse_beta = _gradients(
        grad.to(dtype), x.to(dtype), _like(alpha, x), _like(inverse_beta, x)
    )
    # With 1/β = 1/(b + ε) and b = exp(log β): the derivative by log β is −b/(b + ε)².
    for_beta = -for_inverse_beta.flatten() * log_beta.to(dtype).exp() * inverse_beta.square()
    for_alpha = for_alpha.flatten() * alpha
    return _laid_out(for_x, x), for_alpha.to(log_alpha.dtype), for_beta.to(log_beta.dtype)


_snake_operator = torch.library.custom_op("ear_vae::snake", plain_forward, mutates_args=())
_snake_backward_operator = torch.library.custom_op("ear_vae::snake_backward", plain_backward, mutates_args=())


@_snake_operator.register_fake
def _(x: Tensor, log_alpha: Tensor, log_beta: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=layout(x))


@_snake_backward_operator.register_fake
def _(grad: Tensor, x: Tensor, log_alpha: Tensor, log_beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    for_x = torch.empty_like(x, memory_format=layout(x))
    return for_x, torch.empty_like(log_alpha), torch.empty_like(log_beta)


def _keep(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.ear_vae.snake_backward(grad, *ctx.saved_tensors)
    return result


_snake_operator.register_autograd(_backward, setup_context=_keep)


@functools.cache
def kernels(device: torch.device) -> ModuleType | None:
    """`ear_vae.network.snake_triton`, once it has run on a device; None, with a warning, where it cannot.

    Triton compiles at the first launch, for which it needs a C compiler and Python's headers.
    """
    try:
        module = importlib.import_module("ear_vae.network.snake_triton")
        x, log = torch.zeros(1, 1, 1, device=device), torch.zeros(1, device=device)
        module.backward(module.forward(x, log, log), x, log, log)
    # Nothing is known of what a compiler, a linker or a driver may raise.
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(
            "Triton does not work here; the Snake function takes several passes, which is slower: "
            f"{lines[0]}; Triton needs a C compiler and Python's headers",
            stacklevel=2,
        )
        return None
    return module


@_snake_operator.register_kernel("cuda")
def by_kernel(x: Tensor, log_alpha: Tensor, log_beta: Tensor) -> Tensor:
    """`plain_forward` in one pass, where Triton works."""
    module = kernels(x.device)
    return (module.forward if module else plain_forward)(x, log_alpha, log_beta)


@_snake_backward_operator.register_kernel("cuda")
def gradients_by_kernel(
    grad: Tensor, x: Tensor, log_alpha: Tensor, log_beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`plain_backward` in one pass, where Triton works."""
    module = kernels(x.device)
    return (module.backward if module else plain_backward)(grad, x, log_alpha, log_beta)
