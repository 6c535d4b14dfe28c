"""The substep loop against a slow, obvious one: a float64 loop over pixels with the posterior in plain Bayes form."""

import math

import pytest
import torch

from gmflow_core import GaussianMixture, rollout
from tests.helpers import F64, SPACES, cast, is_near, normal, random_mixture


def posterior_mean_of_a_pixel(means, log_weights, var, x_src, s_src, x, s):
    """E[x_0] under sum_k w_k N(mean_k, var) N(x; (1 - s) x_0, s^2) / N(x_src; (1 - s_src) x_0, s_src^2), lists over C."""
    precision = 1 / var + ((1 - s) / s) ** 2 - ((1 - s_src) / s_src) ** 2
    shift = [(1 - s) * b / s**2 - (1 - s_src) * a / s_src**2 for a, b in zip(x_src, x, strict=True)]
    centres, scores = [], []
    for mean, log_weight in zip(means, log_weights, strict=True):
        natural = [m / var + h for m, h in zip(mean, shift, strict=True)]
        centres.append([n / precision for n in natural])
        scores.append(log_weight + sum(n * n / precision - m * m / var for n, m in zip(natural, mean, strict=True)) / 2)
    shares = [math.exp(score - max(scores)) for score in scores]
    return [sum(w * c for w, c in zip(shares, column, strict=True)) / sum(shares) for column in zip(*centres, strict=True)]


def slow_rollout(mixture, x, sigma, sigma_end, substeps, constrain=None):
    """sigma, sigma_end: one for each pixel, (B, 1, *S)."""
    space = x.shape[2:]
    means, log_weights = (t.reshape(*t.shape[:3], -1) for t in (mixture.means, mixture.log_weights))  # (B, K, C or 1, pixels)
    var = mixture.var.expand(x.shape[0], 1, 1, *space).reshape(x.shape[0], -1)
    start, end = (s.to(F64).expand(x.shape[0], 1, *space).reshape(x.shape[0], -1) for s in (sigma, sigma_end))
    flat, out = x.double().reshape(*x.shape[:2], -1), x.double().reshape(*x.shape[:2], -1).clone()
    for b in range(flat.shape[0]):
        for p in range(flat.shape[2]):
            s_src, s_end = start[b, p].item(), end[b, p].item()
            parts = means[b, :, :, p].tolist(), log_weights[b, :, 0, p].tolist(), var[b, p].item()
            x_src = now = flat[b, :, p].tolist()
            for step in range(substeps):
                s, following = (s_src + (s_end - s_src) * i / substeps for i in (step, step + 1))
                mean = posterior_mean_of_a_pixel(*parts, x_src, s_src, now, s)
                now = [value + (following - s) * (value - m) / s for value, m in zip(now, mean, strict=True)]
                now = [constrain(value) for value in now] if constrain else now
            out[b, :, p] = torch.tensor(now, dtype=F64)
    return out.reshape(x.shape)


@pytest.mark.parametrize("space", [*SPACES, (1, 7)])
@pytest.mark.parametrize("components", [1, 5])
@pytest.mark.parametrize(("sigma", "sigma_end", "substeps"), [(1.0, 0.0, 7), (0.8, 0.3, 4), (0.3, 0.0, 1), (0.05, 0.04, 16)])
def test_rollout_agrees_with_the_slow_loop(space, components, sigma, sigma_end, substeps):
    mixture = random_mixture(batch=3, components=components, space=space, dtype=F64)
    x = normal(3, 3, *space, dtype=F64)
    ones = torch.ones(3, 1, *space, dtype=F64)
    expected = slow_rollout(mixture, x, sigma * ones, sigma_end * ones, substeps)
    assert is_near(rollout(mixture, x, sigma, sigma_end, substeps), expected, 1e-11)
    assert is_near(rollout(cast(mixture, torch.float32), x.float(), sigma, sigma_end, substeps).double(), expected, 3e-6)


@pytest.mark.parametrize("per_pixel", [False, True])
def test_every_sample_or_pixel_may_have_its_own_sigmas_and_variance(per_pixel):
    mixture, x = random_mixture(dtype=F64), normal(2, 3, 2, 3, dtype=F64)
    if per_pixel:
        log_std = normal(2, 1, 1, 2, 3, dtype=F64) - 1
        mixture = GaussianMixture(mixture.means, mixture.log_weights, log_std)
        start = 0.5 + 0.5 * normal(2, 1, 2, 3, seed=4, dtype=F64).sigmoid()
        end = start * normal(2, 1, 2, 3, seed=5, dtype=F64).sigmoid()
        found = rollout(mixture, x, start, end, 5)
    else:
        start, end = (torch.tensor(s, dtype=F64).reshape(2, 1, 1, 1) for s in ([1.0, 0.4], [0.5, 0.0]))
        found = rollout(mixture, x, start.flatten(), end.flatten(), 5)
    assert is_near(found, slow_rollout(mixture, x, start, end, 5), 1e-11)


@pytest.mark.parametrize("log_std", [-8.0, -20.0])
def test_nearly_certain_components_act_as_atoms(log_std):
    """Without variance the posterior keeps the means and weighs them by the likelihood of x; rounding must not grow either."""
    mixture, x = random_mixture(seed=2, dtype=F64), normal(2, 3, 2, 3, dtype=F64)
    mixture = GaussianMixture(mixture.means, mixture.log_weights, torch.full_like(mixture.log_std, log_std))
    expected = x
    for sigma in (1.0, 0.75, 0.5, 0.25):
        distance = (expected.unsqueeze(1) - (1 - sigma) * mixture.means).square().sum(2, keepdim=True)
        shares = (mixture.log_weights - 0.5 * distance / sigma**2).softmax(1)
        expected = expected - 0.25 * (expected - (shares * mixture.means).sum(1)) / sigma
    assert is_near(rollout(mixture, x, 1.0, 0.0, 4), expected, 10 * math.exp(2 * log_std) + 1e-12)
    assert is_near(rollout(cast(mixture, torch.float32), x.float(), 1.0, 0.0, 4).double(), expected, 5e-6)


def test_constrain_acts_after_every_substep():
    mixture, x, sigmas = random_mixture(dtype=F64), normal(2, 3, 2, 3, dtype=F64), []

    def constrain(x, sigma):
        sigmas.append(sigma.unique().item())
        return x.clamp(-0.3, 0.3)

    ones = torch.ones(2, 1, 2, 3, dtype=F64)
    expected = slow_rollout(mixture, x, 0.9 * ones, 0.1 * ones, 4, constrain=lambda value: min(max(value, -0.3), 0.3))
    assert is_near(rollout(mixture, x, 0.9, 0.1, 4, constrain=constrain), expected, 1e-12)
    assert sigmas == pytest.approx([0.7, 0.5, 0.3, 0.1])


def test_rollout_leaves_its_arguments_alone_and_refuses_no_substeps():
    mixture, x = random_mixture(), normal(2, 3, 2, 3)
    copies = [t.clone() for t in (x, mixture.means, mixture.log_weights, mixture.log_std)]
    rollout(mixture, x, 1.0, 0.0, 3)
    assert all(
        torch.equal(*pair) for pair in zip(copies, (x, mixture.means, mixture.log_weights, mixture.log_std), strict=True)
    )
    with pytest.raises(ValueError, match="substeps is 0"):
        rollout(mixture, x, 1.0, 0.0, 0)
