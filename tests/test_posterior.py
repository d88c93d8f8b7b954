"""The Gaussian against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from ear_vae import Posterior


def test_kl_by_hand() -> None:
    """Mean 1 and std 2 in each of 3 channels: 3 (1 + 4 − ln 4 − 1), the same for any number of frames."""
    posterior = Posterior(torch.ones(2, 3, 5), torch.full((2, 3, 5), 2.0))
    assert posterior.kl().shape == (2,)
    torch.testing.assert_close(posterior.kl(), torch.full((2,), 3 * (4 - math.log(4))), rtol=1e-5, atol=0)


def test_kl_is_twice_the_divergence_of_torch() -> None:
    mean, std = torch.randn(4, 6, 9), torch.rand(4, 6, 9) + 0.1
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std), torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    )
    torch.testing.assert_close(
        Posterior(mean, std).kl(), 2 * divergence.sum(1).mean(-1), rtol=1e-3, atol=1e-4
    )


def test_parameters_are_split_into_mean_and_softplus() -> None:
    parameters = torch.tensor([[1.0], [2.0], [0.0], [3.0]])
    posterior = Posterior.from_parameters(parameters)
    assert posterior.mean.flatten().tolist() == [1.0, 2.0]
    assert posterior.std.flatten().tolist() == pytest.approx([math.log(2), math.log1p(math.exp(3))])


def test_samples_follow_the_distribution_and_the_generator() -> None:
    posterior = Posterior(torch.full((1, 200_000), 3.0), torch.full((1, 200_000), 0.5))
    draw = posterior.sample(torch.Generator().manual_seed(1))
    assert float(draw.mean()) == pytest.approx(3.0, abs=0.01)
    assert float(draw.std()) == pytest.approx(0.5, abs=0.01)
    assert torch.equal(draw, posterior.sample(torch.Generator().manual_seed(1)))
    assert not torch.equal(draw, posterior.sample(torch.Generator().manual_seed(2)))
    assert torch.equal(posterior.mode(), posterior.mean)
