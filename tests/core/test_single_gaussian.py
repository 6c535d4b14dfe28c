"""Ordinary flow models as mixtures of one Gaussian."""

import pytest
import torch

from gmflow_core import posterior_mean, single_gaussian, velocity_to_x0
from tests.helpers import F64, SPACES, is_near, normal

SIGMA = torch.tensor([0.9, 0.25], dtype=F64)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("spread", [0.7, torch.tensor([0.3, 1.5]), lambda sigma: 1 - sigma])
def test_mean_is_kept_and_the_std_is_spread_times_sigma(space, spread):
    mean = normal(2, 3, *space, dtype=F64)
    mixture = single_gaussian(mean, SIGMA, spread)
    each = spread(SIGMA) if callable(spread) else torch.as_tensor(spread, dtype=F64)
    expected = (each * SIGMA).reshape(2, 1, 1, *[1] * len(space))
    assert mixture.num_components == 1
    assert torch.equal(mixture.mean(), mean)
    assert is_near(mixture.log_std.exp(), expected, 1e-12)


def test_a_spread_may_differ_from_pixel_to_pixel():
    mean, spread = normal(2, 3, 4, 5, dtype=F64), normal(2, 1, 4, 5, seed=2, dtype=F64).exp()
    mixture = single_gaussian(mean, 0.5, spread)
    assert is_near(mixture.log_std.exp(), 0.5 * spread.unsqueeze(1), 1e-12)


def test_with_the_true_spread_the_posterior_mean_is_that_of_gaussian_data():
    """Data N(m, s^2): velocities given x at sigma have the std s / sqrt((a s)^2 + sigma^2)."""
    m, s = normal(2, 3, dtype=F64), 0.6

    def mean_of(x, sigma):
        a = 1 - sigma
        return m + a * s**2 / ((a * s) ** 2 + sigma**2) * (x - a * m)

    def spread(sigma):
        return s / (((1 - sigma) * s) ** 2 + sigma**2) ** 0.5

    x_high, x = normal(2, 3, seed=2, dtype=F64), normal(2, 3, seed=3, dtype=F64)
    mixture = single_gaussian(mean_of(x_high, 0.8), 0.8, spread)
    assert is_near(posterior_mean(mixture, x_high, 0.8, x, 0.3), mean_of(x, 0.3), 1e-12)


def test_a_spread_of_0_is_a_point_mass_at_every_sigma():
    """The posterior mean stays at x - sigma u: several substeps are one Euler step."""
    x, velocity = normal(2, 3), normal(2, 3, seed=2)
    for sigma in (1.0, 0.4, 0.0):
        mean = velocity_to_x0(velocity, x, sigma)
        mixture = single_gaussian(mean, sigma, 0.0)
        assert mixture.log_std.isfinite().all()
        assert torch.equal(mixture.mean(), mean)
        moved = posterior_mean(mixture, x, sigma, x + 0.1, 0.5 * sigma)
        assert is_near(moved, mean, 1e-6)


def test_half_precision_becomes_float32():
    mixture = single_gaussian(normal(2, 3).half(), torch.tensor([0.5, 0.2]).half(), 1.0)
    assert mixture.means.dtype == mixture.log_std.dtype == torch.float32


@pytest.mark.parametrize(
    ("spread", "quoted"),
    [
        (-0.1, "spread is -0.1"),
        (float("nan"), "spread is nan"),
        (float("inf"), "spread is inf"),
        (torch.ones(3), r"\(3,\).*\(2, 3\)"),
        (torch.ones(2, 3), r"\(2, 3\) does not fit"),
    ],
)
def test_bad_spreads_are_quoted(spread, quoted):
    with pytest.raises(ValueError, match=quoted):
        single_gaussian(normal(2, 3), 0.5, spread)
