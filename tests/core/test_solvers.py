"""Solvers with exact denoisers, whose results are known in closed form, and golden runs.

For data from a Gaussian mixture the posterior of x_0 given x is again a mixture, so a perfect
network can be written down.

The recorded GM-SDE run of the reference's random toy network is chaotic: its position features have
a period of 0.005, so a relative change of 1e-7 in the input moves the result by more than 0.1. The
test measures that and asks for agreement within twice as much, which tells right draws from swapped
ones, and no more.
"""

import itertools
import math

import pytest
import torch

from gmflow_core import (
    GaussianMixture,
    denoiser_of,
    diffuse,
    flow_sigmas,
    nll,
    probabilistic_guidance,
    rollout,
    sample_euler,
    sample_gm_ode,
    sample_gm_sde,
    second_order,
    shift_time,
    velocity_to_x0,
)
from gmflow_core.models.mlp import GMFlowMLP, GMFlowMLPConfig
from gmflow_core.sampling.second_order import Step
from gmflow_core.sampling.solvers import SOLVERS, Draws, solve
from tests.helpers import (
    COPYING,
    F64,
    WAITING,
    Waits,
    bisect,
    cast,
    golden,
    is_near,
    normal,
    random_mixture,
)


def mixture_data(channels, components=3):
    """Return the data's distribution as a mixture of one point: (1, K, C), (1, K, 1), (1, 1, 1)."""
    means = torch.tensor([[-2.0, 1.0], [0.5, -1.5], [2.5, 1.5]], dtype=F64)[
        :components, :channels
    ].unsqueeze(0)
    log_weights = (
        torch.tensor([0.5, 0.2, 0.3], dtype=F64)[:components].log().log_softmax(0).reshape(1, -1, 1)
    )
    return GaussianMixture(means, log_weights, torch.full((1, 1, 1), math.log(0.4), dtype=F64))


def exact_denoiser(data, count=None):
    """Return the posterior of x_0 for points x (B, C): components conditioned on x, reweighted."""

    def denoise(x, sigma):
        if count is not None:
            count.append(sigma[0].item())
        means, var, log_weights = data.means.to(x), data.var.to(x), data.log_weights.to(x)
        sigma = sigma.to(x).reshape(-1, 1, 1)
        evidence_var = (1 - sigma).square() * var + sigma.square()
        surprise = x.unsqueeze(1) - (1 - sigma) * means
        scores = log_weights - 0.5 * surprise.square().sum(2, keepdim=True) / evidence_var
        centres = means + (1 - sigma) * var / evidence_var * surprise
        return GaussianMixture(
            centres, scores.log_softmax(1), 0.5 * (var * sigma.square() / evidence_var).log()
        )

    return denoise


def matched_denoiser(data):
    """A network that knows mean and variance of the posterior, but not its shape."""

    def denoise(x, sigma):
        gaussian = exact_denoiser(data)(x, sigma).moment_match()
        mean, var = gaussian.mean.unsqueeze(1), gaussian.var.unsqueeze(1)
        return GaussianMixture(mean, torch.zeros_like(var), 0.5 * var.log())

    return denoise


def exact_flow(data, z):
    """Return where the exact ODE takes 1-D points z (B, 1): it maps quantiles to quantiles."""
    means, weights, std = (t[..., 0] for t in (data.means, data.weights, data.log_std.exp()))

    def excess(x):
        return (weights * torch.special.ndtr((x - means) / std)).sum(
            1, keepdim=True
        ) - torch.special.ndtr(z)

    return bisect(excess, torch.full_like(z, -10), torch.full_like(z, 10))


# K = 1


@pytest.mark.parametrize(
    "solver", [sample_euler, lambda *args: sample_gm_ode(*args, order=1, substeps=1)]
)
def test_with_one_component_it_is_ordinary_flow_matching(solver):
    data, x, sigmas = (
        mixture_data(2, components=1),
        normal(50, 2, dtype=F64),
        flow_sigmas(7, shift=2.0).double(),
    )
    expected, mean, var = x, data.means[0, 0], 0.4**2
    for high, low in itertools.pairwise(sigmas):
        slope = (high - (1 - high) * var) / ((1 - high) ** 2 * var + high**2)
        velocity = -mean + slope * (
            expected - (1 - high) * mean
        )  # E[noise - x_0 | x] of N(mean, var)
        expected = expected + (low - high) * velocity
    assert is_near(
        solver(exact_denoiser(data), x, sigmas), expected, 1e-6
    )  # a denoiser gets its sigma in float32


# Exact mixtures


def test_gm_ode_converges_to_the_exact_flow_at_first_order_in_its_substeps():
    data, z = mixture_data(1), 1.5 * normal(300, 1, dtype=F64)
    exact, errors = exact_flow(data, z), []
    for substeps in (64, 128, 256):
        x = sample_gm_ode(exact_denoiser(data), z, flow_sigmas(4), order=1, substeps=substeps // 4)
        errors.append((x - exact).abs().mean().item())
    assert errors[0] < 0.05
    assert 1.8 < errors[0] / errors[1] < 2.2
    assert 1.8 < errors[1] / errors[2] < 2.2


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("calls", [1, 4, 16, 64])
def test_with_an_exact_mixture_neither_the_network_calls_nor_the_order_matter(order, calls):
    data, x, count = mixture_data(2), normal(200, 2, dtype=F64), []
    expected = sample_gm_ode(exact_denoiser(data), x, flow_sigmas(64), order=1, substeps=1)
    found = sample_gm_ode(
        exact_denoiser(data, count), x, flow_sigmas(calls), order=order, substeps=64 // calls
    )
    assert is_near(found, expected, 1e-9)
    assert count == pytest.approx(flow_sigmas(calls)[:-1].tolist())


def test_with_an_inexact_mixture_order_2_beats_order_1():
    data, z = mixture_data(1), normal(300, 1, dtype=F64)
    exact, sigmas = exact_flow(data, z), flow_sigmas(8)
    first, second = (
        sample_gm_ode(matched_denoiser(data), z, sigmas, order=o, substeps=32) - exact
        for o in (1, 2)
    )
    assert second.abs().mean() < 0.75 * first.abs().mean()


def test_undamped_the_correction_is_of_second_order():
    """`ca` switches it off below a step size of sqrt(ca V), where network error would dominate."""
    data, z, errors = mixture_data(1), normal(300, 1, dtype=F64), []
    for steps in (8, 16, 32, 64):
        x, previous = z, None
        for high, low in itertools.pairwise(flow_sigmas(steps).tolist()):
            mixture = matched_denoiser(data)(x, torch.full((300,), high))
            step = Step(mixture, x, high, high - low)
            if previous is not None:
                mixture = second_order(mixture, previous, x, high, high - low, ca=0.0)
            x, previous = rollout(mixture, x, high, low, 64), step
        errors.append((x - exact_flow(data, z)).abs().mean().item())
    assert all(2.6 < coarse / fine < 4.5 for coarse, fine in itertools.pairwise(errors)), errors


def assert_distributed_as(x, data, tolerance=0.0):
    """Check mean, covariance and component shares of points (N, C) to 4.5 standard errors."""
    data, count = cast(data, x.dtype), len(x)
    covariance = data.covariance()[0]
    assert (
        (x.mean(0) - data.mean()[0]).abs()
        < 4.5 * (covariance.diagonal() / count).sqrt() + tolerance
    ).all()
    fourth = 3 * covariance.diagonal().square()  # an upper bound for mixtures as flat as these
    bound = 4.5 * (fourth.unsqueeze(0) * fourth.unsqueeze(1)).sqrt().div(count).sqrt() + tolerance
    assert ((x.T.cov() - covariance).abs() < bound).all()
    nearest = (x.unsqueeze(1) - data.means[0]).square().sum(-1).argmin(1)
    shares = nearest.bincount(minlength=data.num_components) / count
    assert (
        shares - data.weights.flatten()
    ).abs().max() < 4.5 * 0.5 / count**0.5 + tolerance + 0.005  # components overlap


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_gm_sde_with_the_exact_mixture_draws_from_the_data(order, steps):
    generator = torch.Generator().manual_seed(steps)
    x = torch.randn(20_000, 2, generator=generator)
    x = sample_gm_sde(
        exact_denoiser(mixture_data(2)),
        x,
        flow_sigmas(steps, shift=2.0),
        order=order,
        noise=generator,
    )
    assert_distributed_as(x, mixture_data(2))


@pytest.mark.parametrize("calls", [1, 8])
def test_gm_ode_with_many_substeps_draws_from_the_data(calls):
    x = sample_gm_ode(
        exact_denoiser(mixture_data(2)),
        normal(20_000, 2),
        flow_sigmas(calls),
        substeps=256 // calls,
    )
    assert_distributed_as(x, mixture_data(2), tolerance=0.02)  # Euler's own error, about 4 / 256


def test_sigmas_need_not_end_at_0():
    data, x, sigma = mixture_data(2), normal(20_000, 2), 0.375
    half_way = GaussianMixture(
        (1 - sigma) * data.means,
        data.log_weights,
        0.5 * ((1 - sigma) ** 2 * data.var + sigma**2).log(),
    )
    generator = torch.Generator().manual_seed(0)
    sde = sample_gm_sde(exact_denoiser(data), x, [1.0, 0.7, sigma], noise=generator)
    covariance = half_way.covariance()[0].float()
    assert (
        (sde.mean(0) - half_way.mean()[0]).abs() < 4.5 * (covariance.diagonal() / len(x)).sqrt()
    ).all()
    assert is_near(sde.T.cov(), covariance, 0.03)
    start = normal(20, 2, dtype=F64)
    whole = sample_gm_ode(matched_denoiser(data), start, [1.0, 0.75, sigma, 0.25, 0.0], order=1)
    part = sample_gm_ode(matched_denoiser(data), start, [1.0, 0.75, sigma], order=1)
    assert is_near(
        sample_gm_ode(matched_denoiser(data), part, torch.tensor([sigma, 0.25, 0.0]), order=1),
        whole,
        1e-12,
    )


# What the caller hands in


@pytest.mark.parametrize(
    ("solver", "substeps"), [(sample_gm_ode, 3), (sample_gm_sde, 1), (sample_euler, 1)]
)
def test_constrain_is_obeyed_after_every_substep_and_callback_called_once_a_step(solver, substeps):
    data, x, constrained, reported = mixture_data(2), normal(10, 2), [], []
    mask, known, noise = (
        torch.arange(10).unsqueeze(1) < 4,
        torch.full((10, 2), 0.7),
        normal(10, 2, seed=2),
    )

    def constrain(x, sigma):
        constrained.append(sigma.max().item())
        return torch.where(mask, diffuse(known, constrained[-1], noise), x)

    def callback(step, x, x0_mean):
        mean = exact_denoiser(data)(x, torch.full((10,), sigmas[step])).mean()
        reported.append((step, (x0_mean - mean).abs().max().item()))

    sigmas = flow_sigmas(4).tolist()
    extra = {"substeps": substeps} if solver is sample_gm_ode else {}
    out = solver(exact_denoiser(data), x, sigmas, constrain=constrain, callback=callback, **extra)
    assert torch.equal(out[:4], known[:4])
    assert not torch.equal(out[4:], known[4:])
    assert constrained == pytest.approx(flow_sigmas(4 * substeps)[1:].tolist(), abs=1e-6)
    assert [step for step, _ in reported] == [0, 1, 2, 3]
    assert max(error for _, error in reported) < 1e-5


def test_recorded_draws_reproduce_a_generators_run():
    data, x, sigmas = mixture_data(2), normal(10, 2), flow_sigmas(3)
    out = sample_gm_sde(exact_denoiser(data), x, sigmas, noise=torch.Generator().manual_seed(3))
    assert torch.equal(
        sample_gm_sde(exact_denoiser(data), x, sigmas, noise=torch.Generator().manual_seed(3)), out
    )
    assert not torch.equal(
        sample_gm_sde(exact_denoiser(data), x, sigmas, noise=torch.Generator().manual_seed(4)), out
    )

    generator, draws, now = torch.Generator().manual_seed(3), [], x
    for high, low in itertools.pairwise(sigmas.tolist()):
        level = torch.rand(
            10, generator=generator
        )  # uniform for the component, then its noise, then the transition's
        weights = exact_denoiser(data)(now, torch.full((10,), high)).weights.squeeze(2)
        component = (level.unsqueeze(1) > weights.cumsum(1)).sum(1)
        noise = torch.randn(10, 2, generator=generator)
        draws.append(
            Draws(component, noise, torch.randn(10, 2, generator=generator) if low > 0 else None)
        )
        now = sample_gm_sde(exact_denoiser(data), now, [high, low], noise=draws[-1:])
    assert is_near(now, out, 1e-6)
    assert is_near(sample_gm_sde(exact_denoiser(data), x, sigmas, noise=draws), out, 1e-6)


@pytest.mark.parametrize("solver", [sample_gm_ode, sample_gm_sde])
@pytest.mark.parametrize(
    "sigmas", [[], [1.0], [0.5, 1.0], [1.0, 0.5, 0.5], [1.5, 0.0], [1.0, -0.1], [1.0, float("nan")]]
)
def test_sigmas_that_do_not_descend_within_0_and_1_are_quoted(solver, sigmas):
    with pytest.raises(ValueError, match=r"sigmas \[.*\] are not a descending sequence"):
        solver(exact_denoiser(mixture_data(2)), normal(3, 2), sigmas)


@pytest.mark.parametrize("solver", [sample_gm_ode, sample_gm_sde])
def test_other_bad_arguments_are_quoted(solver):
    with pytest.raises(ValueError, match="order is 3"):
        solver(exact_denoiser(mixture_data(2)), normal(3, 2), [1.0, 0.0], order=3)
    with pytest.raises(ValueError, match="substeps is 0"):
        sample_gm_ode(exact_denoiser(mixture_data(2)), normal(3, 2), [1.0, 0.0], substeps=0)


# The reference's runs


def toy_network():
    figures = golden("toy_mlp")
    network = GMFlowMLP(
        GMFlowMLPConfig(num_components=64, embed_dim=32, hidden_dim=32, num_layers=3)
    )
    network.load_state_dict(
        {name.removeprefix("model."): t for name, t in figures.items() if name.startswith("model.")}
    )
    return network.requires_grad_(False), figures


def test_golden_toy_network():
    network, figures = toy_network()
    out = network(figures["x"], figures["t"] / 1000)
    # float32 positions are known to 1e-5 of the shortest period, and 1000 * (t / 1000) is t to 3e-5
    assert is_near(out.means, figures["out.means"], 3e-5)
    assert is_near(out.log_weights, figures["out.logweights"], 3e-5)
    assert is_near(out.log_std, figures["out.logstds"], 3e-5)
    assert is_near(nll(out, figures["u"]), figures["nll"], 3e-5)


@pytest.mark.parametrize(
    ("run", "least", "most"), [("ode1", 0, 1e-3), ("ode2", 0, 1e-2), ("sde2", 0.05, 0.5)]
)
def test_golden_toy_runs_within_their_sensitivity_to_rounding(run, least, most):
    network, figures = toy_network()
    recorded = figures["sde2.inds"].long(), figures["sde2.comp_noise"], figures["sde2.sde_noise"]
    draws = [Draws(*step) for step in zip(*recorded, strict=True)]

    def sample(x):
        if run == "sde2":
            return sample_gm_sde(denoiser_of(network), x, flow_sigmas(4), noise=draws)
        return sample_gm_ode(
            denoiser_of(network), x, flow_sigmas(4), order=int(run[-1]), substeps=3
        )

    x = figures["sde2.noise"].flatten(1)
    out = sample(x)
    sensitivity = max(
        (sample(x * (1 + 1e-7 * normal(7, 2, seed=seed))) - out).abs().max().item()
        for seed in range(8)
    )
    assert least <= sensitivity <= most
    assert (out - figures[f"{run}.out"].flatten(1)).abs().max() <= 2 * sensitivity


@pytest.mark.parametrize("method", ["plain", "tiled"])
@pytest.mark.parametrize("solver", [*SOLVERS])
def test_a_step_waits_for_no_gpu(solver, method, monkeypatch):
    """By construction: on a CPU nothing waits, but the same operations are dispatched."""
    monkeypatch.setenv("GMFLOW_METHOD", method)
    velocity, mean = random_mixture(), normal(2, 3, 2, 3)

    def denoiser(x, sigma):
        return probabilistic_guidance(
            velocity_to_x0(velocity, x, sigma), velocity_to_x0(mean, x, sigma), 0.3
        )

    with Waits(WAITING + COPYING) as waits:
        solve(
            solver,
            denoiser,
            normal(2, 3, 2, 3),
            [1.0, 0.7, 0.4, 0.0],
            substeps=8,
            shift=2.0,
            noise=torch.Generator(),
        )
    assert waits.found == []


@pytest.mark.parametrize(
    ("spacing", "expected"), [("time", shift_time(0.75, 3.0)), ("sigma", 0.5 * (1 + 0.75))]
)
def test_gm_odes_substeps_are_even_in_unshifted_time_or_in_sigma(spacing, expected):
    """Even in time, as in the reference: half-way between t = 1 and 0.5 lies t = 0.75."""
    seen, mixture = [], random_mixture()
    sample_gm_ode(
        lambda x, sigma: mixture,
        normal(2, 3, 2, 3),
        flow_sigmas(2, shift=3.0),
        substeps=2,
        shift=3.0,
        spacing=spacing,
        constrain=lambda x, sigma: seen.append(float(sigma.flatten()[0])) or x,
    )
    assert seen[0] == pytest.approx(expected)
    with pytest.raises(ValueError, match="spacing is 'even'"):
        sample_gm_ode(lambda x, sigma: mixture, normal(2, 3, 2, 3), [1.0, 0.0], spacing="even")


def test_the_registry_names_the_settings_of_each_solver_and_refuses_others():
    assert SOLVERS["gm-ode"].settings == {"order", "substeps", "shift", "spacing"}
    assert SOLVERS["euler"].settings == frozenset()
    assert [name for name, solver in SOLVERS.items() if not solver.needs_mixture] == [
        "euler",
        "dpmpp-2m",
        "uni-pc",
    ]
    mixture = random_mixture()
    with pytest.raises(TypeError, match="no solver has the settings substep"):
        solve("euler", lambda x, sigma: mixture, normal(2, 3, 2, 3), [1.0, 0.0], substep=3)
