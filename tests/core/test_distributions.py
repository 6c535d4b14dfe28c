"""Mixtures as torch.distributions has them, and back."""

import pytest
import torch
from torch.distributions import (
    Categorical,
    Independent,
    Laplace,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from gmflow_core import from_distribution, to_distribution
from tests.helpers import F64, SPACES, is_near, normal, random_mixture, same_mixture


@pytest.mark.parametrize("space", SPACES)
def test_there_and_back(space):
    mixture, x = random_mixture(space=space, dtype=F64), normal(2, 3, *space, dtype=F64)
    peer = to_distribution(mixture)
    assert peer.batch_shape == (2, *space)
    assert peer.event_shape == (3,)
    assert is_near(peer.log_prob(x.movedim(1, -1)), mixture.log_prob(x), 1e-12)
    assert is_near(peer.mean.movedim(-1, 1), mixture.mean(), 1e-12)
    assert same_mixture(from_distribution(peer), mixture, 1e-12)


def test_a_tilted_mixture_is_converted_by_its_components():
    tilted = random_mixture().as_tilted().tilted(normal(2, 3, 2, 3), torch.ones(2, 1, 1, 1))
    x = normal(2, 3, 2, 3, seed=4)
    assert is_near(
        to_distribution(tilted).log_prob(x.movedim(1, -1)), tilted.components().log_prob(x), 1e-5
    )


def shares(components=4):
    return Categorical(logits=normal(components))


@pytest.mark.parametrize(
    ("components", "channels"),
    [
        (Normal(normal(4), torch.tensor(0.5).expand(4)), 1),
        (Independent(Normal(normal(4, 2), torch.full((4, 2), 0.5)), 1), 2),
        (MultivariateNormal(normal(4, 2), 0.25 * torch.eye(2)), 2),
    ],
)
def test_families_without_a_batch_become_a_batch_of_one(components, channels):
    peer = MixtureSameFamily(shares(), components)
    mixture = from_distribution(peer)
    assert mixture.means.shape == (1, 4, channels)
    x = normal(5, channels, seed=3)
    expected = peer.log_prob(x if peer.event_shape else x.squeeze(1))
    each = torch.cat([mixture.log_prob(row[None]) for row in x])
    assert is_near(each, expected, 1e-5)


@pytest.mark.parametrize(
    ("distribution", "quoted"),
    [
        (Normal(0.0, 1.0), "Normal is no MixtureSameFamily"),
        (
            MixtureSameFamily(shares(2), Normal(normal(2), torch.tensor([0.5, 0.75]))),
            r"standard deviations from 0\.5 to 0\.75",
        ),
        (
            MixtureSameFamily(
                shares(), Independent(Normal(normal(4, 2), torch.tensor([1.0, 2.0])), 1)
            ),
            "standard deviations from 1 to 2",
        ),
        (
            MixtureSameFamily(
                shares(),
                MultivariateNormal(normal(4, 2), torch.tensor([[1.0, 0.25], [0.25, 1.0]])),
            ),
            r"covariances of up to 0\.25",
        ),
        (
            MixtureSameFamily(shares(), Laplace(normal(4), torch.ones(4))),
            "components of Laplace are not converted",
        ),
        (
            MixtureSameFamily(shares(), Independent(Normal(normal(4, 2, 3), 1.0), 2)),
            r"components of Independent\(Normal, 2\) are not converted",
        ),
    ],
)
def test_what_does_not_fit_is_named(distribution, quoted):
    with pytest.raises(ValueError, match=quoted):
        from_distribution(distribution)


def test_gradients_pass():
    means = normal(4, 2).requires_grad_()
    peer = MixtureSameFamily(shares(), Independent(Normal(means, 1.0), 1))
    from_distribution(peer).log_prob(torch.zeros(1, 2)).sum().backward()
    assert means.grad.abs().min() > 0
