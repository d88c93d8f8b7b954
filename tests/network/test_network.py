"""Blocks against their formulas."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from ear_vae import EarVAE
from ear_vae.audio import read_audio
from ear_vae.config import EarVAEConfig
from ear_vae.network import snake as snake_module
from ear_vae.network.blocks import (
    Conv1d,
    ConvTranspose1d,
    ResidualUnit,
    Snake,
    keep_kernels,
    residual_units,
)
from ear_vae.network.snake import (
    DeferredSum,
    compile_snake,
    plain_backward,
    plain_forward,
    snake,
    snake_of_sum,
)
from ear_vae.network.transformer import LatentTransformer, rotary_table, rotate


def random_snake(channels: int, dtype: torch.dtype = torch.float64) -> Snake:
    snake = Snake(channels).to(dtype)
    torch.nn.init.normal_(snake.log_alpha)
    torch.nn.init.normal_(snake.log_beta)
    return snake


def snake_formula(x: torch.Tensor, snake: Snake) -> torch.Tensor:
    alpha, beta = snake.log_alpha.exp()[:, None], snake.log_beta.exp()[:, None]
    return x + torch.sin(alpha * x) ** 2 / (beta + 1e-9)


def of_shape(*shape: int, last: bool = False, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Noise, with the channels last in memory if asked."""
    x = torch.randn(*shape, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def operator(x: torch.Tensor, log_alpha: torch.Tensor, log_beta: torch.Tensor) -> torch.Tensor:
    """The operator that a GPU uses, with nothing to add."""
    result: torch.Tensor = torch.ops.ear_vae.snake(x, None, None, log_alpha, log_beta, False)[1]
    return result


def formula_of(snake: Snake, x: torch.Tensor) -> torch.Tensor:
    """The formula on [B, C, N] or [B, C, 1, N]."""
    return snake_formula(x.flatten(2), snake).reshape(x.shape)


SHAPES = pytest.mark.parametrize(
    ("shape", "last"), [((2, 3, 50), False), ((2, 3, 1, 50), False), ((2, 3, 1, 50), True)]
)


@SHAPES
def test_snake_is_its_formula_with_and_without_gradient(shape: tuple[int, ...], last: bool) -> None:
    snake, x = random_snake(3), of_shape(*shape, last=last)
    expected = formula_of(snake, x)
    torch.testing.assert_close(snake(x), expected)
    with torch.no_grad():
        found = snake(x)
    torch.testing.assert_close(found, expected)
    assert found.stride() == x.stride()


@SHAPES
def test_snake_gradients_are_those_of_the_formula(shape: tuple[int, ...], last: bool) -> None:
    snake, x = random_snake(3), of_shape(*shape, last=last).requires_grad_()
    weights = torch.randn(shape, dtype=torch.float64)
    inputs = (x, snake.log_alpha, snake.log_beta)
    found = torch.autograd.grad((weights * snake(x)).sum(), inputs)
    expected = torch.autograd.grad((weights * formula_of(snake, x)).sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@SHAPES
def test_snake_passes_gradcheck(shape: tuple[int, ...], last: bool) -> None:
    snake, x = random_snake(3), of_shape(*shape[:-1], 3, last=last).requires_grad_()
    assert torch.autograd.gradcheck(snake, x)
    # The operator in its form without Triton.
    inputs = (x, snake.log_alpha, snake.log_beta)
    assert torch.autograd.gradcheck(operator, inputs)
    torch.testing.assert_close(operator(*inputs), snake(x))


LAYOUTS = pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 3, 8),
        torch.randn(2, 3, 1, 8),
        torch.randn(2, 3, 1, 8).contiguous(memory_format=torch.channels_last),
        torch.randn(8, 3, 2).permute(2, 1, 0),
        torch.randn(2, 3, 1, 20)[..., 5:13],
        torch.randn(1, 3, 8).expand(2, 3, 8),
        torch.randn(2, 1, 1, 8),
    ],
    ids=["plain", "image", "channels last", "permuted", "part", "expanded", "one channel"],
)


# What is added: a bias, a residual, and whether the sum is kept.
PARTS = pytest.mark.parametrize(
    "parts",
    [
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (True, False, True),
        (True, True, True),
    ],
    ids=["nothing", "bias", "bias, residual", "bias, kept", "bias, residual, kept"],
)


def sum_of_parts(x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None) -> torch.Tensor:
    """Added up in the wider dtype, then rounded to that of x and the residual."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    total = x.to(wide)
    if bias is not None:
        total = total + bias.view(-1, *(1 for _ in x.shape[2:])).to(wide)
    if residual is not None:
        total = total + residual.to(wide)
    return total.to(dtype).to(wide)


@PARTS
@LAYOUTS
def test_snake_operators_are_what_compilers_take(
    x: torch.Tensor, parts: tuple[bool, bool, bool], request: pytest.FixtureRequest
) -> None:
    """Among others, results of the strides that are promised, and none that is a view of another."""
    has_bias, has_residual, keep_sum = parts
    logs = torch.randn(2, x.shape[1]).unbind()
    bias = torch.randn(x.shape[1]) if has_bias else None
    residual = torch.randn(x.shape) if has_residual else None
    # The dynamic shapes of all layouts would take a minute.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    if request.node.callspec.id == "channels last-bias, residual, kept":
        checks += ("test_aot_dispatch_dynamic",)
    forward, backward = torch.ops.ear_vae.snake.default, torch.ops.ear_vae.snake_backward.default
    inputs = [x.detach().requires_grad_(), bias, residual, *logs, keep_sum]
    torch.library.opcheck(forward, inputs, test_utils=checks)
    grads = [torch.randn(x.shape), torch.randn(x.shape) if keep_sum else None]
    torch.library.opcheck(backward, [*grads, x, bias, residual, *logs, has_bias], test_utils=checks)


@PARTS
@SHAPES
def test_snake_of_a_sum_passes_gradcheck(
    shape: tuple[int, ...], last: bool, parts: tuple[bool, bool, bool]
) -> None:
    """The operator in its form without Triton; and it is the formula of what is added."""
    has_bias, has_residual, keep_sum = parts
    snake, x = random_snake(3), of_shape(*shape[:-1], 3, last=last).requires_grad_()
    bias = torch.randn(3, dtype=torch.float64).requires_grad_() if has_bias else None
    residual = of_shape(*x.shape, last=last).requires_grad_() if has_residual else None
    inputs = (x, bias, residual, snake.log_alpha, snake.log_beta)

    def results(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total, activated = torch.ops.ear_vae.snake(*given, keep_sum)
        return (total, activated) if keep_sum else (activated,)

    total, activated = torch.ops.ear_vae.snake(*inputs, keep_sum)
    expected = sum_of_parts(x, bias, residual)
    torch.testing.assert_close(activated, formula_of(snake, expected))
    assert activated.stride() == x.stride()
    if keep_sum:
        torch.testing.assert_close(total, expected)
        assert total.stride() == x.stride()
    else:
        assert total.numel() == 0
    if any(parts):
        by_hand = snake_of_sum(
            DeferredSum(x, bias, residual), snake.log_alpha, snake.log_beta, keep_sum=keep_sum
        )
        torch.testing.assert_close(by_hand, (total, activated))
    assert torch.autograd.gradcheck(results, inputs)
    if keep_sum:
        # Where only the sum is used after all.
        (found,) = torch.autograd.grad(torch.ops.ear_vae.snake(*inputs, True)[0].sum(), [x])
        torch.testing.assert_close(found, torch.ones_like(x))


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    """Triton's kernels, which its interpreter runs on the CPU."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1")
    return importlib.import_module("ear_vae.network.snake_triton")


@pytest.fixture
def kernels_on_the_cpu(interpreted: ModuleType) -> Iterator[None]:
    """The operators with these kernels instead of the formula."""
    operators = snake_module._snake_operator, snake_module._snake_backward_operator
    kernels = (interpreted.forward, interpreted.backward), (plain_forward, plain_backward)
    for operator, kernel in zip(operators, kernels[0], strict=True):
        operator.register_kernel("cpu", kernel)
    yield
    for operator, kernel in zip(operators, kernels[1], strict=True):
        operator.register_kernel("cpu", kernel)


@pytest.mark.usefixtures("kernels_on_the_cpu")
class TestKernels:
    """In the interpreter, and through the operators."""

    @PARTS
    @LAYOUTS
    def test_they_are_what_compilers_take(
        self, x: torch.Tensor, parts: tuple[bool, bool, bool], request: pytest.FixtureRequest
    ) -> None:
        test_snake_operators_are_what_compilers_take(x, parts, request)

    @pytest.mark.parametrize(
        ("dtype", "sine", "tolerance"),
        [
            (torch.float32, "exact", 1e-5),
            (torch.float32, "reduced", 1e-5),
            (torch.bfloat16, "exact", 1e-2),
            (torch.float64, "exact", 1e-5),
        ],
    )
    @PARTS
    @SHAPES
    def test_they_give_the_formula(
        self,
        shape: tuple[int, ...],
        last: bool,
        parts: tuple[bool, bool, bool],
        dtype: torch.dtype,
        sine: str,
        tolerance: float,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """With gradients, of more values than a block holds; parameters in float32 as in mixed precision."""
        monkeypatch.setattr(snake_module.switches, "sine", sine)
        torch.manual_seed(0)
        has_bias, has_residual, keep_sum = parts
        snake = random_snake(3, torch.float32)

        def coarse(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            """Noise whose sums bfloat16 holds, so that it does not matter how the interpreter rounds them."""
            noise = of_shape(*shape, last=last and len(shape) > 1).mul(16).round().div(16).clamp(-4, 4)
            return noise.to(dtype).requires_grad_()

        x = coarse(*shape[:-1], 1500, dtype=dtype)
        bias = coarse(3, dtype=torch.float32) if has_bias else None
        residual = coarse(*x.shape, dtype=dtype) if has_residual else None
        wide = torch.promote_types(dtype, torch.float32)
        found = torch.ops.ear_vae.snake(x, bias, residual, snake.log_alpha, snake.log_beta, keep_sum)
        total = sum_of_parts(x, bias, residual)
        expected = total, formula_of(snake, total)
        used = slice(0 if keep_sum else 1, 2)
        assert keep_sum or found[0].numel() == 0
        for one, other in zip(found[used], expected[used], strict=True):
            assert (one.dtype, one.stride()) == (x.dtype, x.stride())
            torch.testing.assert_close(one.to(wide), other, rtol=tolerance, atol=tolerance)
        grads = [of_shape(*x.shape, dtype=dtype) for _ in found[used]]
        for given, several in (([x, residual], 10), ([bias, snake.log_alpha, snake.log_beta], 100)):
            inputs = [tensor for tensor in given if tensor is not None]
            gradients = torch.autograd.grad(found[used], inputs, grads, retain_graph=True)
            wanted = torch.autograd.grad(
                expected[used], inputs, [grad.to(wide) for grad in grads], retain_graph=True
            )
            for one, other in zip(gradients, wanted, strict=True):
                assert one.dtype == other.dtype
                torch.testing.assert_close(one, other, rtol=tolerance, atol=several * tolerance)

    def test_parts_may_differ_in_dtype(self) -> None:
        """A residual in float32 beside a convolution in bfloat16 makes a sum in float32, as x + y would."""
        snake = random_snake(3, torch.float32)
        x = of_shape(2, 3, 1, 40, last=True, dtype=torch.bfloat16).requires_grad_()
        bias, residual = torch.randn(3), torch.randn(2, 3, 1, 40).requires_grad_()
        total, activated = torch.ops.ear_vae.snake(x, bias, residual, snake.log_alpha, snake.log_beta, True)
        expected = x.float() + bias[:, None, None] + residual
        torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(activated, formula_of(snake, expected), rtol=1e-5, atol=1e-5)
        found = torch.autograd.grad(activated.sum(), (x, residual))
        assert [gradient.dtype for gradient in found] == [torch.bfloat16, torch.float32]
        (wanted,) = torch.autograd.grad(formula_of(snake, expected).sum(), [residual])
        torch.testing.assert_close(found[1], wanted, rtol=1e-4, atol=1e-4)

    def test_a_pass_of_training(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Forward and backward through a whole model, every Snake by the kernels, against the plain one."""
        torch.manual_seed(0)
        vae = EarVAE(EarVAEConfig(channels=2, channel_multipliers=(1,), strides=(4,)))
        audio = 0.3 * torch.randn(1, 2, 64)
        parameters = list(vae.parameters())

        def gradients() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(vae(audio).audio.square().sum(), parameters)

        expected = gradients()
        monkeypatch.setattr("ear_vae.network.blocks.snake", lambda x, *given, **_: operator(x, *given))
        for one, other in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_a_pass_of_training_with_sums(self, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same with biases and residuals added by the kernels."""
        torch.manual_seed(0)
        vae = EarVAE(EarVAEConfig(channels=2, channel_multipliers=(1, 1), strides=(2, 2)))
        audio = 0.3 * torch.randn(1, 2, 64)
        parameters = list(vae.parameters())
        expected = torch.autograd.grad(vae(audio).audio.square().sum(), parameters)
        sums = defer_sums(monkeypatch)
        vae.gradient_checkpointing = checkpointing
        found = torch.autograd.grad(vae(audio).audio.square().sum(), parameters)
        assert len(sums) >= 2 * 2 * 6
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)

    def test_inference_with_sums(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Channels last, as a Runner has it."""
        torch.manual_seed(0)
        vae = EarVAE(EarVAEConfig(channels=2, channel_multipliers=(1, 1), strides=(2, 2)))
        vae.requires_grad_(False)
        audio, latents = torch.randn(2, 2, 64), torch.randn(2, 64, 16)
        expected = vae.encoder(audio[:, :, None]), vae.decoder(latents[:, :, None])
        sums = defer_sums(monkeypatch)
        images = (t[:, :, None].contiguous(memory_format=torch.channels_last) for t in (audio, latents))
        found = tuple(network(x) for network, x in zip((vae.encoder, vae.decoder), images, strict=True))
        # Every Snake adds a sum, and of those the first of each unit keeps it.
        assert len(sums) == sum(isinstance(m, (Snake, ResidualUnit)) for m in vae.modules())
        assert sum(sums) == sum(isinstance(m, ResidualUnit) for m in vae.modules())
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def defer_sums(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Has networks on a CPU run as on a GPU with `fused_sums`; returns what will be kept of each sum."""
    kept: list[bool] = []

    def by_operator(
        x: DeferredSum, *logs: torch.Tensor, keep_sum: bool, **_: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kept.append(keep_sum)
        result: tuple[torch.Tensor, torch.Tensor] = torch.ops.ear_vae.snake(*x.take(), *logs, keep_sum)
        return result

    monkeypatch.setattr("ear_vae.network.blocks.fuses_sums", lambda x: True)
    monkeypatch.setattr("ear_vae.network.blocks.snake_of_sum", by_operator)
    return kept


@pytest.mark.parametrize("deviation", [1, 1000])
def test_the_reduced_sine(interpreted: ModuleType, deviation: float) -> None:
    """sin² and the sine in its derivative against float64, of the same float32 angles."""
    angle = deviation * torch.randn(1_000_000)
    squares, twices = importlib.import_module("sine_kernels").sines(angle, "reduced")
    assert (squares - angle.double().sin().square()).abs().max() < 6e-8
    assert (twices - (2 * angle.double()).sin()).abs().max() < 1.4e-7
    # Small angles keep their digits.
    small = torch.logspace(-15, -1, 1000)
    squares, _ = importlib.import_module("sine_kernels").sines(small, "reduced")
    torch.testing.assert_close(squares.double(), small.double().sin().square(), rtol=1.5e-7, atol=0)


@pytest.mark.parametrize("error", [-(2**-21.41), 2**-21.41])
def test_the_approximate_sine(interpreted: ModuleType, error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the special function units stands a sine that is wrong by all that CUDA's guide concedes it."""
    within = []

    def fast_sinf(angle):  # type: ignore[no-untyped-def]
        within.append(angle.handle.data.__abs__().max())
        return interpreted.tl.sin(angle) + error

    monkeypatch.setattr(interpreted, "libdevice", SimpleNamespace(fast_sinf=fast_sinf))
    angle = 1000 * torch.randn(100_000)
    squares, twices = importlib.import_module("sine_kernels").sines(angle, "approx")
    assert 0.78 < min(within) <= max(within) < 1.58
    assert (squares - angle.double().sin().square()).abs().max() < 7e-7
    assert (twices - (2 * angle.double()).sin()).abs().max() < 6e-7


def test_a_residual_unit_reads_and_writes_its_activation_ten_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fifteen: a convolution without its bias 2, twice; bias and Snake 2; bias, residual and Snake 4."""
    monkeypatch.setattr(snake_module.switches, "fused_sums", True)
    passes = 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal passes
            result = func(*args, **(kwargs or {}))
            results = result if isinstance(result, tuple) else (result,)
            if isinstance(results[0], torch.Tensor) and not func.is_view:
                tensors = (*args, *results)
                passes += sum(isinstance(t, torch.Tensor) and t.numel() == shape.numel() for t in tensors)
            return result

    shape = torch.Size((1, 4, 1, 1000))
    units = residual_units(4).requires_grad_(False)
    with FakeTensorMode(), torch.device("cuda"):
        weights = {name: torch.empty(weight.shape) for name, weight in units.named_parameters()}
        given = DeferredSum(torch.empty(shape), torch.empty(4), torch.empty(shape))
        with Counting():
            result = functional_call(units, weights, (given,))
    assert isinstance(result, DeferredSum)
    assert passes == 10 * len(units)


def test_without_a_compiler_there_is_one_warning_and_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton raises at its first launch where there is no C compiler."""
    broken = ModuleType("ear_vae.network.snake_triton")
    tried = []

    def forward(*given: torch.Tensor) -> torch.Tensor:
        tried.append(given)
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    broken.forward = broken.backward = forward
    monkeypatch.setitem(sys.modules, broken.__name__, broken)
    snake_module.kernels.cache_clear()
    x, *logs = torch.randn(2, 3, 8), torch.randn(3), torch.randn(3)
    forward_inputs, backward_inputs = (x, None, None, *logs, False), (x, None, x, None, None, *logs, False)
    with pytest.warns(UserWarning, match="several passes, which is slower: Failed to find C compiler"):
        found = snake_module.by_kernel(*forward_inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = snake_module.by_kernel(*forward_inputs)
        gradients = snake_module.gradients_by_kernel(*backward_inputs)
    snake_module.kernels.cache_clear()
    assert len(tried) == 1
    torch.testing.assert_close(found, plain_forward(*forward_inputs))
    torch.testing.assert_close(again, found)
    for one, other in zip(gradients, plain_backward(*backward_inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("traced_formula", [False, True])
@pytest.mark.parametrize("compiling", [False, True])
def test_compilers_may_see_the_formula(
    compiling: bool, traced_formula: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(snake_module.switches, "traced_formula", traced_formula)
    called = []

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Listening():
        x, logs = torch.empty(2, 3, 1, 8, device="cuda"), torch.empty(2, 3, device="cuda")
        y = snake(x, *logs)
    assert y.shape == x.shape
    assert ("ear_vae.snake.default" in called) == (not (compiling and traced_formula))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@SHAPES
def test_snake_on_a_gpu(shape: tuple[int, ...], last: bool) -> None:
    snake, x = random_snake(3, torch.float32), of_shape(*shape, last=last, dtype=torch.float32)
    expected = snake(x.requires_grad_())
    expected.sum().backward()
    x_there = x.detach().cuda().requires_grad_()
    found = snake.cuda()(x_there)
    found.sum().backward()
    torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x_there.grad.cpu(), x.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("sine", "error"), [("exact", 1.3e-7), ("reduced", 6e-8), ("approx", 7e-7)])
def test_sines_on_a_gpu(sine: str, error: float) -> None:
    angle = 1000 * torch.randn(1_000_000)
    squares, _ = importlib.import_module("sine_kernels").sines(angle.cuda(), sine)
    assert (squares.cpu() - angle.double().sin().square()).abs().max() < error


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@PARTS
@SHAPES
def test_snake_of_a_sum_on_a_gpu(shape: tuple[int, ...], last: bool, parts: tuple[bool, bool, bool]) -> None:
    has_bias, has_residual, keep_sum = parts
    logs, x, residual = torch.randn(2, 3), *(of_shape(*shape, last=last, dtype=torch.float32) for _ in "12")
    given = [x, torch.randn(3) if has_bias else None, residual if has_residual else None, *(0.3 * logs)]
    results = []
    for device in ("cpu", "cuda"):
        inputs = [None if t is None else t.detach().to(device).requires_grad_() for t in given]
        total, activated = torch.ops.ear_vae.snake(*inputs, keep_sum)
        assert activated.stride() == x.stride()
        there = [t for t in inputs if t is not None]
        gradients = torch.autograd.grad((activated + total if keep_sum else activated).sum(), there)
        results.append([t.cpu() for t in (total, activated, *gradients)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_snake_keeps_bfloat16_but_computes_its_sine_in_float32() -> None:
    snake = random_snake(1, torch.float32)
    with torch.no_grad():
        snake.log_alpha.fill_(2.0)
    x = torch.linspace(100, 200, 64).to(torch.bfloat16)[None]
    expected = snake_formula(x.float(), snake).to(torch.bfloat16)
    found = snake.to(torch.bfloat16)(x)
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() <= 2.0
    naive = x + torch.sin(snake.log_alpha.exp() * x) ** 2 / snake.log_beta.exp()
    assert (found - expected).abs().float().mean() <= (naive - expected).abs().float().mean()


@pytest.mark.skipif(shutil.which("c++") is None, reason="nothing to compile with")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_snake_compiled_is_its_formula(dtype: torch.dtype) -> None:
    compile_snake(torch.device("cpu"), dtype)
    snake, wide = random_snake(3).to(dtype), of_shape(2, 3, 1, 60, last=True)
    snake.compiled = True
    # The second is a part of a tile: with the channels last, but not in one piece.
    for x in (wide.to(dtype), wide.to(dtype)[..., 5:40]):
        with torch.no_grad():
            found = snake(x)
        expected = formula_of(snake.double(), x.double())
        snake.to(dtype)
        assert found.dtype == dtype
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
        assert found.is_contiguous(memory_format=torch.channels_last)


CONVOLUTIONS = pytest.mark.parametrize(
    "build",
    [
        lambda base: base[0](3, 5, 7, padding=9, dilation=3),
        lambda base: base[0](3, 5, 8, stride=4, padding=2),
        lambda base: base[1](3, 5, 8, stride=4, padding=2),
        lambda base: base[1](3, 5, 4, stride=2, padding=1, bias=False),
    ],
)


@CONVOLUTIONS
def test_convolutions_are_those_of_torch_in_both_forms(build) -> None:  # type: ignore[no-untyped-def]
    ours, plain = build((Conv1d, ConvTranspose1d)), build((torch.nn.Conv1d, torch.nn.ConvTranspose1d))
    plain.load_state_dict(ours.state_dict())
    # Also so short that the convolution is one product.
    for batch, length in ((2, 40), (1, 4), (2, 4)):
        x = torch.randn(batch, 3, length)
        wanted = plain(x)
        image = x[:, :, None].contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ours(x), wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours(image)[:, :, 0], wanted, rtol=1e-5, atol=1e-6)


def test_residual_unit_uses_one_snake_twice_and_keeps_the_length() -> None:
    unit = ResidualUnit(4, dilation=9)
    x = torch.randn(1, 4, 100)
    expected = x + unit.conv_pointwise(unit.snake(unit.conv_dilated(unit.snake(x))))
    torch.testing.assert_close(unit(x), expected)
    assert sum(isinstance(module, Snake) for module in unit.modules()) == 1


@pytest.mark.parametrize("form", ["signal", "image", "autocast"])
@pytest.mark.parametrize("make", [Conv1d, ConvTranspose1d])
def test_narrow_rate_changes_compute_in_float32(make: type[torch.nn.Module], form: str) -> None:
    """With AMX, oneDNN's bfloat16 kernels are wrong for this shape."""
    torch.manual_seed(0)
    conv = make(4, 4, 16, stride=8, padding=4)
    x = torch.randn(1, 4, 200)
    if form != "autocast":
        conv, x = conv.to(torch.bfloat16), x.to(torch.bfloat16)
    function = torch.nn.functional.conv1d if make is Conv1d else torch.nn.functional.conv_transpose1d
    with torch.no_grad():
        expected = function(x.float(), conv.weight.float(), conv.bias.float(), stride=8, padding=4).to(
            x.dtype
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
            found = conv(x.unsqueeze(-2)).squeeze(-2) if form == "image" else conv(x)
    assert found.dtype == x.dtype
    tolerance = 1e-5 if x.dtype == torch.float32 else 4e-3
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance / 4)


def test_trained_under_autocast_narrow_layers_and_sums_are_float32() -> None:
    torch.manual_seed(0)
    narrow, x = ResidualUnit(32, dilation=3), torch.randn(2, 32, 200)
    wide, y = ResidualUnit(64, dilation=3), torch.randn(2, 64, 200, dtype=torch.bfloat16)
    expected = narrow(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert narrow(x).equal(expected)
        assert wide(y).dtype == torch.float32
        assert wide.conv_dilated(y).dtype == torch.bfloat16


def test_trained_under_autocast_the_bundled_model_sounds_as_in_float32(piece: Path) -> None:
    bundled = EarVAE.from_pretrained("ear-vae-tiny")
    audio = torch.as_tensor(read_audio(piece)[0])[None, :, :65_536]
    with torch.no_grad():
        latents = bundled.encode(audio).mode()
    rebuilt = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            rebuilt.append(bundled.decode(latents.clone().requires_grad_()).detach().float())
    error = (rebuilt[1] - rebuilt[0]).square().sum() / rebuilt[0].square().sum()
    assert 10 * float(error.log10()) < -45


def test_kept_kernels_are_those_of_the_dtype_of_the_input() -> None:
    torch.manual_seed(0)
    conv, x = Conv1d(64, 64, 3, padding=1), torch.randn(1, 64, 1, 100)
    kept: dict = {}
    with torch.no_grad(), keep_kernels(kept):
        wide = conv(x)
        reduced = conv(x.to(torch.bfloat16))
        assert conv(x).equal(wide)
    assert (wide.dtype, reduced.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(reduced.float(), wide, rtol=2e-2, atol=2e-2)


def test_the_squared_sine_for_bfloat16() -> None:
    """The polynomial against float64: exact for small angles, for large ones as float32 holds them."""
    for most, tolerance in ((3.2, 1e-6), (1000, 2e-4)):
        angle = torch.linspace(-most, most, 100_001)
        found = snake_module._squared_sine(angle, torch.bfloat16)
        assert (found - angle.double().sin().square()).abs().max() < tolerance
    assert found.dtype == torch.float32


def test_residual_unit_takes_another_activation() -> None:
    """As benchmarks put the plain formula there."""
    unit, x = ResidualUnit(4, dilation=3), torch.randn(1, 4, 100)
    unit.snake = torch.nn.Tanh()
    expected = x + unit.conv_pointwise(unit.conv_dilated(x.tanh()).tanh())
    torch.testing.assert_close(unit(x), expected)


def test_rotation_depends_on_the_distance_of_frames_only() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    cos, sin = rotary_table(50, 32, like)
    q, k = torch.randn(32, dtype=torch.float64), torch.randn(32, dtype=torch.float64)
    turned_q = rotate(q.expand(1, 1, 50, 32), cos, sin)[0, 0]
    turned_k = rotate(k.expand(1, 1, 50, 32), cos, sin)[0, 0]
    products = turned_q @ turned_k.T
    torch.testing.assert_close(products.diagonal(7), products[0, 7].expand(43))
    torch.testing.assert_close(turned_q[0], q)
    angle = torch.tensor(5.0 * 10_000.0 ** (-2 / 32), dtype=torch.float64)
    torch.testing.assert_close(turned_q[5, 1], q[1] * angle.cos() - q[17] * angle.sin())


def test_transformer_mixes_all_frames_and_keeps_the_shape() -> None:
    torch.manual_seed(0)
    transformer = LatentTransformer(EarVAEConfig(channels=4)).double()
    x = torch.randn(1, 64, 30, dtype=torch.float64, requires_grad=True)
    y = transformer(x)
    assert y.shape == x.shape
    y[0, :, 3].sum().backward()
    assert (x.grad[0].abs().sum(0) > 0).all()
