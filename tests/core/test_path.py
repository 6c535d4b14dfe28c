"""Conversions, transitions and posteriors against Gaussian algebra and quadrature."""

import math

import pytest
import torch

from gmflow_core import (
    GaussianMixture,
    diffuse,
    flow_sigmas,
    forward_transition,
    posterior,
    posterior_mean,
    reverse_transition,
    rollout,
    velocity_to_x0,
    x0_to_velocity,
)
from tests.helpers import (
    F64,
    SPACES,
    cast,
    golden,
    golden_mixture,
    is_near,
    normal,
    random_mixture,
    same_mixture,
)

PAIRS = [
    (1.0, 0.9),
    (1.0, 0.2),
    (0.9, 0.5),
    (0.5, 0.4999),
    (0.5, 0.01),
    (0.1, 0.001),
]  # (sigma_high, sigma_low)


def on_line(mixture, points):
    """Return the log-density of a mixture of one 1-D point at `points`."""
    means, log_weights = mixture.means.flatten()[:, None], mixture.log_weights.flatten()[:, None]
    return (log_weights - 0.5 * (points - means).square() / mixture.var.flatten()).logsumexp(0)


def mixture_1d(seed=0, components=3):
    return random_mixture(seed, batch=1, components=components, channels=1, space=(), dtype=F64)


# Conversions and the time grid


@pytest.mark.parametrize("sigma", [1.0, 0.3, 1e-3])
def test_velocity_and_x0_convert_into_each_other(sigma):
    x0, noise = normal(2, 3, 4, dtype=F64), normal(2, 3, 4, seed=2, dtype=F64)
    x = diffuse(x0, sigma, noise)
    assert is_near(x, (1 - sigma) * x0 + sigma * noise, 1e-14)
    assert is_near(velocity_to_x0(noise - x0, x, sigma), x0, 1e-14)
    assert is_near(x0_to_velocity(x0, x, sigma), noise - x0, 1e-11)


@pytest.mark.parametrize("space", SPACES)
def test_a_mixture_of_velocities_becomes_the_mixture_of_x0(space):
    velocity, x, sigma = random_mixture(space=space), normal(2, 3, *space), torch.tensor([0.8, 0.1])
    x0 = velocity_to_x0(velocity, x, sigma)
    wide = sigma.reshape(-1, *[1] * (len(space) + 1))
    assert is_near(x0.mean(), x - wide * velocity.mean())
    assert is_near(x0.covariance(), wide.unsqueeze(-1).square() * velocity.covariance(), 1e-5)
    x0_density = x0.log_prob(x - wide * normal(2, 3, *space, seed=4))  # change of variables
    assert is_near(
        x0_density + 3 * wide.squeeze(1).log(),
        velocity.log_prob(normal(2, 3, *space, seed=4)),
        1e-5,
    )


def test_at_sigma_0_the_mixture_of_x0_is_x_itself():
    x0 = velocity_to_x0(random_mixture(), normal(2, 3, 2, 3), 0.0)
    assert torch.equal(x0.means, normal(2, 3, 2, 3).unsqueeze(1).expand_as(x0.means))
    assert (x0.log_std.exp() < 1e-6).all()


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.2])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_flow_sigmas_descend_from_1_to_0_uniformly_before_the_shift(steps, shift):
    sigmas = flow_sigmas(steps, shift).double()
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    assert is_near(
        sigmas / (shift - (shift - 1) * sigmas),
        1 - torch.arange(steps + 1, dtype=F64) / steps,
        2e-7,
    )


# Transitions


def coefficients(low, high):
    """(signal, std) of x_high given x_low, by probing the transition."""
    one, zero = torch.ones(1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64)
    return forward_transition(one, low, high, zero).item(), forward_transition(
        zero, low, high, one
    ).item()


@pytest.mark.parametrize(
    ("low", "middle", "high"), [(0.0, 0.3, 0.9), (0.2, 0.5, 1.0), (0.1, 0.1001, 0.6)]
)
def test_forward_transitions_compose(low, middle, high):
    (r1, s1), (r2, s2), (r, s) = (
        coefficients(low, middle),
        coefficients(middle, high),
        coefficients(low, high),
    )
    assert r1 * r2 == pytest.approx(r, abs=1e-12)
    assert (r2 * s1) ** 2 + s2**2 == pytest.approx(s**2, abs=1e-12)
    assert r * (1 - low) == pytest.approx(
        1 - high, abs=1e-12
    )  # from x_0 to low to high is from x_0 to high
    assert (r * low) ** 2 + s**2 == pytest.approx(high**2, abs=1e-12)


@pytest.mark.parametrize(("high", "low"), [*PAIRS, (0.4, 0.0), (0.4, 0.4)])
def test_reverse_transition_conditions_the_joint_gaussian_of_the_path(high, low):
    x0, x_high = normal(2, 3, dtype=F64), normal(2, 3, seed=2, dtype=F64)
    ratio = (1 - high) / (
        1 - low
    )  # given x_0: x_low = (1 - low) x_0 + low e, x_high = ratio x_low + ...
    gain = low**2 * ratio / high**2
    mean = (1 - low) * x0 + gain * (x_high - (1 - high) * x0)
    var = low**2 - gain * low**2 * ratio
    noise = normal(2, 3, seed=3, dtype=F64)
    assert is_near(reverse_transition(x0, x_high, low, high), mean, 1e-12)
    assert is_near(
        reverse_transition(x0, x_high, low, high, noise), mean + max(var, 0) ** 0.5 * noise, 1e-9
    )
    zeros = torch.zeros(2, 1, 1, dtype=F64)
    moved = reverse_transition(
        GaussianMixture(x0.unsqueeze(1), zeros, zeros - 1.5), x_high, low, high
    )
    slope = (1 - low) - gain * (1 - high)  # d mean / d x_0
    assert is_near(moved.mean(), mean, 1e-12)
    assert (moved.var - var - (slope * math.exp(-1.5)) ** 2).abs().max() < 1e-12


@pytest.mark.parametrize(("high", "low"), PAIRS)
def test_reverse_transition_of_an_exact_posterior_is_bayes_rule(high, low):
    """Data from a mixture: p(x_low | x_high) is proportional to p(x_low) p(x_high | x_low)."""
    data, x_high = mixture_1d(), torch.tensor([[0.7]], dtype=F64)
    x0_given_high = posterior(
        data, torch.zeros_like(x_high), 1.0, x_high, high
    )  # the data is x_0 given pure noise
    points = torch.linspace(-8, 8, 400_001, dtype=F64)
    marginal = GaussianMixture(
        (1 - low) * data.means, data.log_weights, 0.5 * ((1 - low) ** 2 * data.var + low**2).log()
    )
    ratio = (1 - high) / (1 - low)
    log_density = on_line(marginal, points) - 0.5 * (x_high[0] - ratio * points).square() / (
        high**2 - (ratio * low) ** 2
    )
    expected = (log_density - log_density.logsumexp(0)).exp()
    found = on_line(reverse_transition(x0_given_high, x_high, low, high), points)
    assert is_near((found - found.logsumexp(0)).exp(), expected, 1e-8)


# The posterior


@pytest.mark.parametrize(("sigma_src", "sigma"), [*PAIRS, (1.0, 1e-3), (0.5, 0.5)])
@pytest.mark.parametrize("components", [1, 3])
def test_posterior_mean_agrees_with_quadrature(sigma_src, sigma, components):
    """Compare with the mixture given x_src times the likelihood of x over that of x_src."""
    mixture = mixture_1d(1, components)
    x_src, x = torch.tensor([[0.3]], dtype=F64), torch.tensor([[-0.4]], dtype=F64)
    if sigma_src < 1:  # where the predicted mixture lives
        mixture = posterior(mixture, x_src, 1.0, x_src, sigma_src)
    points = torch.linspace(-10, 10, 1_000_001, dtype=F64)
    log_density = on_line(mixture, points)
    log_density -= 0.5 * ((x[0] - (1 - sigma) * points) / sigma).square()
    log_density += 0.5 * ((x_src[0] - (1 - sigma_src) * points) / sigma_src).square()
    expected = (log_density.softmax(0) * points).sum()
    assert posterior_mean(mixture, x_src, sigma_src, x, sigma).item() == pytest.approx(
        expected.item(), abs=1e-9
    )
    single = posterior_mean(
        cast(mixture, torch.float32), x_src.float(), sigma_src, x.float(), sigma
    ).item()
    assert single == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("sigma_src", [1.0, 0.5, 1e-3])
def test_without_a_move_the_posterior_is_the_mixture_itself(space, sigma_src):
    mixture, x = random_mixture(space=space), normal(2, 3, *space)
    assert same_mixture(posterior(mixture, x, sigma_src, x, sigma_src), mixture, 1e-6)


@pytest.mark.parametrize("sigma", [1e-3, 1e-5, 0.0])
def test_near_sigma_0_the_posterior_mean_is_x(sigma):
    mixture, x_src = random_mixture(spread=1.0), normal(2, 3, 2, 3)
    x = normal(2, 3, 2, 3, seed=5)
    assert (posterior_mean(mixture, x_src, 0.8, x, sigma) - x).abs().max() < 6 * sigma + 2e-6


def test_posteriors_compose():
    mixture = random_mixture(dtype=F64)
    a, b, c = (normal(2, 3, 2, 3, seed=seed, dtype=F64) for seed in (1, 2, 3))
    direct = posterior(mixture, a, 0.9, c, 0.2)
    assert same_mixture(
        posterior(posterior(mixture, a, 0.9, b, 0.5), b, 0.5, c, 0.2), direct, 1e-11
    )


def test_one_sigma_for_each_sample_equals_one_by_one():
    mixture, x, y, noise = (
        random_mixture(),
        normal(2, 3, 2, 3),
        normal(2, 3, 2, 3, seed=2),
        normal(2, 3, 2, 3, seed=3),
    )
    high, low = torch.tensor([1.0, 0.4]), torch.tensor([0.7, 0.05])

    def every(m, x, y, noise, high, low):
        return [
            diffuse(x, high, noise),
            velocity_to_x0(m, x, high).means,
            velocity_to_x0(m, x, high).log_std,
            x0_to_velocity(x, y, high),
            forward_transition(x, low, high, noise),
            reverse_transition(m, x, low, high).means,
            reverse_transition(m, x, low, high).log_std,
            reverse_transition(y, x, low, high, noise),
            posterior_mean(m, x, high, y, low),
        ]

    together = every(mixture, x, y, noise, high, low)
    wide = every(mixture, x, y, noise, *(s.reshape(2, 1, 1, 1) for s in (high, low)))
    for b in range(2):
        part = GaussianMixture(
            mixture.means[b : b + 1], mixture.log_weights[b : b + 1], mixture.log_std[b : b + 1]
        )
        alone = every(
            part, x[b : b + 1], y[b : b + 1], noise[b : b + 1], high[b].item(), low[b].item()
        )
        for all_of_them, same, one in zip(together, wide, alone, strict=True):
            assert is_near(all_of_them[b : b + 1], one, 1e-6)
            assert torch.equal(all_of_them, same)


def test_errors_quote_what_was_given():
    x = normal(2, 3, 4)
    for sigma in (torch.ones(3), torch.ones(2, 1)):
        with pytest.raises(ValueError, match=rf"\({sigma.shape[0]},.*\(2, 3, 4\)"):
            diffuse(x, sigma, x)
    with pytest.raises(ValueError, match="steps is 0"):
        flow_sigmas(0)
    with pytest.raises(ValueError, match="shift is -1"):
        flow_sigmas(4, -1)
    for shift in (1e38, 1e-320, float("inf")):
        with pytest.raises(ValueError, match=r"shift is (1e|inf).* nearer to 1"):
            flow_sigmas(4, shift)
    assert len(flow_sigmas(1000, 1000.0)) == 1001


# Golden figures


def test_golden_conversions_and_forward_transitions():
    figures = golden("transitions")
    x, sigma, noise = figures["x_t"], figures["t"] / 1000, figures["noise"]
    low, high = figures["t_low"] / 1000, figures["t_high"] / 1000
    velocity = golden_mixture("transitions", "gm_u")
    assert same_mixture(
        velocity_to_x0(velocity, x, sigma), golden_mixture("transitions", "u_to_x_0.mixture")
    )
    assert is_near(
        velocity_to_x0(velocity, x, sigma).moment_match().var, figures["u_to_x_0.gaussian.var"]
    )
    assert is_near(velocity_to_x0(noise, x, sigma), figures["u_to_x_0.sample"])
    assert is_near(diffuse(figures["x_0"], sigma, noise), figures["forward_diffusion"])
    assert is_near(forward_transition(x, low, high, noise), figures["forward_transition"])


@pytest.mark.parametrize("prediction", ["u", "x0"])
def test_golden_reverse_transitions(prediction):
    figures, mixture = golden("transitions"), golden_mixture("transitions", "gm_u")
    x, low, high, point = (
        figures["x_t"],
        figures["t_low"] / 1000,
        figures["t_high"] / 1000,
        figures["x_0"],
    )
    if prediction == "u":
        mixture, point = velocity_to_x0(mixture, x, high), velocity_to_x0(point, x, high)
    moved = reverse_transition(mixture, x, low, high)
    recorded = golden_mixture("transitions", f"reverse.{prediction}.mixture")
    assert is_near(moved.means, recorded.means)
    assert is_near(moved.log_weights, recorded.log_weights)
    assert (
        moved.var - recorded.var
    ).abs().max() < 1.1e-6  # the reference floors the bridge's variance at 1e-6; sample 1 goes to 0
    assert is_near(moved.log_std[:1], recorded.log_std[:1])
    sample = reverse_transition(point, x, low, high, figures["noise"])
    assert is_near(sample, figures[f"reverse.{prediction}.sample"])


@pytest.mark.parametrize(
    ("case", "t_src", "t"),
    [(0, 1000, 875), (1, 800, 640), (2, 500, 499.99), (3, 250, 3), (4, 100, 0.01)],
)
def test_golden_posterior_means(case, t_src, t):
    figures = golden("transitions")
    x_src, x = figures[f"convert{case}.x_t_src"], figures[f"convert{case}.x_t"]
    x0 = velocity_to_x0(golden_mixture("transitions", "gm_u"), x_src, t_src / 1000)
    assert is_near(
        posterior_mean(x0, x_src, t_src / 1000, x, t / 1000), figures[f"convert{case}.mean_x0"]
    )


@pytest.mark.parametrize("fraction", [1.0, 0.9, 0.5, 0.05, 0.0])
@pytest.mark.parametrize("case", ["gm", "gm_temp0.3"])
def test_golden_policy_velocities(case, fraction):
    figures = golden("policies")
    x_src, sigma_src = figures["x_src"], figures["sigma_src"]
    x0 = velocity_to_x0(golden_mixture("policies", "denoising_output"), x_src, sigma_src)
    assert is_near(x0.means, figures["x0.means"])
    assert is_near(x0.var, figures["x0.gm_vars"])
    if case == "gm_temp0.3":
        x0 = x0.with_temperature(0.3)
        assert is_near(x0.log_weights, figures["temp0.3.logweights"])
        assert is_near(x0.var, figures["temp0.3.gm_vars"])
    x, sigma = x_src, sigma_src
    if fraction < 1:
        x, sigma = x_src * (0.5 + 0.5 * fraction) + 0.1 * figures["pert"], fraction * sigma_src
    velocity = x0_to_velocity(posterior_mean(x0, x_src, sigma_src, x, sigma), x, sigma)
    recorded = figures[f"{case}.f{fraction}.u"]
    # Both divide the float32 difference of x and x_0 by sigma, which magnifies its rounding
    tolerance = 2e-6 * recorded.abs().max() + 5e-7 * x.abs().max() / sigma.clamp(min=1e-6)
    assert ((velocity - recorded).abs() <= tolerance.reshape(2, 1, 1, 1)).all()


@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize("steps", [8, 128])
def test_golden_grids_and_steps(steps, shift):
    figures, name = golden("schedulers"), f"n{steps}_shift{shift}"
    sigmas, x = flow_sigmas(steps, shift), figures["x"]
    assert is_near(sigmas, figures[f"{name}.sigmas"], 1e-7)
    for index in (0, steps // 2, steps - 1):
        high, low = sigmas[index], sigmas[index + 1]
        for prediction in ("u", "x0"):
            x0 = figures["m"] if prediction == "x0" else velocity_to_x0(figures["m"], x, high)
            certain = GaussianMixture(
                x0.unsqueeze(1), torch.zeros(2, 1, 1, 3, 3), torch.zeros(1, 1, 1, 1, 1)
            )
            assert is_near(
                rollout(certain, x, high, low, 1), figures[f"{name}.euler.i{index}.{prediction}"]
            )
            noise = figures["noise"] if low > 0 else None
            assert is_near(
                reverse_transition(x0, x, low, high, noise),
                figures[f"{name}.sde.i{index}.{prediction}"],
            )
