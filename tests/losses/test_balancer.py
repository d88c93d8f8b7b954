"""The loss balancer, by hand arithmetic."""

from __future__ import annotations

import pytest
import torch

from ear_vae import EarVAEError
from ear_vae.losses.balancer import LossBalancer

WEIGHTS = {"small": 1.0, "large": 3.0}


def output() -> torch.Tensor:
    return torch.zeros(2, 1, 1, requires_grad=True)


def test_opposite_gradients_of_any_size_cancel_with_equal_weights() -> None:
    """Per item -1 against +100; unbalanced they would add up to 99."""
    x = output()
    terms = {"small": -x.sum(), "large": 100 * x.sum()}
    balanced = LossBalancer(["small", "large"])(terms, {"small": 1.0, "large": 1.0}, x)
    torch.testing.assert_close(balanced, torch.zeros(2, 1, 1))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_weights_are_shares_whatever_the_scale(scale: float) -> None:
    x = output()
    balancer = LossBalancer(["small", "large"], total_norm=2.0)
    balanced = balancer({"small": scale * x.sum(), "large": -x.sum()}, WEIGHTS, x)
    torch.testing.assert_close(balanced, torch.full((2, 1, 1), 2.0 * (0.25 - 0.75) / 2))


def test_norms_are_running_means_over_items_and_steps() -> None:
    """Norms 1 and 5 at decay 0.9: the unbiased mean is (0.09 + 0.5) / 0.19; the second step is 5 over it."""
    balancer = LossBalancer(["only"], decay=0.9)
    for scale in (1.0, 5.0):
        x = output()
        # Items of norm 0.5 and 1.5 times the scale.
        balanced = balancer(
            {"only": (x.flatten() * torch.tensor([0.5, 1.5]) * scale).sum()}, {"only": 7.0}, x
        )
    mean = (0.09 * 1 + 0.1 * 5) / (1 - 0.9**2)
    torch.testing.assert_close(balanced.flatten(), torch.tensor([0.5, 1.5]) * 5 / mean / 2)


def test_a_gradient_that_is_not_finite_shows_and_is_forgotten() -> None:
    balancer, x = LossBalancer(["only"]), output()
    assert balancer({"only": x.sum() * torch.inf}, {"only": 1.0}, x).isnan().all()
    assert int(balancer.updates) == 0
    torch.testing.assert_close(balancer({"only": x.sum()}, {"only": 1.0}, x), torch.full((2, 1, 1), 0.5))


def test_a_term_that_comes_later_starts_its_own_mean() -> None:
    """Alone, the first has the whole step; then each has half, by norms that only its own steps count in."""
    x = output()
    balancer, weights = LossBalancer(["first", "second"], decay=0.9), {"first": 1.0, "second": 1.0}
    alone = balancer({"first": 2 * x.sum()}, weights, x)
    torch.testing.assert_close(alone, torch.full((2, 1, 1), 0.5))
    both = balancer({"first": 8 * x.sum(), "second": -5 * x.sum()}, weights, x)
    # The terms are sums over two items: norms 4, then 16, of the first, and 10 of the second's first step.
    mean = 2 * (0.09 * 2 + 0.1 * 8) / 0.19
    torch.testing.assert_close(both, torch.full((2, 1, 1), 0.5 * 8 / mean - 0.5 * 5 / 10))


def test_other_terms_are_refused() -> None:
    x = output()
    with pytest.raises(EarVAEError, match=r"made for \['a'\], got \['b'\]"):
        LossBalancer(["a"])({"b": x.sum()}, {"b": 1.0}, x)
    with pytest.raises(EarVAEError, match=r"made for \['a'\], got \[\]"):
        LossBalancer(["a"])({}, {}, x)
    with pytest.raises(EarVAEError, match="needs terms"):
        LossBalancer([])
