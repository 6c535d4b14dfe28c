"""Denoisers of ordinary flow models, against the exact flow of Gaussian data."""

import pytest
import torch

from gmflow_core import (
    denoiser_of,
    flow_sigmas,
    reversed_time,
    sample_euler,
    sample_gm_ode,
    velocity_to_x0,
)
from gmflow_core.sampling.solvers import solve
from tests.helpers import COPYING, F64, WAITING, Waits, is_near, normal, random_mixture

MEAN, STD = torch.tensor([1.0, -2.0], dtype=F64), 0.5  # of the data


def velocity(x, sigma):
    """Return E[eps - x_0 | x] for data from N(MEAN, STD^2 I)."""
    sigma = sigma.to(x).unsqueeze(1)
    surprise = x - (1 - sigma) * MEAN.to(x)
    slope = (sigma - (1 - sigma) * STD**2) / ((1 - sigma) ** 2 * STD**2 + sigma**2)
    return slope * surprise - MEAN.to(x)


def spread(sigma):
    """Return the standard deviation of eps - x_0 given x."""
    return STD / ((1 - sigma) ** 2 * STD**2 + sigma**2).sqrt()


@pytest.mark.parametrize("steps", [1, 3])
def test_with_the_true_spread_few_calls_follow_the_exact_flow(steps):
    """The flow keeps quantiles: z goes to MEAN + STD z. Euler's error is that of its few steps."""
    z = normal(50, 2, dtype=F64)
    denoiser, sigmas = denoiser_of(velocity, spread), flow_sigmas(steps)
    exact = MEAN + STD * z
    found = sample_gm_ode(denoiser, z, sigmas, substeps=600 // steps)
    assert is_near(found, exact, 2e-3)
    assert (sample_euler(denoiser, z, sigmas) - exact).abs().max() > 0.05


def test_without_spread_it_is_the_euler_method():
    z, denoiser = normal(50, 2), denoiser_of(velocity, 0.0)
    euler = sample_euler(denoiser, z, flow_sigmas(4))
    assert is_near(sample_gm_ode(denoiser, z, flow_sigmas(4), order=1, substeps=8), euler, 1e-5)


def test_a_network_whose_time_runs_from_noise_to_data_is_the_same_flow():
    def network(x, t, scale):
        """Return dx/dt at t = 1 - sigma, in the convention of facebookresearch/flow_matching."""
        assert t.shape == (50,)
        return -scale * velocity(x, 1 - t)

    x, sigma = normal(50, 2, dtype=F64), torch.linspace(0, 1, 50, dtype=F64)
    assert is_near(reversed_time(network)(x, sigma, scale=1), velocity(x, sigma), 1e-12)
    assert is_near(reversed_time(network)(x, sigma, 2), 2 * velocity(x, sigma), 1e-12)


def test_a_network_that_predicts_mixtures_needs_no_spread():
    mixture, x, sigma = random_mixture(), normal(2, 3, 2, 3), torch.tensor([0.3, 0.8])
    found = denoiser_of(lambda x, sigma: mixture)(x, sigma)
    assert torch.equal(found.means, velocity_to_x0(mixture, x, sigma).means)


def test_a_missing_and_a_needless_spread_are_named():
    x, sigma, mixture = normal(2, 3), torch.ones(2), random_mixture(space=())
    with pytest.raises(ValueError, match=r"predicts a velocity \(Tensor\).* None; give the spread"):
        denoiser_of(lambda x, sigma: x)(x, sigma)
    with pytest.raises(ValueError, match=r"a mixture \(GaussianMixture\).* 0.3; omit the spread"):
        denoiser_of(lambda x, sigma: mixture, 0.3)(x, sigma)


@pytest.mark.parametrize("solver", ["gm-ode", "gm-sde", "gm-policy"])
def test_a_step_waits_for_no_gpu(solver):
    mean, x = normal(5, 2), normal(5, 2, seed=2)
    with Waits(WAITING + COPYING) as waits:
        denoiser = denoiser_of(lambda x, sigma: mean, lambda sigma: 1 - 0.5 * sigma)
        solve(solver, denoiser, x, [1.0, 0.7, 0.4, 0.0], noise=torch.Generator())
    assert waits.found == []
