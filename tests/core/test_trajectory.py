"""Trajectories of every solver: where they begin and end, and what lies between."""

import math

import pytest
import torch

from gmflow_core import (
    GaussianMixture,
    Trajectory,
    flow_sigmas,
    sample_gm_ode,
    sample_gm_policy,
)
from gmflow_core.sampling.solvers import SOLVERS, solve
from tests.core.test_solvers import exact_denoiser, matched_denoiser, mixture_data
from tests.helpers import F64, is_near, normal

EVERY = [True, "step", "substep"]


def run(solver, **settings):
    noise = torch.Generator().manual_seed(2)
    x, sigmas = normal(20, 2), flow_sigmas(3, shift=2.0)
    denoiser = matched_denoiser(mixture_data(2))
    return solve(solver, denoiser, x, sigmas, substeps=4, shift=2.0, noise=noise, **settings)


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("solver", SOLVERS)
def test_it_goes_from_the_noise_to_the_result_and_changes_nothing(solver, every):
    expected, (x, trajectory) = run(solver), run(solver, return_trajectory=every)
    assert isinstance(trajectory, Trajectory)
    assert is_near(x, expected, 1e-5 if every == "substep" else 0)  # its rollout is the definition
    assert torch.equal(trajectory.x[0], normal(20, 2))
    assert torch.equal(trajectory.x[-1], x)
    assert len(trajectory.sigmas) == len(trajectory.x)
    assert len(trajectory.x0) == 3
    if every != "substep":
        assert torch.equal(trajectory.sigmas, flow_sigmas(3, shift=2.0))


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("solver", SOLVERS)
def test_its_means_are_the_denoisers_at_its_states(solver, every):
    """Of first order, since the second-order correction changes what GM-ODE and GM-SDE follow."""
    _, trajectory = run(solver, return_trajectory=every, order=1)
    denoiser = matched_denoiser(mixture_data(2))
    for sigma, x0 in zip(flow_sigmas(3, shift=2.0)[:-1], trajectory.x0, strict=True):
        index = (trajectory.sigmas - sigma).abs().argmin()
        mean = denoiser(trajectory.x[index], trajectory.sigmas[index].expand(20)).mean()
        assert is_near(x0, mean, 1e-5)


def test_substeps_are_those_of_shorter_runs():
    """With the exact mixture neither network calls nor order matter: 2 x 3 substeps are 6 steps."""
    denoiser, x = exact_denoiser(mixture_data(2)), normal(20, 2, dtype=F64)
    _, coarse = sample_gm_ode(
        denoiser, x, flow_sigmas(2), order=1, substeps=3, return_trajectory="substep"
    )
    _, fine = sample_gm_ode(
        denoiser, x, flow_sigmas(6), order=1, substeps=1, return_trajectory=True
    )
    assert torch.allclose(coarse.sigmas, fine.sigmas, atol=1e-7)
    assert is_near(coarse.x, fine.x, 1e-6)


def test_fresh_noise_is_a_state_of_its_own():
    data, noise = mixture_data(2), torch.Generator().manual_seed(0)
    _, trajectory = sample_gm_policy(
        exact_denoiser(data),
        normal(20_000, 2),
        [1.0, 0.5, 0.0],
        temperature=1.0,
        stochasticity=1.0,
        noise=noise,
        return_trajectory="substep",
    )
    rises = (trajectory.sigmas.diff() > 0).nonzero().flatten() + 1
    assert trajectory.sigmas[rises].tolist() == [0.5]
    spread = (0.25 * data.covariance()[0].diagonal() + 0.25).sqrt()  # of the path at 0.5
    assert torch.allclose(trajectory.x[rises[0]].std(0).double(), spread, rtol=0.03)


@pytest.mark.parametrize("every", EVERY)
def test_hooks_of_the_caller_are_called_too(every):
    calls, known = [], torch.full((20, 2), 0.3)
    x, trajectory = run(
        "gm-ode",
        return_trajectory=every,
        callback=lambda step, x, x0: calls.append(step),
        constrain=lambda x, sigma: torch.where(torch.arange(20)[:, None] < 5, known, x),
    )
    assert calls == [0, 1, 2]
    assert (trajectory.x[1:, :5] == 0.3).all()
    assert torch.equal(x[:5], known[:5])
    assert not (x[5:] == 0.3).any()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("stochasticity", [0.0, 0.7])
def test_a_blend_with_an_original_is_one_of_what_is_predicted(solver, stochasticity):
    """Half of a step to the point c, and half of one to 0, make one step to c / 2."""

    def blend(start, sigma, x, sigma_end):
        return x / 2 + start * (sigma_end / sigma) / 2

    def found(point, **hooks):
        noise = torch.Generator().manual_seed(1)
        about = {"noise": noise, "stochasticity": stochasticity, "return_trajectory": "substep"}

        def denoiser(x, sigma):
            return GaussianMixture.point_mass(torch.full_like(x, point))

        sigmas = flow_sigmas(4, shift=1.3).tolist()  # of which float32 has none
        return solve(solver, denoiser, normal(20, 2), sigmas, **about, **hooks)

    (x, path), (half, expected) = found(2.0, blend=blend), found(1.0)
    assert is_near(x, half, 1e-5)
    assert torch.equal(path.x[-1], x)
    if solver in ("gm-ode", "gm-policy"):  # in the substeps x goes to the point itself
        levels = flow_sigmas(4, shift=1.3)
        ends = (path.sigmas[:, None] - levels).abs().argmin(0)
        assert is_near(path.x[ends], expected.x[ends], 1e-5)
    else:
        assert is_near(path.x, expected.x, 1e-5)


def test_the_velocity_along_a_fine_trajectory_is_the_one_between_its_states():
    data, x = mixture_data(1, components=1), normal(20, 1, dtype=F64)
    _, path = solve("euler", exact_denoiser(data), x, flow_sigmas(2000), return_trajectory=True)
    mean, std = data.means[0, 0], 0.4
    scale = ((1 - path.sigmas) ** 2 * std**2 + path.sigmas**2).sqrt().reshape(-1, 1, 1)
    exact = (1 - path.sigmas).reshape(-1, 1, 1) * mean + scale * x  # quantiles keep their place
    assert is_near(path.x, exact, 2e-3)
    assert math.isclose(path.sigmas[-1].item(), 0)


def test_other_words_are_quoted():
    with pytest.raises(ValueError, match="return_trajectory is 'all'"):
        run("euler", return_trajectory="all")
