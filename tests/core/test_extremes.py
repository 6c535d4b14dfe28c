"""Whatever the shape and however extreme the values, results are finite and of the right shape."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gmflow_core import (
    GaussianMixture,
    IsotropicGaussian,
    forward_transition,
    nll,
    posterior,
    posterior_mean,
    probabilistic_guidance,
    reverse_transition,
    rollout,
    second_order,
    transition_nll,
    velocity_to_x0,
    x0_to_velocity,
)
from gmflow_core.sampling.guidance import image_gaussian, shift_of
from gmflow_core.sampling.second_order import Step

extreme = settings(derandomize=True, deadline=None, max_examples=150, database=None)
SIGMAS = [0.0, 1e-6, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-6, 1.0]


class Case:
    """A mixture and points of random shape and scale; `x` is near the components or far away."""

    def __init__(self, batch, components, channels, space, std, logits, scale, x_scale, seed):
        generator = torch.Generator().manual_seed(seed)
        self.points, self.pixels = (batch, channels, *space), (batch, *space)
        means = scale * torch.randn(batch, components, channels, *space, generator=generator)
        log_weights = (
            logits * (2 * torch.rand(batch, components, 1, *space, generator=generator) - 1)
        ).log_softmax(1)
        self.mixture = GaussianMixture(
            means, log_weights, torch.full((batch, 1, 1, *[1] * len(space)), math.log(std))
        )
        self.x, self.y, self.noise = (
            x_scale * torch.randn(self.points, generator=generator) for _ in range(3)
        )
        self.noise = self.noise / x_scale

    def __repr__(self):
        std, reach = self.mixture.var.max().sqrt(), self.mixture.means.abs().max()
        shape, far = tuple(self.mixture.means.shape), self.x.abs().max()
        return f"means {shape} up to {reach:.3g}, std {std:.3g}, x up to {far:.3g}"


cases = st.builds(
    Case,
    batch=st.integers(1, 3),
    components=st.integers(1, 4),
    channels=st.integers(1, 4),
    space=st.lists(st.integers(1, 3), max_size=3),
    std=st.sampled_from([1e-6, 1e-3, 0.3, 1.0, 30.0, 1e3]),
    logits=st.sampled_from([0.0, 1.0, 100.0, 1e4]),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 300.0]),
    x_scale=st.sampled_from([1e-3, 1.0, 300.0]),
    seed=st.integers(0, 1000),
)
sigma_pairs = st.tuples(st.sampled_from(SIGMAS), st.sampled_from(SIGMAS)).map(sorted)


def finite(tensor, shape):
    assert tensor.shape == shape
    assert tensor.isfinite().all()
    return True


def finite_mixture(mixture, like):
    assert finite(mixture.means, like.means.shape)
    assert finite(mixture.log_weights, like.log_weights.shape)
    assert (mixture.weights.sum(1) - 1).abs().max() < 1e-5
    return bool(mixture.log_std.isfinite().all())


@extreme
@given(cases)
def test_a_mixtures_own_operations(case):
    mixture = case.mixture
    matched = mixture.moment_match()
    assert finite(matched.mean, case.points)
    assert (matched.var > 0).all()
    assert finite(mixture.log_prob(case.x), case.pixels)
    assert finite(nll(mixture, case.x), case.pixels)
    assert finite(mixture.sample(torch.Generator().manual_seed(0)), case.points)
    assert finite_mixture(mixture.with_temperature(0.1), mixture)


@extreme
@given(cases, st.sampled_from([1e-6, 1e-2, 1.0, 1e4]), st.booleans())
def test_products(case, var, with_over):
    gaussian = IsotropicGaussian(case.x, torch.full_like(case.x[:, :1], var))
    over = IsotropicGaussian(case.y, 2 * gaussian.var) if with_over else None
    assert finite_mixture(case.mixture.times(gaussian, over), case.mixture)


@extreme
@given(cases)
def test_the_knothe_rosenblatt_map_both_ways(case):
    mixture = case.mixture
    axes = mixture.principal_axes()
    assert axes.isfinite().all()
    z = mixture.to_normal(case.x, axes)
    assert finite(z, case.points)
    assert finite(mixture.from_normal(z, axes), case.points)
    x = mixture.from_normal(case.noise, axes)
    assert finite(x, case.points)
    reach = mixture.means.norm(dim=2).amax() + 6 * mixture.var.max().sqrt() * case.points[1] ** 0.5
    assert (
        x.norm(dim=1).max() <= 1.001 * reach + 1e-6
    )  # no sample is further out than the components


@extreme
@given(cases, sigma_pairs)
def test_conversions_and_transitions(case, sigmas):
    low, high = sigmas
    x0 = velocity_to_x0(case.mixture, case.x, high)
    assert finite_mixture(x0, case.mixture)
    assert finite(x0_to_velocity(case.y, case.x, high), case.points)
    assert finite(forward_transition(case.x, low, high, case.noise), case.points)
    assert finite_mixture(reverse_transition(x0, case.x, low, high), case.mixture)
    assert finite(reverse_transition(case.y, case.x, low, high, case.noise), case.points)
    assert finite(transition_nll(case.mixture, case.y, case.x, low, high), case.pixels)


@extreme
@given(cases, sigma_pairs)
def test_posteriors_and_rollouts(case, sigmas):
    low, high = sigmas
    x0 = velocity_to_x0(case.mixture, case.x, high)
    assert finite_mixture(posterior(x0, case.x, high, case.y, low), case.mixture)
    assert finite(posterior_mean(x0, case.x, high, case.y, low), case.points)
    assert finite(rollout(x0, case.x, high, low, 4), case.points)


@extreme
@given(cases, st.sampled_from([0.0, 0.05, 0.9, 0.999]), st.sampled_from([0.0, 1.0]))
def test_guidance(case, scale, orthogonal):
    for uncond_mean in (case.x, case.mixture.mean(), torch.zeros_like(case.x)):
        guided = probabilistic_guidance(case.mixture, uncond_mean, scale, orthogonal)
        assert finite(shift_of(guided).bias, case.points)
        assert finite_mixture(guided, case.mixture)


@extreme
@given(cases, sigma_pairs.filter(lambda pair: pair[0] < pair[1]), st.booleans())
def test_second_order_corrections(case, sigmas, guided):
    low, high = sigmas
    mixture = probabilistic_guidance(case.mixture, case.y, 0.4) if guided else case.mixture
    previous = Step(velocity_to_x0(case.mixture, case.x, high), case.x, high, high - low)
    for size in (low, 0.5 * low, 1e-6):
        corrected = second_order(mixture, previous, case.y, low, size)
        assert finite(image_gaussian(corrected).mean, case.points)
        assert (image_gaussian(corrected).var > 0).all()
        assert finite_mixture(corrected, case.mixture)
