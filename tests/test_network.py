"""Blocks against their formulas."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest
import torch

from ear_vae.config import EarVAEConfig
from ear_vae.network.blocks import Conv1d, ConvTranspose1d, ResidualUnit, Snake
from ear_vae.network.snake import compile_snake
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
    alpha, inverse_beta = snake.log_alpha.exp().detach(), (-snake.log_beta).exp().detach()
    inputs = (x, alpha.requires_grad_(), inverse_beta.requires_grad_())
    assert torch.autograd.gradcheck(torch.ops.ear_vae.snake, inputs)
    torch.testing.assert_close(torch.ops.ear_vae.snake(*inputs), snake(x))


def test_snake_operator_is_one_that_compilers_take() -> None:
    inputs = [torch.randn(2, 3, 1, 8, requires_grad=True), torch.rand(3) + 1, torch.rand(3)]
    torch.library.opcheck(torch.ops.ear_vae.snake.default, inputs)


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton and TRITON_INTERPRET=1",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@SHAPES
def test_snake_kernels_in_the_interpreter(shape: tuple[int, ...], last: bool, dtype: torch.dtype) -> None:
    """Both kernels on the CPU against the formula; more values than one block holds."""
    from ear_vae.network import snake_triton

    snake, x = random_snake(3, torch.float32), of_shape(*shape[:-1], 1500, last=last, dtype=dtype)
    alpha, inverse_beta = snake.log_alpha.exp().detach(), (-snake.log_beta).exp().detach()
    grad = of_shape(*x.shape, dtype=dtype)
    tolerances = {"atol": 1e-5, "rtol": 1e-4} if dtype is torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
    found = snake_triton.forward(x, alpha, inverse_beta)
    assert (found.dtype, found.stride()) == (x.dtype, x.stride())
    torch.testing.assert_close(found, torch.ops.ear_vae.snake(x, alpha, inverse_beta), **tolerances)
    expected = torch.ops.ear_vae.snake_backward(grad, x, alpha, inverse_beta)
    for one, other in zip(snake_triton.backward(grad, x, alpha, inverse_beta), expected, strict=True):
        torch.testing.assert_close(one, other, **(tolerances | {"atol": 10 * tolerances["atol"]}))


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
