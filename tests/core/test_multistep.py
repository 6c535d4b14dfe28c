"""Multistep solvers of the mean: closed forms. ComfyUI's own are in tests/comfyui/test_nodes.py."""

import itertools
import math

import pytest
import torch

from gmflow_core import GaussianMixture, flow_sigmas
from gmflow_core.sampling.solvers import solve
from tests.helpers import F64, is_near, normal


def point(mean):
    """Return the mixture that a network of that mean stands for."""
    return GaussianMixture.point_mass(mean)


def test_dpmpp_2m_takes_the_mean_at_the_middle_of_a_step_in_log_sigma():
    """A mean that is linear in log(sigma) is extrapolated exactly, at unequal steps, from 1 on."""
    sigmas, x = [1.0, 0.8, 0.3, 0.2], normal(5, 2, dtype=F64)

    def mean_at(log_sigma):
        return torch.full_like(x, 0.5 + 2 * log_sigma)

    expected = x
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        middle = 0.5 * (math.log(sigma) + math.log(sigma_next))
        target = mean_at(middle if step else math.log(sigma))  # the first step is of first order
        noise = (expected - (1 - sigma) * target) / sigma
        expected = (1 - sigma_next) * target + sigma_next * noise
    found = solve("dpmpp-2m", lambda x, sigma: point(mean_at(sigma[0].log().item())), x, sigmas)
    assert is_near(found, expected, 1e-6)


def uni_pc_by_quadrature(mean_at, x, sigmas):
    """Follow UniPC's definition: interpolate the means in lambda, integrate on a fine grid."""
    lambdas, means = [-math.log(sigma) for sigma in sigmas], []
    for step in range(len(sigmas) - 1):
        means.append(mean_at(lambdas[step]))
        order = min(3, len(sigmas) - 2, step + 1, len(sigmas) - 1 - step)
        # the corrector: the order's own calls, and the one at the end of the step
        nodes = list(range(step - order + 1, step + 2))
        if step == len(sigmas) - 2:  # no call follows the last step
            nodes.pop()
        size = lambdas[step + 1] - lambdas[step]
        u = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
        value = torch.zeros_like(u)
        for node in nodes:
            places = [(lambdas[each] - lambdas[step]) / size for each in nodes]
            here = (lambdas[node] - lambdas[step]) / size
            basis = math.prod((u - each) / (here - each) for each in places if each != here)
            value = value + mean_at(lambdas[node]) * basis
        if len(nodes) == 2:  # the simplified form: half the difference
            first, last = mean_at(lambdas[nodes[0]]), mean_at(lambdas[nodes[1]])
            slope = (last - first) / (lambdas[nodes[1]] - lambdas[nodes[0]])
            exact = mean_at(lambdas[step]) * -math.expm1(-size)
            x = math.exp(-size) * x + exact + slope * size * size / 2
        else:
            weight = size * torch.exp(size * (u - 1)) / len(u)
            x = math.exp(-size) * x + (weight * value).sum()
    return x


def test_uni_pc_integrates_the_polynomial_through_its_means():
    """The means depend on sigma only, so that a corrected step is what its definition says."""
    sigmas, x = [1.0, 0.75, 0.5, 0.3, 0.1, 0.06], normal(4, 2, dtype=F64)

    def mean_at(place):
        return math.sin(2 * place) + 0.3 * place

    def denoiser(x, sigma):
        return point(torch.full_like(x, mean_at(-sigma[0].double().log().item())))

    expected = uni_pc_by_quadrature(mean_at, x, sigmas)
    assert is_near(solve("uni-pc", denoiser, x, sigmas), expected, 1e-6)


@pytest.mark.parametrize(("solver", "gain"), [("euler", 1.9), ("dpmpp-2m", 3.9), ("uni-pc", 3.0)])
def test_errors_fall_with_the_order(solver, gain):
    """Data are one Gaussian, whose flow is known; the number of steps is doubled.

    UniPC's last step, of first order as in ComfyUI, leaves it an error of second order.
    """
    variance, sigma_end = 0.3, 0.05

    def denoiser(x, sigma):
        sigma = sigma[0].double()
        spread = (1 - sigma) ** 2 * variance + sigma**2
        return point((1 - sigma) * variance / spread * x)

    x, errors = normal(20, 2, dtype=F64), []
    exact = x * math.sqrt((1 - sigma_end) ** 2 * variance + sigma_end**2)
    for steps in (32, 64):
        sigmas = (sigma_end + (1 - sigma_end) * flow_sigmas(steps)).double()
        errors.append((solve(solver, denoiser, x, sigmas) - exact).norm())
    assert errors[0] / errors[1] > gain


@pytest.mark.parametrize("solver", ["dpmpp-2m", "uni-pc"])
def test_a_single_step_and_one_that_ends_at_0_take_the_mean(solver):
    x = normal(3, 2)
    assert is_near(solve(solver, lambda x, sigma: point(x + 1), x, [1.0, 0.0]), x + 1)
    calls = []

    def denoiser(x, sigma):
        calls.append(sigma[0].item())
        return point(torch.full_like(x, sigma[0].item()))

    found = solve(solver, denoiser, x, [1.0, 0.5, 0.25, 0.0])
    assert is_near(found, torch.full_like(x, 0.25))
    assert calls == [1.0, 0.5, 0.25]  # one network call a step
