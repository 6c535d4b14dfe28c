"""Training losses against a direct float64 computation, their limits, and golden figures."""

import math

import pytest
import torch

from gmflow_core import GaussianMixture, forward_transition, nll, transition_nll, velocity_to_x0
from gmflow_core.flow.losses import MIN_STD
from gmflow_core.gaussians import density
from tests.helpers import F64, SPACES, cast, golden, golden_mixture, is_near, normal, random_mixture


def direct_transition_nll(velocity, x_low, x_high, low, high):
    """Compute the loss from the path's definition: x_low is Gaussian given x_0 and x_high."""
    low, high = (s.reshape(-1, *[1] * (x_low.ndim - 1)) for s in (low, high))
    gain = low.square() * (1 - high) / (1 - low) / high.square()
    slope = (1 - low) - gain * (1 - high)
    var = low.square() - gain * low.square() * (1 - high) / (1 - low)
    log_likelihood = []
    for k in range(velocity.means.shape[1]):
        mean = gain * x_high + slope * (x_high - high * velocity.means[:, k])
        total = var + (slope * high * velocity.log_std[:, 0].exp()).square()
        log_likelihood.append(
            velocity.log_weights[:, k]
            - 0.5 * ((x_low - mean).square() / total + total.log()).sum(1, keepdim=True)
        )
    return -torch.stack(log_likelihood).logsumexp(0).squeeze(1)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("components", [1, 4])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9, 1.0])
def test_transition_nll_agrees_with_a_direct_computation(space, components, ratio):
    velocity = random_mixture(components=components, space=space, dtype=F64)
    high = torch.tensor([0.95, 0.2], dtype=F64)
    low = (1 - ratio) * high
    x_low, noise = normal(2, 3, *space, dtype=F64), normal(2, 3, *space, seed=2, dtype=F64)
    x_high = forward_transition(x_low, low, high, noise)
    expected = direct_transition_nll(velocity, x_low, x_high, low, high)
    assert is_near(transition_nll(velocity, x_low, x_high, low, high), expected, 1e-11)
    single = transition_nll(
        cast(velocity, torch.float32), *(t.float() for t in (x_low, x_high, low, high))
    )
    assert is_near(single.double(), expected, 1e-5)


def test_down_to_sigma_0_the_transition_loss_is_the_nll_of_x0():
    velocity, x0, noise, sigma = (
        random_mixture(),
        normal(2, 3, 2, 3),
        normal(2, 3, 2, 3, seed=2),
        torch.tensor([0.9, 0.3]),
    )
    x = forward_transition(x0, 0.0, sigma, noise)
    found = transition_nll(velocity, x0, x, 0.0, sigma)
    assert is_near(found, nll(velocity_to_x0(velocity, x, sigma), x0), 1e-6)
    # x_0 is the velocity, scaled by sigma: a change of variables
    assert is_near(
        found,
        nll(velocity, (x - x0) / sigma.reshape(2, 1, 1, 1)) + 3 * sigma.log().reshape(2, 1, 1),
        1e-5,
    )


def test_with_one_component_of_unit_variance_the_nll_is_half_the_squared_error():
    velocity, target = random_mixture(components=1), normal(2, 3, 2, 3)
    velocity = GaussianMixture(
        velocity.means, torch.zeros_like(velocity.log_weights), torch.zeros_like(velocity.log_std)
    )
    assert is_near(
        nll(velocity, target), 0.5 * (target - velocity.means[:, 0]).square().sum(1), 1e-6
    )


def test_a_standard_deviation_counts_as_at_least_1e_4():
    mixture = random_mixture(components=1, dtype=F64)
    narrow = GaussianMixture(
        mixture.means, mixture.log_weights, torch.full_like(mixture.log_std, -30)
    )
    target = mixture.means[:, 0] + 1e-4
    assert is_near(
        nll(narrow, target), torch.full((2, 2, 3), 3 * (0.5 + math.log(1e-4)), dtype=F64), 1e-9
    )


@pytest.mark.parametrize("ratio", ["0.5", "0.9", "1.0"])
def test_golden_losses_and_gradients(ratio):
    figures, recorded = golden("losses"), golden_mixture("losses", "gm_u")
    leaves = [
        t.clone().requires_grad_() for t in (recorded.means, recorded.log_weights, recorded.log_std)
    ]
    low, high = figures[f"r{ratio}.t_low"] / 1000, figures["t_high"] / 1000
    x_low, x_high = figures[f"r{ratio}.x_t_low"], figures[f"r{ratio}.x_t_high"]
    assert is_near(forward_transition(x_low, low, high, figures["noise_1"]), x_high)
    loss = transition_nll(GaussianMixture(*leaves), x_low, x_high, low, high).mean()
    if (
        ratio == "1.0"
    ):  # the reference floors the bridge's variance at 1e-6, which counts where it is 0
        x0 = velocity_to_x0(GaussianMixture(*leaves), x_high, high)
        floored = nll(
            GaussianMixture(x0.means, x0.log_weights, 0.5 * (x0.var + 1e-6).log()), x_low
        ).mean()
        assert abs(loss - floored) < 0.004
        loss = floored
    channels = x_low.shape[1]
    per_channel = loss / channels + 0.5 * math.log(
        2 * math.pi
    )  # the newer reference's normalisation
    assert is_near(loss.detach().reshape(1), figures[f"r{ratio}.lossA"])
    assert is_near(per_channel.detach().reshape(1), figures[f"r{ratio}.lossB"])
    per_channel.backward()
    for leaf, name in zip(leaves, ("means", "logweights", "logstds"), strict=True):
        assert is_near(
            leaf.grad, figures[f"r{ratio}.gradB.{name}"], 4e-6
        )  # the figures are that far from float64's


def test_a_wild_prediction_costs_much_but_stays_finite():
    """A network's spike, seen in training: log-std 91, whose variance no float32 holds."""
    log_std = torch.full((1, 1, 1), 91.0, requires_grad=True)
    velocity = GaussianMixture(
        torch.full((1, 2, 2), 1448.0), torch.full((1, 2, 1), math.log(0.5)), log_std
    )
    loss = transition_nll(velocity, torch.zeros(1, 2), torch.ones(1, 2), 0.0058, 0.058)
    loss.sum().backward()
    assert 100 < loss.item() < 200
    assert log_std.grad.item() == pytest.approx(2, rel=1e-3)


# The same in little memory


def leaves_of(mixture):
    return [
        t.clone().requires_grad_() for t in (mixture.means, mixture.log_weights, mixture.log_std)
    ]


def per_pixel(mixture):
    """With a log-std for each pixel."""
    log_std = mixture.log_std + 0.3 * normal(
        len(mixture.means), 1, 1, *mixture.means.shape[3:], dtype=mixture.means.dtype
    )
    return GaussianMixture(mixture.means, mixture.log_weights, log_std)


@pytest.mark.parametrize("space", [(), (2,), (2, 1)])
@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("large", [False, True])
def test_all_gradients_of_the_density_and_theirs(space, components, large, monkeypatch):
    monkeypatch.setattr(density, "LARGE", 0 if large else 2**18)
    mixture = per_pixel(random_mixture(components=components, space=space, dtype=F64))
    x, gain = normal(2, 3, *space, dtype=F64), normal(2, 1, 1, *[1] * len(space), seed=2, dtype=F64)
    for point, factor in ((x, None), (x.clone().requires_grad_(), gain.requires_grad_())):
        arguments = (point, *leaves_of(mixture), factor)
        assert torch.autograd.gradcheck(density.log_density, arguments)
        assert torch.autograd.gradgradcheck(density.log_density, arguments)


@pytest.mark.parametrize("shape", [(4100, 32, 2), (45, 8, 3, 16, 16), (257, 1, 4, 16, 16)])
@pytest.mark.parametrize("std", [1.0, 0.01])
def test_large_tensors_have_the_loss_and_gradients_of_the_direct_computation(shape, std):
    batch, components, channels, *space = shape
    velocity = random_mixture(0, batch, components, channels, space, dtype=F64)
    velocity = per_pixel(
        GaussianMixture(velocity.means, velocity.log_weights, velocity.log_std + math.log(std))
    )
    assert velocity.means.numel() >= density.LARGE
    high = torch.linspace(0.05, 0.95, batch, dtype=F64)
    low = 0.5 * high
    x_low, noise = (normal(batch, channels, *space, seed=seed, dtype=F64) for seed in (1, 2))
    x_high = forward_transition(x_low, low, high, noise)
    leaves, singles = leaves_of(velocity), leaves_of(cast(velocity, torch.float32))
    expected = direct_transition_nll(GaussianMixture(*leaves), x_low, x_high, low, high)
    found = transition_nll(
        GaussianMixture(*singles), *(t.float() for t in (x_low, x_high, low, high))
    )
    assert is_near(found.double(), expected, 1e-5)
    gradients = (
        torch.autograd.grad(loss.mean(), inputs)
        for loss, inputs in ((found, singles), (expected, leaves))
    )
    for single, double in zip(*gradients, strict=True):
        assert is_near(single.double(), double, 1e-4)


def test_nothing_as_large_as_the_means_is_kept_for_the_backward_pass():
    velocity = GaussianMixture(
        *leaves_of(random_mixture(batch=16, components=8, channels=8, space=(16, 16)))
    )
    high, x = torch.full((16,), 0.5), normal(16, 8, 16, 16)
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t
    ):
        transition_nll(velocity, x, x, 0.5 * high, high)
    kept.pop(velocity.means.data_ptr())
    assert (
        sum(kept.values()) < 0.5 * velocity.means.numel()
    )  # the plain form keeps two more of them


def test_below_the_least_standard_deviation_it_has_no_gradient():
    mixture = random_mixture(batch=2, components=1, space=())
    log_std = torch.tensor([0.5, 2.0]).mul(MIN_STD).log().reshape(2, 1, 1).requires_grad_()
    nll(
        GaussianMixture(mixture.means, mixture.log_weights, log_std), mixture.means[:, 0]
    ).sum().backward()
    assert log_std.grad.flatten().tolist() == [0.0, pytest.approx(3)]


@pytest.mark.parametrize("large", [False, True])
def test_the_loss_can_be_compiled_and_runs_under_autocast(large, monkeypatch):
    """Traced forwards and backwards, without a compiler for the code."""
    monkeypatch.setattr(density, "LARGE", 0 if large else 2**18)
    velocity, x, high = random_mixture(), normal(2, 3, 2, 3), torch.tensor([0.4, 0.8])

    def loss_of(*leaves):
        return transition_nll(GaussianMixture(*leaves), x, 0.5 * x, 0.3 * high, high).mean()

    expected = torch.autograd.grad(loss_of(*(leaves := leaves_of(velocity))), leaves)
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        cast_ = torch.autograd.grad(loss_of(*(leaves := leaves_of(velocity))), leaves)
    traced = torch.autograd.grad(compiled(*(leaves := leaves_of(velocity))), leaves)
    for one, two, three in zip(expected, cast_, traced, strict=True):
        assert torch.equal(one, two)
        assert is_near(three, one, 1e-5)
