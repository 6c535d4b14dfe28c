"""ArcFlow's policy: closed forms, and figures of its own code.

tests/golden/arcflow.safetensors holds what the code of ArcFlow (pnotp/ArcFlow, commit 4294909)
gives on random inputs, in float32 on a CPU: heads of its Qwen-Image and FLUX transformers,
velocities and integrals between two times, and whole runs with 2 and 3 network calls. It takes
|g d| below 1e-4 as 1e-4, which is 5e-5 of a component's displacement; ours is exact.
"""

import pytest
import torch

from gmflow_core import (
    ArcVelocity,
    flow_sigmas,
    predict_x0,
    rollout,
    sample_euler,
    sample_gm_policy,
)
from gmflow_core.flow.following import follow
from gmflow_core.models.adapter_heads import ArcHead, HeadLayout, build_head
from tests.helpers import F64, golden, is_near, normal

SHIFT = 3.2  # of the recorded runs


def random_velocity(seed=0, rate=2.0, dtype=F64):
    """Return a random velocity of 4 components for (2, 3, 4, 5)."""
    return ArcVelocity(
        normal(2, 4, 3, 4, 5, seed=seed, dtype=dtype),
        normal(2, 4, 1, 4, 5, seed=seed + 1, dtype=dtype).log_softmax(1),
        rate * normal(2, 3, 1, 4, 5, seed=seed + 2, dtype=dtype),
    )


def recorded_policy():
    figures = golden("arcflow")
    velocity = ArcVelocity(*(figures[name] for name in ("velocities", "log_weights", "rates")))
    return figures, velocity, predict_x0(velocity, figures["x"], figures["sigma"])


@pytest.mark.parametrize("case", ["whole", "first", "later", "tiny"])
def test_golden_velocities_and_integrals(case):
    figures, _, policy = recorded_policy()
    start, end = figures[f"{case}.sigma"], figures[f"{case}.sigma_end"]
    assert is_near(policy.velocity(start), figures[f"{case}.velocity"])
    assert is_near(policy.advance(figures["x"], start, end), figures[f"{case}.x_end"], 3e-5)


@pytest.mark.parametrize("steps", [2, 3])
def test_golden_runs(steps):
    figures, velocity, _ = recorded_policy()

    def denoise(x, sigma):
        moved = velocity.velocities + 0.1 * x.unsqueeze(1)  # as the recorded network
        return predict_x0(ArcVelocity(moved, velocity.log_weights, velocity.rates), x, sigma)

    result = sample_gm_policy(denoise, figures["x"], flow_sigmas(steps, SHIFT), shift=SHIFT)
    assert is_near(result, figures[f"run{steps}"], 3e-5)


@pytest.mark.parametrize("name", ["qwen", "flux"])
def test_golden_heads(name):
    figures, prefix = golden("arcflow"), f"{name}.head."
    tensors = {k.removeprefix(prefix): v for k, v in figures.items() if k.startswith(prefix)}
    head = build_head(tensors, {"type": "ArcFlow"}, HeadLayout(channels=16), 16)
    assert isinstance(head, ArcHead)
    tokens = head(figures[f"{name}.tokens"], figures[f"{name}.embedding"])
    velocity = head.to_image(tokens, (4, 6))
    assert is_near(velocity.velocities, figures[f"{name}.means"], 1e-5)
    assert is_near(velocity.log_weights, figures[f"{name}.logweights"], 1e-5)
    assert is_near(velocity.rates, figures[f"{name}.loggammas"], 1e-5)
    mean = head.layout.to_image(tokens.mean(), (4, 6))
    assert is_near(mean, velocity.mean(), 1e-5)


@pytest.mark.parametrize("rate", [0.0, 1e-12, 1e-6, 2.0, 9.0])
def test_the_closed_form_is_the_integral(rate):
    """Gauss-Legendre quadrature of 20 points, in float64; without rates it is one Euler step."""
    x, sigma = normal(2, 3, 4, 5, dtype=F64), torch.tensor([0.95, 0.6], dtype=F64)
    velocity = random_velocity(rate=rate)
    policy = predict_x0(velocity, x, sigma)
    start, end = torch.tensor([0.9, 0.6], dtype=F64), torch.tensor([0.1, 0.0], dtype=F64)
    orders = torch.arange(1, 20, dtype=F64)  # Golub-Welsch: nodes and weights from a Jacobi matrix
    jacobi = torch.diag(orders / (4 * orders.square() - 1).sqrt(), 1)
    nodes = torch.linalg.eigh(jacobi + jacobi.T)
    total = 0
    for place, weight in zip(nodes.eigenvalues, nodes.eigenvectors[0].square(), strict=True):
        between = end + (start - end) * (place + 1) / 2
        total = total + weight * policy.velocity(between)
    expected = x - (start - end).reshape(-1, 1, 1, 1) * total
    assert is_near(policy.advance(x, start, end), expected, 1e-12)
    if rate == 0:
        step = x - (start - end).reshape(-1, 1, 1, 1) * velocity.mean()
        assert is_near(policy.advance(x, start, end), step, 1e-14)


def test_vanishing_exponents_are_exact_in_float32():
    x, sigma = normal(2, 3, 4, 5), torch.tensor([0.9, 0.6])
    for rate in (0.0, 1e-30, 1e-9, 1e-5):
        wide = predict_x0(random_velocity(rate=rate), x.double(), sigma.double())
        policy = predict_x0(random_velocity(rate=rate, dtype=torch.float32), x, sigma)
        assert is_near(policy.advance(x, 0.6, 0.0), wide.advance(x.double(), 0.6, 0.0).float())


def test_many_substeps_tend_to_the_closed_form():
    """The rollout's definition, Euler steps of x_0 = x - sigma u, has this policy as its limit."""
    x, sigma = normal(2, 3, 4, 5, dtype=F64), 0.9
    policy = predict_x0(random_velocity(), x, sigma)
    errors = [
        (follow(policy, x, torch.linspace(sigma, 0.2, n + 1, dtype=F64).tolist()) - exact)
        .abs()
        .max()
        for n in (50, 100)
        for exact in [policy.advance(x, sigma, 0.2)]
    ]
    assert errors[1] < 0.05
    assert 1.9 < errors[0] / errors[1] < 2.1  # of first order


def test_it_starts_with_its_mean_velocity_and_moves_as_a_whole():
    x, by = normal(2, 3, 4, 5, dtype=F64), normal(2, 3, 4, 5, seed=9, dtype=F64)
    sigma, velocity = torch.tensor([0.9, 0.6], dtype=F64), random_velocity()
    policy = predict_x0(velocity, x, sigma)
    factor = sigma.reshape(-1, 1, 1, 1)
    assert is_near(policy.mean(), x - factor * velocity.mean(), 1e-14)
    assert is_near(policy.velocity(sigma), velocity.mean(), 1e-14)
    moved = policy.moved(by)
    assert is_near(moved.mean(), policy.mean() + by, 1e-14)
    for later in (0.5, 0.0):  # as a constant velocity -by / sigma_s on top
        expected = policy.advance(x, sigma, later) + by * (1 - later / factor)
        assert is_near(moved.advance(x, sigma, later), expected, 1e-14)
    halves = [
        predict_x0(part, x[i : i + 1], sigma[i : i + 1]) for i, part in enumerate(velocity.chunk(2))
    ]
    parts = [half.advance(x[i : i + 1], sigma[i : i + 1], 0.2) for i, half in enumerate(halves)]
    assert is_near(torch.cat(parts), policy.advance(x, sigma, 0.2), 1e-14)
    assert velocity.fits(x)
    assert not velocity.fits(x[..., :4])


def test_the_rollout_needs_no_substeps_and_asks_constraint_and_check_once():
    x, seen = normal(2, 3, 4, 5, dtype=F64), []
    policy = predict_x0(random_velocity(), x, 0.9)

    def constrain(x, sigma):
        seen.append(sigma.flatten()[0].item())
        return 2 * x

    exact = policy.advance(x, 0.9, 0.2)
    for substeps in (1, 64):
        assert torch.equal(rollout(policy, x, 0.9, 0.2, substeps), exact)
    checked = rollout(
        policy, x, 0.9, 0.2, 64, constrain=constrain, check=lambda: seen.append("check")
    )
    assert torch.equal(checked, 2 * exact)
    assert seen == [0.2, "check"]


def test_solvers_of_the_mean_follow_the_velocity_at_the_call():
    x, velocity = normal(2, 3, 4, 5, dtype=F64), random_velocity()
    result = sample_euler(lambda x, sigma: predict_x0(velocity, x, sigma), x, [1.0, 0.5, 0.0])
    assert is_near(result, x - velocity.mean(), 1e-12)
