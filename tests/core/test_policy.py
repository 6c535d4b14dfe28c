"""Policies and their sampler: closed forms, and figures of LakonLab's policies and FlowMapSDE."""

import itertools
import math

import pytest
import torch

from gmflow_core import (
    DXVelocity,
    GaussianMixture,
    flow_sigmas,
    predict_x0,
    rollout,
    sample_gm_ode,
    sample_gm_policy,
    shift_time,
    unshift_time,
)
from gmflow_core.sampling.solvers import SOLVERS, solve
from tests.core.test_solvers import exact_denoiser, mixture_data
from tests.helpers import F64, golden, golden_mixture, is_near, normal, random_mixture

SHIFT = 3.2  # of the recorded runs


def recorded_policy(sample):
    """Return the recorded GM policy of one sample, and the place where it starts."""
    figures = golden("policies")
    x, sigma = figures["x_src"], figures["sigma_src"]
    mixture = predict_x0(golden_mixture("policies", "denoising_output"), x, sigma)
    one = slice(sample, sample + 1)
    return (
        GaussianMixture(mixture.means[one], mixture.log_weights[one], mixture.log_std[one]),
        x[one],
        sigma[one],
    )


@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize(("case", "total"), [("int", 128), ("int0", 32)])
def test_golden_rollouts(case, total, sample):
    figures = golden("policies")
    policy, x, sigma = recorded_policy(sample)
    start = figures["int.raw_start"][sample]
    end = figures["int.raw_end"][sample] if case == "int" else torch.tensor(0.0)
    substeps = math.ceil(
        (start - end) * total
    )  # the reference rounds up here, and to the nearest elsewhere
    result = rollout(policy, x, sigma, shift_time(end.reshape(1), SHIFT), substeps, shift=SHIFT)
    assert is_near(result, figures[f"{case}.x_end"][sample : sample + 1], 4e-6)


@pytest.mark.parametrize("sample", [0, 1])
def test_golden_dx_rollouts(sample):
    figures = golden("policies")
    one = slice(sample, sample + 1)
    x, sigma, start, end = (
        figures[name][one] for name in ("x_src", "sigma_src", "int.raw_start", "int.raw_end")
    )
    policy = predict_x0(DXVelocity(figures["dx.out"][one], shift=SHIFT), x, sigma)
    result = rollout(
        policy, x, sigma, shift_time(end, SHIFT), math.ceil((start - end) * 128), shift=SHIFT
    )
    assert is_near(result, figures["dx.int.x_end"][one], 8e-6)


@pytest.mark.parametrize("mode", ["grid", "polynomial"])
@pytest.mark.parametrize(("segment_size", "shift"), [(1.0, 1.0), (0.25, 3.2)])
@pytest.mark.parametrize("fraction", [1.0, 0.9, 0.5, 0.05])
def test_golden_dx_velocities(mode, segment_size, shift, fraction):
    figures = golden("policies")
    x_src, sigma = figures["x_src"], fraction * figures["sigma_src"]
    policy = predict_x0(
        DXVelocity(figures["dx.out"], segment_size, shift, mode), x_src, figures["sigma_src"]
    )
    x = x_src if fraction == 1 else x_src * (0.5 + 0.5 * fraction) + 0.1 * figures["pert"]
    velocity = (x - policy.at(sigma)) / sigma.reshape(-1, 1, 1, 1)
    assert is_near(velocity, figures[f"dx.{mode}.seg{segment_size}.shift{shift}.f{fraction}.u"])


@pytest.mark.parametrize("mode", ["grid", "polynomial"])
def test_a_dx_policy_starts_with_its_mean_velocity_and_moves_as_a_whole(mode):
    x, sigma, by = normal(2, 3, 4, 4), torch.tensor([0.9, 0.6]), normal(2, 3, 4, 4, seed=5)
    velocity = DXVelocity(normal(2, 5, 3, 4, 4, seed=2), 0.5, 2.0, mode)
    policy = predict_x0(velocity, x, sigma)
    assert is_near(policy.mean(), x - sigma.reshape(-1, 1, 1, 1) * velocity.mean())
    assert is_near(policy.at(sigma), policy.mean())
    for later in (0.5, 0.3):
        assert is_near(policy.moved(by).at(later), policy.at(later) + by)
    halves = [
        predict_x0(part, x[i : i + 1], sigma[i : i + 1]) for i, part in enumerate(velocity.chunk(2))
    ]
    assert is_near(torch.cat([half.at(0.4) for half in halves]), policy.at(0.4))


@pytest.mark.parametrize(
    ("case", "steps", "final", "shift"), [(0, 4, 0.5, 3.2), (1, 8, 0.5, 3.2), (2, 4, 1.0, 1.0)]
)
def test_golden_time_grids(case, steps, final, shift):
    assert is_near(
        flow_sigmas(steps, shift, final_step_size=final),
        golden("schedulers")[f"flowmap{case}.sigmas"],
    )


def test_golden_time_shift():
    figures = golden("schedulers")
    assert is_near(shift_time(figures["warp.raw"], SHIFT), figures["warp.sigma"])
    assert is_near(unshift_time(figures["warp.sigma"], SHIFT), figures["warp.unwarped"])


@pytest.mark.parametrize(("case", "stochasticity"), [(0, 0.0), (1, 0.0), (2, 0.7)])
def test_golden_steps_of_the_flow_map_sde(case, stochasticity):
    """Take one recorded step, with a policy that leads to the recorded destination."""
    figures = golden("schedulers")
    x, destination, sigmas = figures["x"], figures["m"], figures[f"flowmap{case}.sigmas"][1:3]
    ratio = figures[f"flowmap{case}.timesteps_dst"][1] / 1000 / sigmas[0]
    policy = GaussianMixture.point_mass((destination - ratio * x) / (1 - ratio))
    settings = {"stochasticity": stochasticity, "noise": torch.Generator().manual_seed(3)}
    result = sample_gm_policy(lambda x, sigma: policy, x, sigmas, **settings)
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    fresh = sigmas[1] * (1 - figures[f"flowmap{case}.m"][1].square()).clamp(min=0).sqrt()
    assert fresh == 0 or stochasticity > 0
    assert is_near(
        result - fresh * (drawn - figures["noise"]), figures[f"flowmap{case}.step1"], 1e-5
    )


@pytest.mark.parametrize("stochasticity", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shift", [1.0, 3.2])
def test_with_exact_policies_every_stochasticity_gives_the_data(stochasticity, shift):
    """An exact policy follows the exact flow: few steps give the moments of a 2-D mixture."""
    data, count = mixture_data(2), 10_000
    x = normal(count, 2, seed=7, dtype=F64)
    settings = {
        "stochasticity": stochasticity,
        "noise": torch.Generator().manual_seed(0),
        "temperature": 1.0,
    }
    result = sample_gm_policy(
        exact_denoiser(data), x, flow_sigmas(4, shift), substeps=96, shift=shift, **settings
    )
    error = 5 / math.sqrt(count)
    assert (result.mean(0) - data.mean()[0]).abs().max() < 3 * error
    assert (result.T.cov() - data.covariance()[0]).abs().max() < 10 * error


@pytest.mark.parametrize("stochasticity", [math.inf, 1e200, 100.0])
def test_without_bound_every_step_has_fresh_noise_only(stochasticity):
    """Each step goes to x_0 and back up; 100, the most in the nodes, is as good as infinity."""
    denoise, x, sigmas = exact_denoiser(mixture_data(2)), normal(9, 2, dtype=F64), flow_sigmas(3)
    settings = {"stochasticity": stochasticity, "noise": torch.Generator().manual_seed(3)}
    result = sample_gm_policy(denoise, x, sigmas, substeps=24, temperature=1.0, **settings)
    noise = torch.Generator().manual_seed(3)
    for substeps, (sigma, sigma_next) in zip((24, 16, 8), itertools.pairwise(sigmas), strict=True):
        x0 = rollout(denoise(x, sigma.expand(9)), x, float(sigma), 0.0, substeps)
        x = x0
        if sigma_next > 0:
            drawn = torch.randn(9, 2, generator=noise)
            x = (1 - sigma_next.double()) * x0 + sigma_next.double() * drawn
    assert is_near(result, x, 1e-6)


def test_without_temperature_and_shift_it_is_gm_ode_of_first_order():
    data, x = mixture_data(2), normal(9, 2, dtype=F64)
    policy = sample_gm_policy(exact_denoiser(data), x, flow_sigmas(4), substeps=32, temperature=1.0)
    assert is_near(
        policy, sample_gm_ode(exact_denoiser(data), x, flow_sigmas(4), order=1, substeps=8), 1e-12
    )


def test_the_temperature_sharpens_all_steps_but_the_last():
    data, x, sigmas = mixture_data(2), normal(9, 2, dtype=F64), flow_sigmas(3)
    denoise = exact_denoiser(data)

    def cooled(x, sigma):
        mixture = denoise(x, sigma)
        return mixture.with_temperature(0.2) if sigma[0] > 0.4 else mixture  # sigmas 1, 2/3, 1/3

    automatic = sample_gm_policy(denoise, x, sigmas)  # 0.1 (3 - 1)
    assert is_near(automatic, sample_gm_policy(cooled, x, sigmas, temperature=1.0), 1e-12)
    assert (automatic - sample_gm_policy(denoise, x, sigmas, temperature=1.0)).abs().max() > 0.01


def test_a_split_run_sharpens_as_the_whole_one():
    """With a given temperature, splitting the sigmas over two calls changes nothing."""
    denoise, x, sigmas = exact_denoiser(mixture_data(2)), normal(9, 2, dtype=F64), flow_sigmas(4)
    settings = {"temperature": 0.3, "substeps": 32}
    first = sample_gm_policy(denoise, x, sigmas[:3], **settings)
    assert is_near(
        sample_gm_policy(denoise, first, sigmas[2:], **settings),
        sample_gm_policy(denoise, x, sigmas, **settings),
        1e-9,
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_of_mixtures_refuse_a_dx_policy(solver):
    noise, out = normal(2, 3, 4, 4), DXVelocity(normal(2, 5, 3, 4, 4, seed=2), 0.5)
    sampled = solver, lambda x, sigma: predict_x0(out, x, sigma), noise, [1.0, 0.5, 0.0]
    if SOLVERS[solver].takes_policies:
        assert solve(*sampled).isfinite().all()
        return
    with pytest.raises(
        ValueError, match="needs a mixture, and the model predicts a DX policy; use"
    ):
        solve(*sampled, noise=torch.Generator())


def test_a_dx_policy_is_followed_and_knows_no_temperature():
    x, sigmas = normal(2, 3, 4, 4), flow_sigmas(3, SHIFT)
    velocity, seen = DXVelocity(normal(2, 5, 3, 4, 4, seed=2), 0.4, SHIFT), []

    def denoise(x, sigma):
        return predict_x0(velocity, x, sigma)

    def callback(step, x, x0):
        seen.append((step, x, x0))

    result = sample_gm_policy(
        denoise, x, sigmas, substeps=24, shift=SHIFT, temperature=0.2, callback=callback
    )
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        policy = denoise(x, sigma.expand(2))
        assert seen[step][0] == step
        assert is_near(seen[step][1], x)
        assert is_near(seen[step][2], policy.mean())
        x = rollout(policy, x, float(sigma), float(sigma_next), 8, shift=SHIFT)
    assert is_near(result, x)


@pytest.mark.parametrize("start", [1.0, 0.6])
def test_grids_begin_where_they_are_asked_to(start):
    sigmas = flow_sigmas(3, SHIFT, start=start, final_step_size=0.5)
    expected = torch.tensor([1.0, 0.6, 0.2, 0.0]) * start
    assert is_near(sigmas, shift_time(expected, SHIFT))


def test_a_step_gets_its_share_of_the_substeps_and_constrain_sees_all():
    seen = []

    def constrain(x, sigma):
        seen.append(sigma.flatten()[0].item())
        return x

    policy = random_mixture(batch=1)
    sigmas = flow_sigmas(4, SHIFT, final_step_size=0.5)
    x = normal(1, 3, 2, 3)
    settings = {"substeps": 128, "shift": SHIFT, "constrain": constrain}
    sample_gm_policy(lambda x, sigma: policy, x, sigmas, **settings)
    assert len(seen) == 37 + 37 + 37 + 18
    assert seen == sorted(seen, reverse=True)
    times = unshift_time(torch.tensor(seen, dtype=F64), SHIFT)
    assert is_near(times[:36].diff(), torch.full((35,), -1 / 3.5 / 37, dtype=F64), 1e-4)
    seen.clear()
    sample_gm_policy(lambda x, sigma: policy, x, sigmas, stochasticity=1.0, **settings)
    assert [
        s for s in seen if any(abs(s - end) < 1e-6 for end in sigmas[1:-1].tolist())
    ]  # after the noise too


def test_what_does_not_fit_is_quoted():
    def denoise(x, sigma):
        return random_mixture(batch=1)

    x = normal(1, 3, 2, 3)
    for settings, message in (
        ({"temperature": 0.0}, r"temperature 0\.0"),
        ({"temperature": 1.5}, r"temperature 1\.5"),
        ({"stochasticity": -1.0}, r"stochasticity -1\.0"),
        ({"substeps": 0}, "substeps is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_gm_policy(denoise, x, flow_sigmas(2), **settings)
    with pytest.raises(ValueError, match="mode 'spline'"):
        DXVelocity(x.unsqueeze(1), mode="spline")
    with pytest.raises(ValueError, match=r"segment_size 2\.0"):
        DXVelocity(x.unsqueeze(1), segment_size=2.0)
    with pytest.raises(ValueError, match=r"final_step_size is 0"):
        flow_sigmas(4, final_step_size=0)
    with pytest.raises(ValueError, match=r"start is 1\.2"):
        flow_sigmas(4, start=1.2)
