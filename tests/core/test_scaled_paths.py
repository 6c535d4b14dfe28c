"""Other diffusion paths as the straight one: posteriors against quadrature, and the way back."""

import math

import pytest
import torch

from gmflow_core import GaussianMixture, posterior_mean
from gmflow_core.flow.path import diffuse
from gmflow_core.flow.scaled_paths import STRAIGHT, ScaledPath
from tests.helpers import F64, is_near, normal

PATHS = {
    "straight": STRAIGHT,
    "exploding": ScaledPath(exploding=True),
    "loud noise": ScaledPath(noise_scale=2.5),
}
WEIGHTS, MEANS, STD = (0.3, 0.7), (-1.0, 0.8), 0.25  # of one-dimensional data


def quadrature_mean(x, signal, noise):
    """Return E[x_0 | signal x_0 + noise eps = x] for each of x (n,), by a fine sum."""
    grid = torch.linspace(-4, 4, 40_001, dtype=F64)
    density = sum(
        weight * (-0.5 * ((grid - mean) / STD) ** 2).exp()
        for weight, mean in zip(WEIGHTS, MEANS, strict=True)
    )
    joint = density * (-0.5 * ((x[:, None] - signal * grid) / noise) ** 2).exp()
    return (joint * grid).sum(1) / joint.sum(1)


def data(count):
    """Return the data's mixture for a batch, (B, 2, 1): its posterior at sigma 1."""
    ones = torch.ones(count, 2, 1, dtype=F64)
    means = torch.tensor(MEANS, dtype=F64).reshape(1, 2, 1) * ones
    weights = torch.tensor(WEIGHTS, dtype=F64).log().reshape(1, 2, 1) * ones
    return GaussianMixture(means, weights, torch.full((1, 1, 1), math.log(STD), dtype=F64))


@pytest.mark.parametrize("alpha_bar", [0.02, 0.5, 0.97])
def test_posteriors_of_the_variance_preserving_path_are_those_of_the_flow(alpha_bar):
    """Of DDPM: x = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps."""
    signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    x = torch.linspace(-2, 2, 9, dtype=F64)
    sigma, point = noise / (signal + noise), (x / (signal + noise)).unsqueeze(1)
    flow = posterior_mean(data(9), torch.zeros_like(point), 1.0, point, sigma).squeeze(1)
    assert is_near(flow, quadrature_mean(x, signal, noise), 1e-6)


@pytest.mark.parametrize("alpha_bar", [0.02, 0.5, 0.97])
def test_the_exploding_path_is_the_preserving_one_in_other_units(alpha_bar):
    """k-diffusion's sigma is noise over signal, and its x is divided by the signal."""
    signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    path = PATHS["exploding"]
    assert path.sigma_of(noise / signal) == pytest.approx(noise / (signal + noise))
    x = normal(4, 3, 5, seed=1, dtype=F64)
    sigma = path.sigma_of(noise / signal)
    assert is_near(path.enter(x / signal, sigma), x / (signal + noise), 1e-6)


@pytest.mark.parametrize("name", PATHS)
def test_enters_where_the_straight_path_is_and_leaves_again(name):
    path, x0, noise = PATHS[name], normal(3, 2, 4, seed=2), normal(3, 2, 4, seed=3)
    for time in (0.05, 0.4, 0.9):
        signal = 1 if path.exploding else 1 - time
        x = signal * x0 + path.noise_scale * time * noise
        sigma = path.sigma_of(time)
        assert path.time_of(sigma) == pytest.approx(time)
        assert is_near(path.enter(x, sigma), diffuse(x0, sigma, noise), 1e-5)
        assert is_near(path.leave(path.enter(x, sigma), sigma), x, 1e-5)
    assert path.sigma_of(0.0) == 0
    assert path.straight is (name == "straight")
