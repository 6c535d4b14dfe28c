"""Blends of policies against their parts: where all agree, and where one alone counts."""

import pytest
import torch

from gmflow_core import GaussianMixture, flow_sigmas
from gmflow_core.flow.blended import BlendedPolicy, Part
from gmflow_core.sampling.solvers import sample_gm_ode, sample_gm_policy, sample_gm_sde
from tests.helpers import is_near, normal

SHAPE = (2, 3, 6, 8)
WHOLE = (slice(0, 6), slice(0, 8))


def denoiser(seed: int):
    """Return a denoiser of mixtures (K = 4) that depend on x."""
    means, logits = normal(2, 4, 3, 6, 8, seed=seed), normal(2, 4, 1, 6, 8, seed=seed + 1)

    def denoise(x, sigma, part=WHOLE):
        near = means + 0.3 * x.mean().tanh()
        log_std = torch.full((2, 1, 1, 1, 1), -1.0)
        weights = (logits + x[:, None, :1]).log_softmax(1)
        deep = (slice(None), slice(None), slice(None), *part)
        return GaussianMixture(near[deep], weights[deep], log_std)

    return denoise


def blend(x, *parts):
    """Return a blend of (mixture, weight, window)."""
    return BlendedPolicy(tuple(Part(*part) for part in parts), x.shape)


SOLVERS = {
    "gm-ode": lambda d, x: sample_gm_ode(d, x, flow_sigmas(3)),
    "gm-policy": lambda d, x: sample_gm_policy(d, x, flow_sigmas(3), substeps=24),
    "gm-sde": lambda d, x: sample_gm_sde(
        d, x, flow_sigmas(3), noise=torch.Generator().manual_seed(3)
    ),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_equal_policies_blend_to_themselves(solver):
    """Whatever the weights, and where no weight is left out."""
    one, x = denoiser(0), normal(*SHAPE, seed=9)
    weights = normal(2, 1, 6, 8, seed=8).exp(), normal(2, 1, 6, 8, seed=7).exp()

    def blended(x, sigma):
        return blend(x, *((one(x, sigma), weight, WHOLE) for weight in weights))

    assert is_near(SOLVERS[solver](blended, x), SOLVERS[solver](one, x), 1e-5)


@pytest.mark.parametrize("solver", ["gm-policy", "gm-sde first order", "gm-ode first order"])
def test_each_region_follows_its_own_policy(solver):
    """Pixels are independent, so a region with one policy is as if that covered all.

    The first policy covers the left half by a mask, the second the right by a window.
    """
    first, second, x = denoiser(0), denoiser(20), normal(*SHAPE, seed=9)
    left = torch.zeros(1, 1, 6, 8)
    left[..., :5] = 1
    right = (slice(0, 6), slice(5, 8))
    run = {
        "gm-policy": SOLVERS["gm-policy"],
        "gm-ode first order": lambda d, x: sample_gm_ode(d, x, [0.9, 0.3], order=1, substeps=6),
        "gm-sde first order": lambda d, x: sample_gm_sde(
            d, x, [0.9, 0.3], order=1, noise=torch.Generator().manual_seed(3)
        ),
    }[solver]
    # constant in x's mean, so that pixels do not see each other through it
    fixed = normal(*SHAPE, seed=9)

    def of(which):
        return lambda x, sigma: which(fixed, sigma)

    def blended(x, sigma):
        return blend(
            x,
            (first(fixed, sigma), left, WHOLE),
            (second(fixed, sigma, right), torch.ones(1), right),
        )

    result = run(blended, x)
    assert is_near(result[..., :5], run(of(first), x)[..., :5], 1e-5)
    assert is_near(result[..., 5:], run(of(second), x)[..., 5:], 1e-5)


def test_where_nothing_counts_x0_is_0():
    x, empty = normal(*SHAPE, seed=9), torch.zeros(1, 1, 6, 8)
    empty[..., :4] = 1
    mean = blend(x, (denoiser(0)(x, None), empty, WHOLE)).mean()
    assert (mean[..., 4:] == 0).all()
    assert (mean[..., :4] != 0).all()


def test_moves_and_temperature_reach_every_part():
    one, x = denoiser(0), normal(*SHAPE, seed=9)
    parts = blend(x, (one(x, None), torch.ones(1), WHOLE))
    by = normal(*SHAPE, seed=4)
    assert is_near(parts.moved(by).mean(), parts.mean() + by, 1e-6)
    cold = one(x, None).with_temperature(0.1).mean()
    assert is_near(parts.with_temperature(0.1).mean(), cold, 1e-6)


def test_a_prompt_is_corrected_by_its_own_step_before_alone():
    """Where other prompts stand in its place, and after or before a single one, nothing is."""
    one, x = denoiser(0), normal(*SHAPE, seed=9)
    sigmas, calls = flow_sigmas(3), iter(range(3))

    def changing(x, sigma):
        return BlendedPolicy((Part(one(x, sigma), torch.ones(1), WHOLE, next(calls)),), x.shape)

    first_order = sample_gm_ode(one, x, sigmas, order=1)
    assert is_near(sample_gm_ode(changing, x, sigmas), first_order, 1e-5)
    turns = iter((True, False, True))

    def now_and_then(x, sigma):
        return blend(x, (one(x, sigma), torch.ones(1), WHOLE)) if next(turns) else one(x, sigma)

    assert is_near(sample_gm_ode(now_and_then, x, sigmas), first_order, 1e-5)
