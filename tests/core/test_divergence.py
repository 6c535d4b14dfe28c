"""Entropies and divergences against quadrature and closed forms of Gaussians."""

import math

import pytest
import torch

from gmflow_core import (
    GaussianMixture,
    entropy,
    entropy_bounds,
    kl_bounds,
    kl_divergence,
)
from gmflow_core.gaussians.density import LOG_2PI
from tests.helpers import F64, SPACES, is_near, normal, random_mixture, repeated

SPREADS = [0.05, 0.5, 1.5, 6.0]  # of the means, beside standard deviations of 0.3 to 0.8


def mixtures(spread, channels):
    """Return mixtures p and q of two samples, by seed."""
    settings = {"channels": channels, "space": (), "spread": spread, "dtype": F64}
    return [random_mixture(seed, components=k, **settings) for seed, k in ((0, 3), (1, 4))]


def quadrature(p, q):
    """Return E_p[-log p] and D(p || q) of 1-D or 2-D points, (B,) each."""
    side = torch.linspace(-24, 24, 6001 if p.means.shape[2] == 1 else 801, dtype=F64)
    grid = torch.cartesian_prod(*[side] * p.means.shape[2])
    x = grid.reshape(len(grid), -1).T.expand(2, -1, -1)
    log_p, log_q = (repeated(m, len(grid)).log_prob(x) for m in (p, q))
    share = log_p.exp() * (side[1] - side[0]) ** p.means.shape[2]
    return -(share * log_p).sum(1), (share * (log_p - log_q)).sum(1)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("spread", SPREADS)
def test_bounds_hold_the_values(spread, channels):
    p, q = mixtures(spread, channels)
    exact_entropy, exact_divergence = quadrature(p, q)
    for bounds, exact in (
        (entropy_bounds(p), exact_entropy),
        (kl_bounds(p, q), exact_divergence),
    ):
        assert (bounds.lower <= exact + 1e-9).all()
        assert (exact <= bounds.upper + 1e-9).all()
    gap = entropy_bounds(p).upper - entropy_bounds(p).lower
    assert (gap < 0.35).all()


@pytest.mark.parametrize("space", SPACES)
def test_of_single_gaussians_they_are_closed_forms(space):
    p, q = (random_mixture(seed, components=1, space=space, dtype=F64) for seed in (0, 1))
    h = (3 * (p.log_std + 0.5 * (1 + LOG_2PI))).squeeze((1, 2)).expand(2, *space)
    distance = (p.means - q.means).square().sum((1, 2))
    var_p, var_q = (m.var.squeeze((1, 2)) for m in (p, q))
    ratio = var_p / var_q
    divergence = 0.5 * (distance / var_q + 3 * (ratio - 1 - ratio.log()))
    assert is_near(entropy_bounds(p).lower, h, 1e-12)
    assert is_near(entropy_bounds(p).upper, h, 1e-12)
    assert is_near(kl_bounds(p, q).lower, divergence, 1e-12)
    assert is_near(kl_bounds(p, q).upper, divergence, 1e-12)


@pytest.mark.parametrize("spread", SPREADS)
def test_a_mixture_is_no_distance_from_itself(spread):
    p, _ = mixtures(spread, 2)
    bounds, estimate = kl_bounds(p, p), kl_divergence(p, p, 10)
    assert (bounds.lower == 0).all()
    assert (bounds.upper < 0.02).all()
    assert (estimate.value == 0).all()
    assert (estimate.standard_error == 0).all()


def test_bounds_meet_where_components_lie_far_apart():
    """Then the entropy is that of the weights plus a component's."""
    p = random_mixture(spread=1000.0, dtype=F64)
    own = 3 * (p.log_std.squeeze((1, 2)) + 0.5 * (1 + LOG_2PI))
    exact = p.weight_entropy().squeeze(1) + own
    assert is_near(entropy_bounds(p).lower, exact, 1e-9)
    assert is_near(entropy_bounds(p).upper, exact, 1e-9)


@pytest.mark.parametrize("which", ["p", "q"])
def test_components_without_weight_do_not_count(which):
    p, q = (random_mixture(seed, dtype=F64) for seed in (0, 1))

    def with_ghost(m):
        means = torch.cat([m.means, normal(2, 1, 3, 2, 3, seed=5, dtype=F64)], 1)
        nothing = torch.full_like(m.log_weights[:, :1], -math.inf)
        return GaussianMixture(means, torch.cat([m.log_weights, nothing], 1), m.log_std)

    pair = (with_ghost(p), q) if which == "p" else (p, with_ghost(q))
    for found, expected in zip(kl_bounds(*pair), kl_bounds(p, q), strict=True):
        assert is_near(found, expected, 1e-9)


# Estimates


@pytest.mark.parametrize("spread", SPREADS)
def test_estimates_agree_with_quadrature_within_their_standard_error(spread):
    p, q = mixtures(spread, 2)
    generator = torch.Generator().manual_seed(0)
    estimates = entropy(p, 20_000, generator), kl_divergence(p, q, 20_000, generator)
    for estimate, exact in zip(estimates, quadrature(p, q), strict=True):
        assert ((estimate.value - exact).abs() < 4.5 * estimate.standard_error).all()
        assert (estimate.standard_error < 0.05 * (1 + exact)).all()


def test_the_standard_error_is_that_of_repeated_estimates(monkeypatch):
    p, _ = mixtures(1.5, 2)
    monkeypatch.setattr("gmflow_core.gaussians.divergence.ELEMENTS", 500)  # several parts
    estimates = [entropy(p, 100, torch.Generator().manual_seed(seed)) for seed in range(200)]
    values = torch.stack([each.value for each in estimates])
    errors = torch.stack([each.standard_error for each in estimates])
    assert torch.allclose(values.std(0), errors.mean(0), rtol=0.2)
    again = entropy(p, 100, torch.Generator().manual_seed(0))
    assert torch.equal(again.value, estimates[0].value)


@pytest.mark.parametrize("space", SPACES)
def test_every_pixel_has_its_own(space):
    p, q = (random_mixture(seed, space=space) for seed in (0, 1))
    for pair in (entropy_bounds(p), kl_bounds(p, q), entropy(p, 5), kl_divergence(p, q, 5)):
        assert [each.shape for each in pair] == [(2, *space)] * 2


def test_bad_arguments_are_quoted():
    p = random_mixture()
    with pytest.raises(ValueError, match="draws is 1"):
        entropy(p, 1)
    for function in (kl_bounds, kl_divergence):
        with pytest.raises(ValueError, match=r"\(2, 3, 2, 3\) and \(2, 3, 4\) differ"):
            function(p, random_mixture(space=(4,)))
