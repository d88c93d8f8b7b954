"""The Snake function x + sin²(αx)/β in as few passes over memory as the device allows.

On a GPU it is one pass: a Triton kernel behind `torch.ops.ear_vae.snake`, an operator that compilers and
exporters take as a whole; where Triton is missing or cannot compile, that operator computes the plain
formula. In the same pass it can add up what x is the sum of, see `DeferredSum`. Elsewhere it is a handful of
passes over what should lie in the cache, see `ear_vae.inference.tiling`, or one that torch.compile writes.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ear_vae.network.snake_common import (
    BETA_EPSILON,
    compute_dtype,
    keeps_float32,
    layout,
    narrower,
    sum_dtype,
    switches,
)

# sin²(πr) = u P(u) with u = r²: the coefficients of P, that of the highest power first. The error is at most
# 4.4e-7 for r within ±1/2 (weighted least squares, made minimax by Lawson's iteration).
_SQUARED_SINE = (10.581269, -29.426257, 42.643423, -32.465139, 9.8695248)


class DeferredSum:
    """What a Snake is to be applied to, not added up yet: `snake_of_sum` adds it in its own pass.

    Its parts are handed out once: whoever passed the sum on still holds it while what follows is computed,
    and would keep them in memory.

    Args:
        x: What a convolution without its bias gave, [B, C, N] or [B, C, 1, N].
        bias: The convolution's bias, [C].
        residual: Another summand of the shape of `x`.
    """

    def __init__(self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
        self._parts: list[tuple[Tensor, Tensor | None, Tensor | None]] = [(x, bias, residual)]

    def take(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Hands out x, bias and residual."""
        return self._parts.pop()

    def plus(self, residual: Tensor) -> DeferredSum:
        """The sum with a residual, in place of this one."""
        x, bias, _ = self.take()
        return DeferredSum(x, bias, residual)

    def total(self) -> Tensor:
        """Adds up in at least float32; the result has the dtype of x and the residual together."""
        return _added(*self.take())


def fuses_sums(x: Tensor) -> bool:
    """Whether sums on the device of `x` are to be deferred: on CUDA, where that is switched on, eagerly."""
    return switches.fused_sums and x.is_cuda and not torch.compiler.is_compiling()


def fuses_residuals(x: Tensor) -> bool:
    """Whether a compiled Snake is to add up a residual unit: where no gradient is recorded, on a CPU."""
    recorded = torch.is_grad_enabled() and x.requires_grad
    return keeps_float32(x) and not recorded and not torch.compiler.is_compiling()


def snake(
    x: Tensor,
    log_alpha: Tensor,
    log_beta: Tensor,
    *,
    dtype: torch.dtype | None = None,
    compiled: bool = False,
    compiled_with_gradients: bool = False,
) -> Tensor:
    """Computes x + sin²(αx)/β, the sine in at least float32 whatever the dtype of `x`.

    Args:
        x: [B, C, N], or [B, C, 1, N] with channels first or last in memory.
        log_alpha: Logarithm of α, [C].
        log_beta: Logarithm of β, [C].
        dtype: That of the result, off CUDA; by default that of `x`.
        compiled: Use what `compile_snake` has tried, where no gradient is recorded and `x` is [B, C, 1, N].
        compiled_with_gradients: Use what `compile_snake_with_gradients` has tried, where a gradient is
            recorded and `x` is [B, C, N], off CUDA.

    Returns:
        Shape and memory layout of `x`.
    """
    if x.is_cuda and not (switches.traced_formula and torch.compiler.is_compiling()):
        _, operated = torch.ops.ear_vae.snake(x, None, None, log_alpha, log_beta, False)
        result: Tensor = operated
        return result
    dtype = dtype or x.dtype
    alpha, inverse_beta = _rates(log_alpha, log_beta, compute_dtype(x))
    recorded = torch.is_grad_enabled() and (x.requires_grad or alpha.requires_grad)
    if compiled and not recorded and x.ndim == 4:
        return _one_pass(x, alpha, inverse_beta, dtype)
    if x.is_cuda:
        return _formula(x, alpha, inverse_beta)
    if compiled_with_gradients and recorded and x.ndim == 3:
        return _CompiledSnakeFunction.apply(x, alpha, inverse_beta, dtype)
    wide, alpha, inverse_beta = x.to(alpha.dtype), _like(alpha, x), _like(inverse_beta, x)
    if recorded:
        return _SnakeFunction.apply(wide, alpha, inverse_beta).to(dtype)
    return _SnakeFunction.forward(wide, alpha, inverse_beta).to(dtype)


def snake_of_sum(
    x: DeferredSum,
    log_alpha: Tensor,
    log_beta: Tensor,
    *,
    keep_sum: bool,
    wide: bool = False,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Adds bias and residual and applies the Snake, in one pass on a GPU, and where it is compiled.

    Args:
        x: What to add.
        log_alpha: Logarithm of α, [C].
        log_beta: Logarithm of β, [C].
        keep_sum: Whether the sum is needed as well, as the input of a residual unit is.
        wide: Whether, on a CPU, the Snake is float32 at least also where its parameters are narrower.
        compiled: As for `snake`.

    Returns:
        The sum, empty where it is not kept and need not have been computed, and the Snake of the sum as it is
        rounded to its dtype.
    """
    parts = x.take()
    if parts[0].is_cuda:
        result: tuple[Tensor, Tensor] = torch.ops.ear_vae.snake(*parts, log_alpha, log_beta, keep_sum)
        return result
    y, bias, residual = parts
    if compiled and not wide and bias is None and residual is not None and fuses_residuals(y):
        rates = _rates(log_alpha, log_beta, compute_dtype(y, residual))
        return _sum_in_one_pass(y, residual, *rates, narrower(rates[0].dtype, log_alpha.dtype))
    total = _added(*parts)
    dtype = compute_dtype(total) if wide else narrower(total.dtype, log_alpha.dtype)
    activated = snake(total, log_alpha, log_beta, dtype=dtype, compiled=compiled)
    return total if keep_sum else total.new_empty(0), activated


def compile_snake(device: torch.device, dtype: torch.dtype) -> None:
    """Compiles what `snake` and `snake_of_sum` use with `compiled=True`, which takes some seconds.

    Args:
        device: Device of the input.
        dtype: Dtype of the parameters; what residual units add to is in float32 at least.

    Raises:
        RuntimeError, OSError: torch cannot compile here; most often there is no C++ compiler.
    """
    wide = torch.promote_types(dtype, torch.float32)
    # Of the size of a tile: what torch compiles for a few values computes in one thread, whatever comes then.
    y = torch.zeros(2, 64, 1, 2**14, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    alpha = torch.ones(64, device=device, dtype=wide)
    inverse_beta = alpha.clone()
    for x in {dtype: y, wide: y.to(wide)}.values():
        for result in dict.fromkeys((dtype, wide)):
            _one_pass(x, alpha, inverse_beta, result)
        _sum_in_one_pass(y, x.clone(), alpha, inverse_beta, dtype)


def compile_snake_with_gradients() -> None:
    """Compiles what `snake` uses with `compiled_with_gradients=True`, which takes some seconds.

    Raises:
        RuntimeError, OSError: As `compile_snake`.
    """
    # Of the size of a batch: what torch compiles for a few values computes in one thread, whatever comes.
    x, rates = torch.zeros(2, 16, 2**14), torch.ones(16)
    _training_pass(_snake_of_channels, x, rates, rates, x.dtype)
    _training_pass(_gradients_of_channels, x, x, rates, rates)


@torch.no_grad()
def _one_pass(x: Tensor, alpha: Tensor, inverse_beta: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, C, 1, N], fastest with the channels last in memory."""
    rows, shape = _as_rows(x)
    return _compiled(_snake_of_rows)(rows, alpha, inverse_beta, dtype).view(shape).movedim(-1, 1)


@torch.no_grad()
def _sum_in_one_pass(
    y: Tensor, residual: Tensor, alpha: Tensor, inverse_beta: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The sum of two [B, C, 1, N] in float32 at least, and the Snake of it."""
    (rows, shape), (others, _) = _as_rows(y), _as_rows(residual)
    total, activated = _compiled(_snake_of_added_rows)(rows, others, alpha, inverse_beta, dtype)
    return total.view(shape).movedim(-1, 1), activated.view(shape).movedim(-1, 1)


def _as_rows(x: Tensor) -> tuple[Tensor, torch.Size]:
    """[B, C, 1, N] as [B * N, C], and the shape to view that as."""
    last = x.movedim(1, -1)
    # No view of something, and without gradients: one compilation then serves all tiles.
    return last.flatten(0, -2).data, last.shape


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _snake_of_rows(rows: Tensor, alpha: Tensor, inverse_beta: Tensor, dtype: torch.dtype) -> Tensor:
    wide = rows.to(alpha.dtype)
    return (wide + _squared_sine(wide * alpha, dtype) * inverse_beta).to(dtype)


def _snake_of_added_rows(
    rows: Tensor, others: Tensor, alpha: Tensor, inverse_beta: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    total = rows.to(alpha.dtype) + others.to(alpha.dtype)
    return total, _snake_of_rows(total, alpha, inverse_beta, dtype)


def _squared_sine(angle: Tensor, dtype: torch.dtype) -> Tensor:
    """sin² for a result of that dtype: for bfloat16 in a quarter of the instructions."""
    if dtype != torch.bfloat16:
        return torch.sin(angle).square()
    turns = angle * (1 / math.pi)
    squared = (turns - torch.round(turns)).square()
    highest, *others = _SQUARED_SINE
    polynomial = squared * highest
    for coefficient in others[:-1]:
        polynomial = (polynomial + coefficient) * squared
    return (polynomial + others[-1]) * squared


def _like(per_channel: Tensor, x: Tensor) -> Tensor:
    """[C] so that it goes with the channels of [B, C, ...]."""
    return per_channel.view(-1, *(1 for _ in x.shape[2:]))


class _SnakeFunction(torch.autograd.Function):
    """The same formula for training: keeps only its input, where autograd would keep four copies of it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, alpha: Tensor, inverse_beta: Tensor) -> Tensor:
        # In place: a pass over new memory, page by page, takes longer than two over what is in the cache.
        return torch.mul(x, alpha).sin_().square_().mul_(inverse_beta).add_(x)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
        return _gradients(grad, *ctx.saved_tensors)


def _gradients(grad: Tensor, x: Tensor, alpha: Tensor, inverse_beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # With s = sin(αx): dy/dx = 1 + α/β sin(2αx), dy/dα = x/β sin(2αx), dy/d(1/β) = s².
    # Under vmap the gradient may be batched where the rest is not: nothing is multiplied by it in place.
    angle = x * alpha
    grad_inverse_beta = _sum_per_channel(angle.sin().square_() * grad)
    weighted = (angle.mul_(2).sin_() * grad).mul_(inverse_beta)
    grad_alpha = _sum_per_channel(weighted * x)
    return weighted.mul_(alpha).add_(grad), grad_alpha, grad_inverse_beta


class _CompiledSnakeFunction(torch.autograd.Function):
    """What `_SnakeFunction` computes of [B, C, N], in one pass forward and one back, casts included."""

    @staticmethod
    def forward(ctx, x: Tensor, alpha: Tensor, inverse_beta: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[no-untyped-def]
        x = x.contiguous()
        ctx.save_for_backward(x, alpha, inverse_beta)
        result: Tensor = _training_pass(_snake_of_channels, x, alpha, inverse_beta, dtype)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        return *_training_pass(_gradients_of_channels, grad.contiguous(), *ctx.saved_tensors), None


@torch.no_grad()
def _training_pass(function: Callable[..., Any], *arguments: Any) -> Any:
    """Detached, whatever the dtype of autocast, so that one compilation serves all layers."""
    tensors = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    with torch.autocast("cpu", enabled=False):
        return _compiled(function)(*tensors)


def _snake_of_channels(x: Tensor, alpha: Tensor, inverse_beta: Tensor, dtype: torch.dtype) -> Tensor:
    wide = x.to(alpha.dtype)
    return (wide + torch.sin(wide * alpha[:, None]).square() * inverse_beta[:, None]).to(dtype)


def _gradients_of_channels(
    grad: Tensor, x: Tensor, alpha: Tensor, inverse_beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # As `_gradients`. Summed over time first: over both at once, each thread would add up all channels.
    wide, grad = x.to(alpha.dtype), grad.to(alpha.dtype)
    angle = wide * alpha[:, None]
    for_inverse_beta = (torch.sin(angle).square() * grad).sum(-1).sum(0)
    weighted = torch.sin(2 * angle) * grad * inverse_beta[:, None]
    return (
        (weighted * alpha[:, None] + grad).to(x.dtype),
        (weighted * wide).sum(-1).sum(0),
        for_inverse_beta,
    )


def _sum_per_channel(x: Tensor) -> Tensor:
    """[B, C, ...] to [C, 1, ...]."""
    return x.sum(dim=tuple(range(2, x.ndim))).sum(dim=0).view(-1, *(1 for _ in x.shape[2:]))


def _rates(log_alpha: Tensor, log_beta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """α and 1/β, [C]."""
    return log_alpha.to(dtype).exp(), 1 / (log_beta.to(dtype).exp() + BETA_EPSILON)


def _formula(x: Tensor, alpha: Tensor, inverse_beta: Tensor) -> Tensor:
    wide = x.to(alpha.dtype)
    return (wide + torch.sin(wide * _like(alpha, x)).square() * _like(inverse_beta, x)).to(x.dtype)


def _added(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if bias is None and residual is None:
        return x
    total = x.to(compute_dtype(x, residual))
    if bias is not None:
        total = total + _like(bias, x)
    if residual is not None:
        total = total + residual
    return total.to(sum_dtype(x, residual))


def _empty(x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Of the shape of `x`, the dtype of the sum and the layout that is promised for `x`."""
    return torch.empty_like(x, dtype=sum_dtype(x, residual), memory_format=layout(x))


def plain_forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    log_alpha: Tensor,
    log_beta: Tensor,
    keep_sum: bool,
) -> tuple[Tensor, Tensor]:
    """What `torch.ops.ear_vae.snake` computes where no kernel does; as `snake_of_sum`."""
    total = _added(x, bias, residual)
    activated = _formula(total, *_rates(log_alpha, log_beta, compute_dtype(total)))
    # Copied, so that they lie as promised also where x is dense in another order or has axes of one.
    kept = _empty(x, residual).copy_(total) if keep_sum else total.new_empty(0)
    return kept, _empty(x, residual).copy_(activated)


def plain_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    log_alpha: Tensor,
    log_beta: Tensor,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `torch.ops.ear_vae.snake_backward` computes where no kernel does.

    Args:
        grad: Gradient by the Snake's output.
        grad_sum: Gradient by the sum, where that was kept and used.
        x: As in the forward pass; or the sum, then without bias and residual.
        bias: As in the forward pass.
        residual: As in the forward pass.
        log_alpha: As in the forward pass.
        log_beta: As in the forward pass.
        of_bias: Whether the gradient by a bias is wanted.

    Returns:
        Gradients by the sum, by the bias (in the dtype of the computation; empty where it is not wanted), by
        `log_alpha` and by `log_beta`.
    """
    total = _added(x, bias, residual)
    dtype = compute_dtype(total)
    alpha, inverse_beta = _rates(log_alpha, log_beta, dtype)
    for_sum, for_alpha, for_inverse_beta = _gradients(
        grad.to(dtype), total.to(dtype), _like(alpha, x), _like(inverse_beta, x)
    )
    if grad_sum is not None:
        for_sum = for_sum + grad_sum
    # With 1/β = 1/(b + ε) and b = exp(log β): the derivative by log β is −b/(b + ε)².
    for_beta = -for_inverse_beta.flatten() * log_beta.to(dtype).exp() * inverse_beta.square()
    for_alpha = for_alpha.flatten() * alpha
    return (
        _empty(x, residual).copy_(for_sum),
        _sum_per_channel(for_sum).flatten() if of_bias else alpha.new_empty(0),
        for_alpha.to(log_alpha.dtype),
        for_beta.to(log_beta.dtype),
    )


_snake_operator = torch.library.custom_op("ear_vae::snake", plain_forward, mutates_args=())
_snake_backward_operator = torch.library.custom_op("ear_vae::snake_backward", plain_backward, mutates_args=())


@_snake_operator.register_fake
def _(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    log_alpha: Tensor,
    log_beta: Tensor,
    keep_sum: bool,
) -> tuple[Tensor, Tensor]:
    activated = _empty(x, residual)
    return torch.empty_like(activated) if keep_sum else activated.new_empty(0), activated


@_snake_backward_operator.register_fake
def _(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    log_alpha: Tensor,
    log_beta: Tensor,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    for_bias = x.new_empty(x.shape[1] if of_bias else 0, dtype=compute_dtype(x, residual))
    return _empty(x, residual), for_bias, torch.empty_like(log_alpha), torch.empty_like(log_beta)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, bias, residual, log_alpha, log_beta, keep_sum = inputs
    total, _ = output
    ctx.set_materialize_grads(False)
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    # The sum is one tensor where its parts are two.
    parts = (total, None, None) if keep_sum else (x, bias, residual)
    ctx.save_for_backward(*parts, log_alpha, log_beta)


def _backward(ctx, grad_sum: Tensor | None, grad: Tensor | None):  # type: ignore[no-untyped-def]
    x, bias, residual, log_alpha, log_beta = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(x)
    for_sum, for_bias, for_alpha, for_beta = torch.ops.ear_vae.snake_backward(
        grad, grad_sum, x, bias, residual, log_alpha, log_beta, ctx.has_bias
    )
    # Autograd gives each the dtype of what it is a gradient by.
    return (
        for_sum,
        for_bias if ctx.has_bias else None,
        for_sum if ctx.has_residual else None,
        for_alpha,
        for_beta,
        None,
    )


_snake_operator.register_autograd(_backward, setup_context=_keep)


@functools.cache
def kernels(device: torch.device) -> ModuleType | None:
    """`ear_vae.network.snake_triton`, once it has run on a device; None, with a warning, where it cannot.

    Triton compiles at the first launch, for which it needs a C compiler and Python's headers.
    """
    try:
        module = importlib.import_module("ear_vae.network.snake_triton")
        x, log = torch.zeros(1, 1, 1, device=device), torch.zeros(1, device=device)
        module.forward(x, None, None, log, log, False)
        module.backward(x, None, x, None, None, log, log, False)
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
def by_kernel(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    log_alpha: Tensor,
    log_beta: Tensor,
    keep_sum: bool,
) -> tuple[Tensor, Tensor]:
    """`plain_forward` in one pass, where Triton works."""
    module = kernels(x.device)
    return (module.forward if module else plain_forward)(x, bias, residual, log_alpha, log_beta, keep_sum)


@_snake_backward_operator.register_kernel("cuda")
def gradients_by_kernel(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    log_alpha: Tensor,
    log_beta: Tensor,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`plain_backward` in one pass, where Triton works."""
    module = kernels(x.device)
    return (module.backward if module else plain_backward)(
        grad, grad_sum, x, bias, residual, log_alpha, log_beta, of_bias
    )
