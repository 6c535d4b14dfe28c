"""Products of mixtures against densities on a grid, and mixtures with fewer components."""

import math

import pytest
import torch

from gmflow_core import GaussianMixture, log_overlap, mixture_product, reduce_components
from tests.helpers import F64, SPACES, is_near, normal, random_mixture, repeated, same_mixture

# Products


def test_the_product_is_the_normalised_product_of_the_densities():
    a, b = (
        random_mixture(seed, components=k, channels=2, space=(3,), dtype=F64)
        for seed, k in ((0, 3), (1, 2))
    )
    product, x = mixture_product(a, b), normal(2, 2, 3, seed=3, dtype=F64)
    assert product.num_components == 6
    density = a.log_prob(x) + b.log_prob(x) - log_overlap(a, b)
    assert is_near(product.log_prob(x), density, 1e-12)


def test_the_overlap_is_the_integral_of_the_product():
    a, b = (random_mixture(seed, channels=1, space=(), dtype=F64) for seed in (0, 1))
    line = torch.linspace(-12, 12, 2001, dtype=F64)
    log_a, log_b = (repeated(m, 2001).log_prob(line.expand(2, 1, -1)) for m in (a, b))
    integral = (log_a + log_b).exp().sum(1) * (line[1] - line[0])
    assert is_near(log_overlap(a, b), integral.log(), 1e-9)


@pytest.mark.parametrize("space", SPACES)
def test_with_one_component_the_product_is_times(space):
    a, b = (
        random_mixture(seed, components=k, space=space, dtype=F64) for seed, k in ((0, 4), (1, 1))
    )
    assert same_mixture(mixture_product(a, b), a.times(b.moment_match()), 1e-12)
    assert is_near(
        mixture_product(b, a).means, mixture_product(a, b).means, 1e-12
    )  # which of the two comes first only orders the pairs


def test_a_point_mass_stays_where_it_is():
    mixture, point = random_mixture(), normal(2, 3, 2, 3)
    product = mixture_product(mixture, GaussianMixture.point_mass(point))
    assert is_near(product.mean(), point, 1e-6)
    assert (product.log_std == -30).all()


def test_other_shapes_are_quoted():
    with pytest.raises(ValueError, match=r"\(2, 3, 2, 3\) and \(2, 3, 4, 3\) differ"):
        mixture_product(random_mixture(), random_mixture(space=(4, 3)))


# Reductions


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("count", [1, 2, 5, 6, 9])
def test_a_reduction_keeps_mean_and_variance(space, count):
    mixture = random_mixture(components=6, space=space, dtype=F64)
    reduced = reduce_components(mixture, count)
    assert reduced.num_components == min(count, 6)
    assert is_near(reduced.weights.sum(1), torch.ones_like(mixture.weights[:, 0]), 1e-12)
    expected, found = mixture.moment_match(), reduced.moment_match()
    assert is_near(found.mean, expected.mean, 1e-12)
    assert is_near(*torch.broadcast_tensors(found.var, expected.var), 1e-12)


def test_components_that_lie_together_are_merged_first():
    """In the first pixel 0 and 2 lie together, in the second 1 and 2."""
    means = torch.tensor([[[0.0, 0.0], [5.0, 5.0], [0.1, 5.2]]], dtype=F64).reshape(1, 3, 1, 2)
    log_weights = torch.tensor([0.2, 0.5, 0.3], dtype=F64).log().reshape(1, 3, 1, 1)
    mixture = GaussianMixture(means, log_weights.expand(1, 3, 1, 2), torch.zeros(1, 1, 1, 1))
    reduced = reduce_components(mixture, 2)
    places, shares = (t[0, :, 0].T.tolist() for t in (reduced.means, reduced.weights))
    pixels = [sorted(zip(*each, strict=True)) for each in zip(places, shares, strict=True)]
    assert pixels[0] == [pytest.approx((0.06, 0.5)), pytest.approx((5.0, 0.5))]
    assert pixels[1] == [pytest.approx((0.0, 0.2)), pytest.approx((5.075, 0.8))]
    lost = torch.tensor([0.2 * 0.3 / 0.5 * 0.1**2, 0.5 * 0.3 / 0.8 * 0.2**2], dtype=F64)
    assert is_near(reduced.var.flatten(), 1 + lost, 1e-12)


def test_components_without_weight_vanish():
    nothing = torch.tensor([0.0, -math.inf, -math.inf]).reshape(1, 3, 1)
    mixture = GaussianMixture(normal(1, 3, 2), nothing, torch.zeros(1, 1, 1))
    reduced = reduce_components(mixture, 1)
    assert torch.equal(reduced.mean(), mixture.means[:, 0])
    assert is_near(reduced.var, torch.ones(1, 1, 1), 1e-6)


def test_a_product_comes_back_to_few_components_with_little_loss():
    a, b = (random_mixture(seed, spread=3.0, channels=2, space=(4,), dtype=F64) for seed in (0, 1))
    product = mixture_product(a, b)
    reduced = reduce_components(product, 8)
    x = product.sample(torch.Generator().manual_seed(0))
    assert (product.log_prob(x) - reduced.log_prob(x)).abs().mean() < 0.05


def test_a_count_of_0_is_quoted():
    with pytest.raises(ValueError, match="count is 0"):
        reduce_components(random_mixture(), 0)
