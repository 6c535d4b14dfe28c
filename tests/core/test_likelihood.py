"""Log-likelihoods by the flow against exact densities of the data that its denoiser knows."""

import math

import pytest
import torch

from gmflow_core import (
    GaussianMixture,
    denoiser_of,
    flow_sigmas,
    log_likelihood,
    probabilistic_guidance,
)
from gmflow_core.toys.checkerboard import board_posterior_mean, draw_checkerboard, on_board
from tests.core.test_denoisers import MEAN, STD, velocity
from tests.core.test_solvers import exact_denoiser, mixture_data
from tests.helpers import F64, is_near, normal

EXACT = denoiser_of(velocity, 0.0)  # of data from N(MEAN, STD^2 I); only its mean counts


def gaussian_density(x):
    return torch.distributions.Normal(MEAN, STD).log_prob(x).sum(1)


def repeated_data(data, x):
    """Return the data's distribution as one mixture for each of the points x."""
    parts = (data.means, data.log_weights, data.log_std)
    return GaussianMixture(*(t.expand(len(x), *t.shape[1:]) for t in parts))


# Closed forms


def test_of_gaussian_data_it_is_their_density_to_fourth_order():
    x = MEAN + STD * normal(20, 2, dtype=F64)
    errors = [
        (log_likelihood(EXACT, x, flow_sigmas(steps).double()) - gaussian_density(x)).abs().max()
        for steps in (6, 12, 24)
    ]
    assert errors[2] < 3e-4
    assert 8 < errors[0] / errors[1] < 32
    assert 8 < errors[1] / errors[2] < 32


@pytest.mark.parametrize("channels", [1, 2])
def test_of_mixture_data_it_is_their_density_also_where_there_are_none(channels):
    data, x = mixture_data(channels), 2 * normal(40, channels, dtype=F64)
    expected = repeated_data(data, x).log_prob(x)
    assert expected.min() < -8
    found = log_likelihood(exact_denoiser(data), x, flow_sigmas(48).double())
    assert (found - expected).abs().max() < 0.01


def test_a_coarse_grid_of_float32_is_within_a_hundredth():
    x = (MEAN + STD * normal(20, 2, dtype=F64)).float()
    found = log_likelihood(EXACT, x, flow_sigmas(16))
    assert found.dtype == torch.float32
    assert (found - gaussian_density(x)).abs().max() < 0.01


def test_at_a_last_sigma_above_0_it_is_the_density_of_the_path_there():
    end, x = 0.25, normal(20, 2, dtype=F64)
    std = math.hypot(0.75 * STD, end)
    expected = torch.distributions.Normal(0.75 * MEAN, std).log_prob(x).sum(1)
    found = log_likelihood(EXACT, x, flow_sigmas(32, end=end).double())
    assert is_near(found, expected, 1e-5)


def test_the_exact_checkerboard_has_its_constant_density():
    x = draw_checkerboard(400, torch.Generator().manual_seed(0)).double()
    inside = [on_board(x + 0.1 * torch.tensor(to)) for to in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
    x = x[torch.stack(inside).all(0)][:200]
    exact = denoiser_of(lambda x, sigma: (x - board_posterior_mean(x, sigma)) / sigma[:, None], 0)
    found = log_likelihood(exact, x, flow_sigmas(16).double())
    assert (found + math.log(32)).abs().mean() < 0.05


# The divergence's estimate


def images(x, sigma):
    """Return E[eps - x_0 | x] of images from N(0, COVARIANCE), whose pixels are correlated."""
    sigma = sigma.to(x)[0]
    path = (1 - sigma) ** 2 * COVARIANCE + sigma**2 * torch.eye(12, dtype=x.dtype)
    gain = torch.linalg.solve(path, sigma * torch.eye(12) - (1 - sigma) * COVARIANCE)
    return (x.flatten(1) @ gain).unflatten(1, (3, 2, 2))


FACTOR = normal(12, 12, dtype=F64)
COVARIANCE = FACTOR @ FACTOR.T / 12 + 0.2 * torch.eye(12)


def test_random_directions_estimate_it_without_bias():
    x = (normal(1, 12, seed=2, dtype=F64) @ torch.linalg.cholesky(COVARIANCE).T).expand(300, -1)
    expected = torch.distributions.MultivariateNormal(torch.zeros(12).double(), COVARIANCE)
    expected, x = expected.log_prob(x), x.reshape(300, 3, 2, 2)
    sigmas, denoiser = flow_sigmas(8).double(), denoiser_of(images, 0.0)
    exact = log_likelihood(denoiser, x[:1], sigmas)
    assert is_near(exact, expected[:1], 1e-2)  # the error of 8 steps
    spread = []
    for probes in (1, 4):
        noise = torch.Generator().manual_seed(0)
        found = log_likelihood(denoiser, x, sigmas, probes=probes, generator=noise)
        assert (found.mean() - exact).abs() < 4.5 * found.std() / 300**0.5
        spread.append(found.std().item())
        noise = torch.Generator().manual_seed(0)
        again = log_likelihood(denoiser, x, sigmas, probes=probes, generator=noise)
        assert torch.equal(found, again)
    assert spread[1] == pytest.approx(spread[0] / 2, rel=0.3)


def test_a_sample_of_its_own_generator_does_not_depend_on_its_batch():
    x, sigmas = normal(3, 3, 2, 2, dtype=F64), flow_sigmas(4).double()

    def estimate(x, seeds):
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        return log_likelihood(denoiser_of(images, 0.0), x, sigmas, probes=2, generator=noise)

    assert is_near(estimate(x, [5, 6, 7])[1:2], estimate(x[1:2], [6]), 1e-12)


# What the caller hands in


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_takes_gradients_where_others_are_switched_off(mode):
    x, sigmas = normal(3, 2), flow_sigmas(2)
    expected = log_likelihood(EXACT, x, sigmas)
    with mode():
        assert torch.equal(log_likelihood(EXACT, x * 1, sigmas), expected)
    assert not log_likelihood(EXACT, x.requires_grad_(), sigmas).requires_grad


def test_guidance_that_does_nothing_changes_nothing():
    data, x, sigmas = mixture_data(2), normal(5, 2, dtype=F64), flow_sigmas(2).double()
    plain = exact_denoiser(data)

    def guided(x, sigma):
        return probabilistic_guidance(plain(x, sigma), torch.zeros_like(x), 0.0)

    found = log_likelihood(guided, x, sigmas)
    assert is_near(found, log_likelihood(plain, x, sigmas), 1e-9)


@pytest.mark.parametrize("sigmas", [[1.0], [0.9, 0.0], [0.0, 1.0], [1.0, -0.1], [1.0, 0.5, 0.5]])
def test_sigmas_that_do_not_descend_from_1_are_quoted(sigmas):
    with pytest.raises(ValueError, match=r"sigmas \[.*\] are not a sequence that descends from 1"):
        log_likelihood(EXACT, normal(3, 2), sigmas)


def test_other_bad_arguments_are_quoted():
    with pytest.raises(ValueError, match="probes is 0"):
        log_likelihood(EXACT, normal(3, 2), [1.0, 0.0], probes=0)
    with pytest.raises(ValueError, match="no gradient"):
        log_likelihood(torch.no_grad()(EXACT), normal(3, 2), [1.0, 0.0])
