"""Blocks against their formulas."""

from __future__ import annotations

import pytest
import torch

from ear_vae.config import EarVAEConfig
from ear_vae.network.blocks import ResidualUnit, Snake
from ear_vae.network.transformer import LatentTransformer, rotary_table, rotate


def random_snake(channels: int, dtype: torch.dtype = torch.float64) -> Snake:
    snake = Snake(channels).to(dtype)
    torch.nn.init.normal_(snake.log_alpha)
    torch.nn.init.normal_(snake.log_beta)
    return snake


def snake_formula(x: torch.Tensor, snake: Snake) -> torch.Tensor:
    alpha, beta = snake.log_alpha.exp()[:, None], snake.log_beta.exp()[:, None]
    return x + torch.sin(alpha * x) ** 2 / (beta + 1e-9)


@pytest.mark.parametrize("shape", [(3, 50), (2, 3, 50)])
def test_snake_is_its_formula_with_and_without_gradient(shape: tuple[int, ...]) -> None:
    snake, x = random_snake(3), torch.randn(*shape, dtype=torch.float64)
    expected = snake_formula(x, snake)
    torch.testing.assert_close(snake(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(snake(x), expected)


def test_snake_gradients_are_those_of_the_formula() -> None:
    snake, x = random_snake(3), torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, 7, dtype=torch.float64)
    inputs = (x, snake.log_alpha, snake.log_beta)
    found = torch.autograd.grad((weights * snake(x)).sum(), inputs)
    expected = torch.autograd.grad((weights * snake_formula(x, snake)).sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_snake_passes_gradcheck() -> None:
    snake = random_snake(2)
    assert torch.autograd.gradcheck(snake, torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True))


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
