"""Mode frame: path, losses and solvers hold in the frame of a known mode.

References are computed on x without the frame: quadrature over x_0, draws of the source, and a
fine ODE.
"""

import math

import pytest
import torch

from gmflow_core.flow.losses import transition_nll
from gmflow_core.flow.path import (
    diffuse,
    forward_transition,
    posterior,
    posterior_mean,
    reverse_transition,
    velocity_to_x0,
)
from gmflow_core.gaussians.mixture import GaussianMixture
from gmflow_core.sampling.denoisers import denoiser_of
from gmflow_core.sampling.rollout import rollout
from gmflow_core.sampling.solvers import sample_euler, sample_gm_ode, sample_gm_sde
from gmflow_core.source.source import GaussianMixtureSource
from tests.helpers import F64, is_near, normal

LOG_2PI = math.log(2 * math.pi)
COMPONENTS = 3
JUMPS = [(1.0, 0.6), (0.9, 0.3), (0.5, 0.45), (0.3, 0.1)]  # sigma_high, sigma_low


class World:
    """A source of spherical modes, with data for each mode: K Gaussians of one width.

    All distributions of x are written out here: p(x_0 | m) = sum_k w_mk N(centres_mk, width^2) and
    x_sigma = (1 - sigma) x_0 + sigma (mu_m + s_m eps).
    """

    def __init__(self, dims, modes=3, seed=0):
        self.source = GaussianMixtureSource(
            1.5 * normal(modes, dims, seed=seed, dtype=F64),
            0.3 + 0.4 * normal(modes, 1, seed=seed + 1, dtype=F64).abs(),
            normal(modes, seed=seed + 2, dtype=F64).log_softmax(0),
        )
        self.centres = self.source.means.unsqueeze(1) + 0.8 * normal(
            modes, COMPONENTS, dims, seed=seed + 3, dtype=F64
        )
        self.weights = normal(modes, COMPONENTS, seed=seed + 4, dtype=F64).softmax(1)
        self.width = 0.25
        self.dims = dims

    def posterior(self, modes, x, sigma):
        """Return p(x_0 | x, m) by Bayes' rule; sigma > 0."""
        mu, s = self.source.moments(modes)
        precision = ((1 - sigma) / (sigma * s)).square()  # of x_0 in the likelihood, (B, 1)
        var = 1 / (1 / self.width**2 + precision)
        linear = ((1 - sigma) * (x - sigma * mu) / (sigma * s).square()).unsqueeze(1)
        means = var.unsqueeze(1) * (self.centres[modes] / self.width**2 + linear)
        spread = ((1 - sigma) * self.width) ** 2 + (sigma * s).square()
        offset = x.unsqueeze(1) - (1 - sigma) * self.centres[modes] - (sigma * mu).unsqueeze(1)
        logits = self.weights[modes].log() - 0.5 * offset.square().sum(2) / spread
        return GaussianMixture(
            means, logits.log_softmax(1).unsqueeze(2), 0.5 * var.log().unsqueeze(2)
        )

    def network(self, modes):
        """Return the perfect network: the distribution of u = (x - x_0) / sigma."""

        def predict(x, sigma):
            sigma = sigma[0].item() if isinstance(sigma, torch.Tensor) else sigma
            x0 = self.posterior(modes, x, sigma)
            return GaussianMixture(
                (x.unsqueeze(1) - x0.means) / sigma, x0.log_weights, x0.log_std - math.log(sigma)
            )

        return predict

    def draw_x0(self, modes, generator):
        component = torch.multinomial(self.weights[modes], 1, generator=generator).squeeze(1)
        noise = torch.randn(len(modes), self.dims, generator=generator, dtype=F64)
        return self.centres[modes, component] + self.width * noise

    def draw(self, count, sigma, seed=0):
        """Simulate x_sigma and the modes."""
        generator = torch.Generator().manual_seed(seed)
        modes = self.source.draw_modes(count, generator)
        x0 = self.draw_x0(modes, generator)
        return (1 - sigma) * x0 + sigma * self.source.draw(modes, generator), modes

    def grid(self, modes):
        """Return points (N, dims) and the log-probability of each one's cell given m, (B, N)."""
        low, high = self.centres.min() - 8 * self.width, self.centres.max() + 8 * self.width
        axis = torch.linspace(low.item(), high.item(), {1: 4001, 2: 401}[self.dims], dtype=F64)
        x0 = torch.cartesian_prod(*[axis] * self.dims).reshape(-1, self.dims)
        offset = (x0[None, :, None] - self.centres[modes][:, None]) / self.width  # (B, N, K, D)
        each = self.weights[modes].log()[:, None] - 0.5 * offset.square().sum(3)
        return x0, each.logsumexp(2) + self.dims * (
            (axis[1] - axis[0]).log() - math.log(self.width) - LOG_2PI / 2
        )

    def log_likelihood(self, x0, x, sigma, modes):
        """Return log p(x_sigma = x | x_0, m), (B, N) for x_0 (N, D)."""
        mu, s = self.source.moments(modes)
        std = sigma * s
        offset = (x - sigma * mu)[:, None] - (1 - sigma) * x0
        return -0.5 * (offset / std.unsqueeze(1)).square().sum(2) - self.dims * (
            std.log() + LOG_2PI / 2
        )


def jump(world, high, low, count=6, seed=5):
    """Return modes, their frame, and x at sigma_high and at sigma_low on the same paths."""
    x_low, modes = world.draw(count, low, seed)
    frame = world.source.frame(modes)
    noise = normal(count, world.dims, seed=seed + 1, dtype=F64)
    x_high = frame.leave(forward_transition(frame.enter(x_low, low), low, high, noise), high)
    return modes, frame, x_high, x_low


def x0_in_frame(world, modes, frame, x, sigma):
    """Return y_0 given x, from the perfect network through the frame."""
    y = frame.enter(x, sigma)
    return velocity_to_x0(frame.network(world.network(modes))(y, sigma), y, sigma), y


@pytest.mark.parametrize("sigma", [0.0, 0.2, 1.0])
def test_the_frame_makes_the_noise_standard_normal_and_the_path_an_ordinary_one(sigma):
    world = World(2)
    modes = torch.arange(3)
    frame, eps, x0 = (
        world.source.frame(modes),
        normal(3, 2, dtype=F64),
        normal(3, 2, seed=2, dtype=F64),
    )
    noise = world.source.draw(modes, noise=eps)
    assert is_near(frame.enter(noise, 1.0), eps, 1e-14)
    x = (1 - sigma) * x0 + sigma * noise
    y = frame.enter(x, sigma)
    assert is_near(y, diffuse(frame.enter(x0, 0.0), sigma, eps), 1e-14)
    assert is_near(frame.leave(y, sigma), x, 1e-14)
    u = GaussianMixture(
        (noise - x0).unsqueeze(1), torch.zeros(3, 1, 1, dtype=F64), torch.zeros(3, 1, 1, dtype=F64)
    )
    assert is_near(frame.velocity(u).mean(), eps - frame.enter(x0, 0.0), 1e-14)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize(("high", "low"), JUMPS)
def test_forward_transitions_keep_the_marginals(dims, high, low):
    """Check mean and variance of r (x_s - sigma_s mu) + sigma_t mu + s sqrt(beta) xi given x_0."""
    world = World(dims)
    modes = torch.arange(3)
    frame, x0 = world.source.frame(modes), normal(3, dims, dtype=F64)
    mu, s = world.source.moments(modes)

    def step(x, noise):
        return frame.leave(
            forward_transition(frame.enter(x, low), low, high, torch.full_like(x, noise)), high
        )

    x_low = (1 - low) * x0 + low * mu
    mean = step(x_low, 0.0)
    assert is_near(mean, (1 - high) * x0 + high * mu, 1e-14)
    slope, gain = step(x_low + 1, 0.0) - mean, step(x_low, 1.0) - mean
    assert is_near(
        (slope * low * s).square() + gain.square(), (high * s).square().expand_as(x0), 1e-13
    )


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize(("high", "low"), JUMPS)
def test_reverse_transitions_and_their_nll_against_quadrature(dims, high, low):
    """Check p(x_low | x_high) = p(x_high | x_low) p(x_low) / p(x_high), by integrals over x_0."""
    world = World(dims)
    modes, frame, x_high, x_low = jump(world, high, low)
    x0, log_prior = world.grid(modes)
    mu, s = world.source.moments(modes)
    ratio = (1 - high) / (1 - low)
    std = s * math.sqrt(high**2 - (ratio * low) ** 2)
    offset = x_high - ratio * (x_low - low * mu) - high * mu
    forward = -0.5 * (offset / std).square().sum(1) - dims * (std.squeeze(1).log() + LOG_2PI / 2)
    marginal_low, marginal_high = (
        (log_prior + world.log_likelihood(x0, x, sigma, modes)).logsumexp(1)
        for x, sigma in ((x_low, low), (x_high, high))
    )
    expected = forward + marginal_low - marginal_high

    mixture, y_high = x0_in_frame(world, modes, frame, x_high, high)
    volume = dims * s.squeeze(1).log()  # of x beside y
    log_prob = reverse_transition(mixture, y_high, low, high).log_prob(frame.enter(x_low, low))
    assert is_near(log_prob - volume, expected, 1e-9)
    loss = transition_nll(
        frame.network(world.network(modes))(y_high, high),
        frame.enter(x_low, low),
        y_high,
        low,
        high,
    )
    assert is_near(-loss - dims * LOG_2PI / 2 - volume, expected, 1e-9)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize(("src", "dst"), [*JUMPS, (0.3, 0.5)])
def test_posterior_means_elsewhere_against_quadrature(dims, src, dst):
    """Derive E[x_0 | x, sigma] anywhere from one network call at (x_src, sigma_src)."""
    world = World(dims)
    x_src, modes = world.draw(6, src)
    x, frame = world.draw(6, dst, seed=9)[0], world.source.frame(modes)
    x0, log_prior = world.grid(modes)
    weights = (log_prior + world.log_likelihood(x0, x, dst, modes)).softmax(1)
    mixture, y_src = x0_in_frame(world, modes, frame, x_src, src)
    mean = posterior_mean(mixture, y_src, src, frame.enter(x, dst), dst)
    assert is_near(frame.leave(mean, 0.0), weights @ x0, 1e-9)


def test_without_the_frame_the_weights_are_wrong():
    world = World(1, modes=1)
    world.source = GaussianMixtureSource(
        torch.tensor([[1.0]]), torch.tensor([[0.3]]), torch.zeros(1)
    ).to(dtype=F64)
    world.centres = torch.tensor([[[-1.0], [0.5], [2.0]]], dtype=F64)
    world.weights = torch.full((1, 3), 1 / 3, dtype=F64)
    modes, frame = torch.zeros(1, dtype=torch.int64), world.source.frame([0])
    x_src, src, x, dst = torch.zeros(1, 1, dtype=F64), 0.9, torch.ones(1, 1, dtype=F64), 0.4
    exact = world.posterior(modes, x, dst).weights
    assert (exact.flatten() - torch.tensor([0, 0.975, 0.025])).abs().max() < 1e-3
    mixture, y_src = x0_in_frame(world, modes, frame, x_src, src)
    assert is_near(posterior(mixture, y_src, src, frame.enter(x, dst), dst).weights, exact, 1e-12)
    without = posterior(world.posterior(modes, x_src, src), x_src, src, x, dst).weights
    assert (without.flatten() - torch.tensor([0.011, 0.637, 0.352])).abs().max() < 1e-3


@pytest.mark.parametrize(("high", "low"), JUMPS)
def test_simulated_paths_are_standard_normal_under_the_predicted_transition(high, low):
    """Map simulated x_low to N(0, I) by the Knothe-Rosenblatt map of p(x_low | x_high)."""
    world, count = World(2), 40_000
    modes, frame, x_high, x_low = jump(world, high, low, count)
    mixture, y_high = x0_in_frame(world, modes, frame, x_high, high)
    z = reverse_transition(mixture, y_high, low, high).to_normal(frame.enter(x_low, low))
    assert kolmogorov(torch.special.ndtr(z)) < 1.95  # 0.1 % for each axis
    assert torch.corrcoef(z.T)[0, 1].abs() < 4 / math.sqrt(count)


@pytest.mark.parametrize(("high", "low"), [*JUMPS, (1.0, 0.0)])
@pytest.mark.parametrize("order", [1, 2])
def test_one_step_of_gm_sde_keeps_the_marginal(high, low, order):
    world, count = World(2), 40_000
    x, modes = world.draw(count, high)
    frame, generator = world.source.frame(modes), torch.Generator().manual_seed(1)
    denoiser = denoiser_of(frame.network(world.network(modes)))
    y = sample_gm_sde(denoiser, frame.enter(x, high), [high, low], order=order, noise=generator)
    x = frame.leave(y, low)
    for mode in range(3):
        mine = x[modes == mode]
        mu, s = world.source.means[mode], world.source.std[mode]
        std = (((1 - low) * world.width) ** 2 + (low * s).square()).sqrt()
        offset = mine.unsqueeze(1) - (1 - low) * world.centres[mode] - low * mu  # (N, K, D)
        each = torch.special.ndtr(offset / std)
        assert kolmogorov((each * world.weights[mode].unsqueeze(1)).sum(1)) < 1.95


def kolmogorov(levels):
    """Return Kolmogorov's statistic of levels (N, D) in [0, 1] times sqrt(N), the largest axis'."""
    count = len(levels)
    steps = (torch.arange(count, dtype=levels.dtype).unsqueeze(1) + 0.5) / count
    return (levels.sort(0).values - steps).abs().max().item() * math.sqrt(count)


def flow(world, modes, x, high, low, steps=4000):
    """Integrate the ODE of the exact mean velocity of x to sigma_low, by Runge-Kutta 4."""
    velocity = lambda x, sigma: world.network(modes)(x, max(sigma, 1e-9)).mean()  # noqa: E731
    h = (low - high) / steps
    for i in range(steps):
        sigma = high + i * h
        k1 = velocity(x, sigma)
        k2 = velocity(x + 0.5 * h * k1, sigma + 0.5 * h)
        k3 = velocity(x + 0.5 * h * k2, sigma + 0.5 * h)
        k4 = velocity(x + h * k3, sigma + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@pytest.mark.parametrize("dims", [1, 2])
def test_rollouts_follow_the_flow_of_x(dims):
    """After one network call, the error of substeps in the frame falls like a substep's length."""
    world, high, low = World(dims), 0.95, 0.1
    modes, frame, x, _ = jump(world, high, 0.5, count=16)
    exact = flow(world, modes, x, high, low, steps=400)
    mixture, y = x0_in_frame(world, modes, frame, x, high)
    coarse, fine = (
        (frame.leave(rollout(mixture, y, high, low, n), low) - exact).abs().max().item()
        for n in (1000, 2000)
    )
    assert fine < 5e-3
    assert 1.8 < coarse / fine < 2.2


def test_gm_ode_from_pure_noise_in_one_call():
    world = World(2)
    modes = torch.arange(3).repeat(6)
    frame, eps = world.source.frame(modes), normal(18, 2, dtype=F64)
    exact = flow(world, modes, frame.leave(eps, 1.0), 1.0, 0.0, steps=400)
    y = sample_gm_ode(
        denoiser_of(frame.network(world.network(modes))), eps, [1.0, 0.0], substeps=4000
    )
    assert is_near(frame.leave(y, 0.0), exact, 3e-3)


def test_euler_is_the_same_with_and_without_the_frame():
    world, sigmas = World(2), [1.0, 0.75, 0.25, 0.0]
    modes = torch.arange(3)
    frame, eps, network = world.source.frame(modes), normal(3, 2, dtype=F64), world.network(modes)
    plain = sample_euler(denoiser_of(network), world.source.draw(modes, noise=eps), sigmas)
    assert is_near(
        frame.leave(sample_euler(denoiser_of(frame.network(network)), eps, sigmas), 0.0),
        plain,
        1e-13,
    )


def test_diagonal_modes_have_no_frame():
    source = GaussianMixtureSource(
        torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([0.5, 0.5]).log()
    )
    with pytest.raises(
        ValueError, match=r"\(3,\).*components are isotropic.*--covariance spherical.*euler"
    ):
        source.frame([0, 1])
    with pytest.raises(ValueError, match="modes between 0 and 2 do not fit a source of 2 modes"):
        source.frame([0, 2])
