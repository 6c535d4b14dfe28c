"""Knothe-Rosenblatt map and the quantiles of mixtures that it takes axis by axis."""

import math
from functools import partial

import pytest
import torch

from gmflow_core import GaussianMixture
from gmflow_core.fast.quantiles import quantile_by_sections
from gmflow_core.gaussians.quantile import mixture_quantile
from tests.helpers import (
    F64,
    SPACES,
    bisect,
    cast,
    golden,
    golden_mixture,
    is_near,
    normal,
    normal_score,
    random_mixture,
    repeated,
)


def rotate(x, axes):
    return torch.einsum("bchw,bhwcd->bdhw", x, axes.expand(-1, *x.shape[2:], -1, -1))


def slow_to_normal(mixture, x, axes):
    """`to_normal` of points (B, C) with axes (B, C, C), from its definition in float64."""
    mixture, x, axes = cast(mixture, F64), x.double(), axes.double()
    means, x = mixture.means @ axes, (x.unsqueeze(1) @ axes).squeeze(1)
    log_weights, scores = mixture.log_weights.squeeze(2), []
    for axis in range(x.shape[1]):
        offset = (x[:, axis : axis + 1] - means[:, :, axis]) / mixture.log_std.squeeze(2).exp()
        scores.append(normal_score(log_weights, offset))
        log_weights = log_weights - 0.5 * offset.square()
        log_weights = log_weights - log_weights.logsumexp(1, keepdim=True)
    return torch.stack(scores, 1)


def test_to_normal_follows_its_definition_far_into_the_tails():
    mixture = random_mixture(batch=200, space=(), dtype=F64)
    x, axes = 2.5 * normal(200, 3, dtype=F64), mixture.principal_axes()
    expected = slow_to_normal(mixture, x, axes)
    assert expected.abs().max() > 12
    assert is_near(mixture.to_normal(x, axes), expected, 1e-9)
    single = cast(mixture, torch.float32).to_normal(x.float(), axes.float()).double()
    assert is_near(
        single.clamp(-12, 12), expected.clamp(-12, 12), 3e-6
    )  # float32 has no probability below Phi(-12.9)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("per_pixel", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (F64, 1e-11)])
def test_from_normal_and_to_normal_invert_each_other(space, per_pixel, dtype, tolerance):
    mixture = random_mixture(batch=20, space=space, dtype=dtype)
    axes = mixture.principal_axes(per_pixel)
    z = 2 * normal(20, 3, *space, dtype=dtype)  # up to 7 standard deviations
    x = mixture.from_normal(z, axes)
    assert is_near(mixture.to_normal(x, axes), z, tolerance)
    assert is_near(mixture.from_normal(mixture.to_normal(x, axes), axes), x, tolerance)
    assert is_near(x, cast(mixture, F64).from_normal(z.double(), axes.double()), 3e-6)


def test_with_one_component_the_map_is_a_rotation_and_a_scale():
    mixture = random_mixture(components=1, dtype=F64)
    x, axes = normal(2, 3, 2, 3, dtype=F64), random_mixture(dtype=F64).principal_axes()
    expected = rotate((x - mixture.means[:, 0]) / mixture.log_std[:, 0].exp(), axes)
    assert is_near(mixture.to_normal(x, axes), expected, 1e-12)
    assert is_near(mixture.from_normal(expected, axes), x, 1e-12)


def test_samples_of_the_mixture_become_standard_normal():
    count = 50_000
    many = repeated(random_mixture(seed=2, batch=1, space=()), count)
    z = many.to_normal(many.sample(torch.Generator().manual_seed(0)))[0]  # (C, count)
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        noise = math.sqrt((math.prod(range(2 * power - 1, 0, -2)) - moment**2) / count)
        assert ((z**power).mean(1) - moment).abs().max() < 4 * noise
    assert (z.corrcoef() - torch.eye(3)).abs().max() < 4 / math.sqrt(count)
    assert ((z.square()).corrcoef() - torch.eye(3)).abs().max() < 4 / math.sqrt(
        count
    )  # no dependence of the spreads either


def test_gradients_of_the_map_agree_with_finite_differences():
    mixture = random_mixture(space=(), dtype=F64)
    axes, z = mixture.principal_axes(), normal(2, 3, dtype=F64)
    x = mixture.from_normal(z, axes)

    def mapped(method, means, logits, log_std, point):
        return method(GaussianMixture(means, logits.log_softmax(1), log_std), point, axes)

    for method, point in ((GaussianMixture.from_normal, z), (GaussianMixture.to_normal, x)):
        inputs = [
            t.clone().requires_grad_()
            for t in (mixture.means, mixture.log_weights, mixture.log_std, point)
        ]
        assert torch.autograd.gradcheck(partial(mapped, method), inputs)


@pytest.mark.parametrize(("components", "spread"), [(1, 1), (2, 1), (5, 5), (16, 30), (2, 300)])
def test_quantiles_agree_with_bisection(components, spread):
    shape = {"batch": 2000, "components": components, "channels": 1, "space": ()}
    mixture = random_mixture(seed=spread, **shape, spread=spread, dtype=F64)
    means, log_weights, std = (
        t.squeeze(2) for t in (mixture.means, mixture.log_weights, mixture.log_std.exp())
    )
    z = normal(2000, dtype=F64).clamp(-5, 5)

    def excess(x):
        offset = (x.unsqueeze(1) - means) / std
        side = torch.where(z < 0, 1.0, -1.0)
        tail = (log_weights + torch.special.log_ndtr(side.unsqueeze(1) * offset)).logsumexp(1)
        return side * (tail - torch.special.log_ndtr(side * z))

    exact = bisect(excess, means.amin(1) - 6, means.amax(1) + 6)
    # Where the density is p, the last digit of the probability moves the quantile by 1e-16 / p
    density = mixture.log_prob(exact.unsqueeze(1)).exp()
    quantile = mixture_quantile(means, std, log_weights, z)
    assert ((quantile - exact).abs() <= 1e-12 * (1 + exact.abs()) + 1e-15 / density).all()
    single = mixture_quantile(means.float(), std.float(), log_weights.float(), z.float()).double()
    score = normal_score(log_weights, (single.unsqueeze(1) - means) / std)
    rounding = 3e-6 + 3e-7 * (
        means.abs().amax(1) / std.squeeze(1)
    )  # the positions' own last digit, in standard deviations
    assert ((score - z).abs() <= rounding).all()


def hard_mixtures():
    """Means and log-weights (n, K) in standard deviations, and levels (n,)."""
    n, drawn, levels = 1000, partial(normal, dtype=F64), normal(1000, seed=3, dtype=F64)
    yield 1e4 * drawn(n, 64), drawn(n, 64, seed=2).log_softmax(1), levels  # far apart
    yield (
        30 * drawn(n, 8),
        (3 * drawn(n, 8, seed=2)).log_softmax(1),
        9 * torch.linspace(-1, 1, n, dtype=F64),
    )  # the tails
    yield (
        5 * drawn(n, 8),
        (-14 * drawn(n, 8, seed=2).sigmoid()).log_softmax(1),
        levels,
    )  # weights down to 1e-6
    two = torch.tensor([[-20.0, 20.0]], dtype=F64).expand(n, 2)
    yield (
        two,
        torch.full_like(two, 0.5).log(),
        levels.sign() * 10 ** (-6 * levels.abs().tanh()),
    )  # a gap
    for log_weight in (
        -86.0,
        -torch.inf,
    ):  # far from the rest and without weight, as after a coordinate is known
        means = torch.tensor([[-500.0, 500.0, 5000.0]], dtype=F64).expand(n, 3)
        yield (
            means,
            torch.tensor([[0.0, 0.0, log_weight]], dtype=F64).log_softmax(1).expand(n, 3),
            levels,
        )


@pytest.mark.parametrize("quantile", [mixture_quantile, quantile_by_sections])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_quantiles_of_hard_mixtures_converge(quantile, dtype):
    for case in hard_mixtures():
        means, log_weights, z = (each.to(dtype).double() for each in case)
        x = quantile(
            means.to(dtype), torch.ones(1, 1, dtype=dtype), log_weights.to(dtype), z.to(dtype)
        )
        score = normal_score(
            log_weights - log_weights.logsumexp(1, keepdim=True), x.double().unsqueeze(1) - means
        )
        eps = torch.finfo(dtype).eps
        assert ((score - z).abs() <= 16 * eps + 2 * eps * x.double().abs()).all()


def test_a_quantile_in_a_gap_without_density_lies_between_the_components():
    means, std, log_weights = (
        torch.tensor([[-100.0, 100.0]]),
        torch.ones(1, 1),
        torch.tensor([[0.3, 0.7]]).log(),
    )
    gap = torch.special.ndtri(torch.tensor([0.3]))
    assert -100 < mixture_quantile(means, std, log_weights, gap) < 100
    assert mixture_quantile(means, std, log_weights, gap - 0.01) < -97
    assert mixture_quantile(means, std, log_weights, gap + 0.01) > 97


# Golden figures


@pytest.mark.parametrize("per_pixel", [False, True])
@pytest.mark.parametrize("draw", [0, 1])
def test_golden_transport(per_pixel, draw):
    """Compare with the reference, whose forward map loses 2e-7 of probability near +-1.

    In float64 the same figures show that ours is right there. Per pixel, the reference rotates its
    normal samples back.
    """
    figures, mixture = golden("ops_mixture"), golden_mixture("ops_mixture", "gm")
    axes = figures["kr.eigvecs_per_pixel" if per_pixel else "kr.eigvecs"]
    suffix, turn = (".per_pixel", partial(rotate, axes=axes)) if per_pixel else ("", lambda z: z)

    x = mixture.from_normal(turn(figures["kr.gaussian_in"][:, draw]), axes)
    assert is_near(
        x, figures[f"kr.samples_from_gaussian{suffix}"][:, draw], 2e-5
    )  # ill-conditioned in gaps

    z = mixture.to_normal(figures["samples"][:, draw], axes)
    exact = cast(mixture, F64).to_normal(figures["samples"][:, draw].double(), axes.double())
    assert is_near(z.double(), exact, 1e-6)
    recorded = turn(figures[f"kr.gaussian_from_samples{suffix or '.axis_aligned'}"][:, draw])
    density = (-0.5 * exact.square()).exp() / math.sqrt(2 * math.pi)
    inside = exact.abs() < 4.8
    assert 0.8 < inside.double().mean() < 1
    assert ((z - recorded).abs() <= 2e-5 + 1e-6 / density)[inside].all()
    assert (torch.where(exact > 0, recorded, -recorded) > 4.7)[~inside].all()


def test_golden_quantiles():
    figures = golden("ops_gm1d")
    z = torch.special.ndtri((1 + figures["scaled_cdfs"].double()) / 2).float()
    for draw in range(3):
        x = mixture_quantile(
            figures["gm1d.means"],
            figures["gm1d.logstds"].exp(),
            figures["gm1d.logweights"],
            z[:, draw],
        )
        error = (x - figures["inverse_cdf.n16"][:, draw]).abs()
        assert (
            error <= 2e-6 + 2e-7 / figures["pdf_at_n16"][:, draw]
        ).all()  # the reference rounds probabilities near 1


def test_axes_of_a_covariance_that_is_not_finite_are_the_channels():
    mixture = random_mixture()
    means = mixture.means.clone()
    means[0, 0, 0, 0, 0] = torch.inf
    axes = GaussianMixture(means, mixture.log_weights, mixture.log_std).principal_axes()
    assert torch.equal(axes[0, 0, 0].abs(), torch.eye(3).flip(-1))
    assert axes.isfinite().all()


def test_the_average_covariance_averages_the_pixels_own_variances():
    mixture = random_mixture(dtype=F64)
    log_std = normal(2, 1, 1, 2, 3, dtype=F64)
    mixture = GaussianMixture(mixture.means, mixture.log_weights, log_std)
    average = mixture.covariance().mean((1, 2), keepdim=True)
    assert is_near(mixture.covariance(average=True), average, 1e-12)
