"""Blocks against their formulas."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ear_vae import EarVAE
from ear_vae.config import EarVAEConfig
from ear_vae.network import snake as snake_module
from ear_vae.network.blocks import Conv1d, ConvTranspose1d, ResidualUnit, Snake
from ear_vae.network.snake import compile_snake, plain_backward, plain_forward, snake
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
    # The operator that a GPU uses, in its form without Triton.
    inputs = (x, snake.log_alpha, snake.log_beta)
    assert torch.autograd.gradcheck(torch.ops.ear_vae.snake, inputs)
    torch.testing.assert_close(torch.ops.ear_vae.snake(*inputs), snake(x))


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


@LAYOUTS
def test_snake_operators_are_what_compilers_take(x: torch.Tensor, request: pytest.FixtureRequest) -> None:
    """Among others, results of the strides that are promised, and none that is a view of another."""
    logs = torch.randn(2, x.shape[1]).unbind()
    # The dynamic shapes of all layouts would take a minute.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    if "channels last" in request.node.name:
        checks += ("test_aot_dispatch_dynamic",)
    forward, backward = torch.ops.ear_vae.snake.default, torch.ops.ear_vae.snake_backward.default
    torch.library.opcheck(forward, [x.detach().requires_grad_(), *logs], test_utils=checks)
    torch.library.opcheck(backward, [torch.randn(x.shape), x, *logs], test_utils=checks)


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

    @LAYOUTS
    def test_they_are_what_compilers_take(self, x: torch.Tensor, request: pytest.FixtureRequest) -> None:
        test_snake_operators_are_what_compilers_take(x, request)

    @pytest.mark.parametrize("reduced", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    @SHAPES
    def test_they_give_the_formula(
        self,
        shape: tuple[int, ...],
        last: bool,
        dtype: torch.dtype,
        reduced: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """With gradients, of more values than one block holds."""
        monkeypatch.setattr(snake_module.switches, "reduced_sine", reduced)
        snake = random_snake(3, torch.float32)
        x = of_shape(*shape[:-1], 1500, last=last, dtype=dtype).requires_grad_()
        logs = snake.log_alpha, snake.log_beta
        grad = of_shape(*x.shape, dtype=dtype)
        found = torch.ops.ear_vae.snake(x, *logs)
        assert (found.dtype, found.stride()) == (x.dtype, x.stride())
        wide = x.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        expected = formula_of(snake, wide)
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-5}[dtype]
        torch.testing.assert_close(found.to(wide.dtype), expected, rtol=tolerance, atol=tolerance)
        of_found = torch.autograd.grad(found, (x, *logs), grad)
        of_expected = torch.autograd.grad(expected, (wide, *logs), grad.to(wide.dtype))
        for one, other in zip(of_found, of_expected, strict=True):
            torch.testing.assert_close(one.to(other.dtype), other, rtol=tolerance, atol=10 * tolerance)

    @pytest.mark.parametrize("deviation", [1, 1000])
    def test_the_reduced_sine(self, deviation: float, monkeypatch: pytest.MonkeyPatch) -> None:
        """Against float64, of the same float32 angles: α and β are 1."""
        monkeypatch.setattr(snake_module.switches, "reduced_sine", True)
        x = deviation * torch.randn(1, 1, 50_000)
        zeros = torch.zeros(1)
        squares = x.double().sin().square()
        found = torch.ops.ear_vae.snake(x, zeros, zeros) - x.double()
        # The sum is rounded to float32 as well.
        rounding = (x.double() + squares).abs() * 2**-24
        assert ((found - squares).abs() - rounding).max() < 1.2e-7
        gradient, *_ = torch.ops.ear_vae.snake_backward(torch.ones_like(x), x, zeros, zeros)
        torch.testing.assert_close(gradient.double(), 1 + (2 * x.double()).sin(), rtol=0, atol=4e-7)

    def test_a_pass_of_training(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Forward and backward through a whole model, every Snake by the kernels, against the plain one."""
        torch.manual_seed(0)
        vae = EarVAE(EarVAEConfig(channels=2, channel_multipliers=(1,), strides=(4,)))
        audio = 0.3 * torch.randn(1, 2, 64)
        parameters = list(vae.parameters())

        def gradients() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(vae(audio).audio.square().sum(), parameters)

        expected = gradients()
        monkeypatch.setattr(
            "ear_vae.network.blocks.snake", lambda x, *given, compiled: torch.ops.ear_vae.snake(x, *given)
        )
        for one, other in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


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
    inputs = torch.randn(2, 3, 8), torch.randn(3), torch.randn(3)
    with pytest.warns(UserWarning, match="several passes, which is slower: Failed to find C compiler"):
        found = snake_module.by_kernel(*inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = snake_module.by_kernel(*inputs)
        gradients = snake_module.gradients_by_kernel(inputs[0], *inputs)
    snake_module.kernels.cache_clear()
    assert len(tried) == 1
    torch.testing.assert_close(found, plain_forward(*inputs))
    torch.testing.assert_close(again, found)
    for one, other in zip(gradients, plain_backward(inputs[0], *inputs), strict=True):
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
