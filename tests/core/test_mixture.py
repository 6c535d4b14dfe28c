"""Gaussian mixtures: moments, products, densities and draws."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from gmflow_core import GaussianMixture, IsotropicGaussian
from gmflow_core.gaussians.density import LOG_2PI
from tests.helpers import (
    F64,
    SPACES,
    cast,
    golden,
    golden_mixture,
    is_near,
    normal,
    random_mixture,
    repeated,
    same_mixture,
)

# Moments


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("components", [1, 4])
def test_moments_are_direct_sums_over_components(space, components):
    mixture = random_mixture(components=components, space=space, dtype=F64)
    weights = mixture.log_weights.exp().movedim(2, -1)  # (B, K, *S, 1)
    means = mixture.means.movedim(2, -1)
    mean = sum(weights[:, k] * means[:, k] for k in range(components))
    second = sum(
        weights[:, k, ..., None] * means[:, k, ..., :, None] * means[:, k, ..., None, :]
        for k in range(components)
    )
    variance = mixture.log_std.exp().square().reshape(-1, *[1] * (len(space) + 2))
    covariance = second + variance * torch.eye(3) - mean[..., :, None] * mean[..., None, :]
    matched = mixture.moment_match()
    assert is_near(mixture.mean(), mean.movedim(-1, 1), 1e-12)
    assert is_near(matched.mean, mean.movedim(-1, 1), 1e-12)
    assert is_near(mixture.covariance(), covariance, 1e-12)
    assert is_near(matched.var, covariance.diagonal(dim1=-2, dim2=-1).mean(-1).unsqueeze(1), 1e-12)


@pytest.mark.parametrize("space", SPACES)
def test_equal_weights_count_in_full_and_a_single_one_counts_once(space):
    mixture = random_mixture(components=4, space=space, dtype=F64)
    for chosen in ([0, 1, 2, 3], [0, 3], [2]):
        nothing, count = torch.full_like(mixture.log_weights, -math.inf), len(chosen)
        log_weights = nothing.index_fill(1, torch.tensor(chosen), -math.log(count))
        each = GaussianMixture(mixture.means, log_weights, mixture.log_std)
        shape = (2, 1, *space)
        assert is_near(each.weight_entropy(), torch.full(shape, math.log(count), dtype=F64), 1e-12)
        assert is_near(each.effective_components(), torch.full(shape, count, dtype=F64), 1e-12)


def test_entropy_of_the_weights_is_that_of_a_categorical_distribution():
    mixture = random_mixture(components=5, dtype=F64)
    logits = mixture.log_weights.movedim(1, -1)
    assert is_near(mixture.weight_entropy(), Categorical(logits=logits).entropy(), 1e-12)


def test_spread_of_two_halves_adds_their_distance_to_their_own():
    """Halves at -d and d in every channel, each with standard deviation s: sqrt(s^2 + d^2)."""
    d, s = 1.5, 0.4
    means = torch.stack([torch.full((3, 2), -d), torch.full((3, 2), d)]).unsqueeze(0).to(F64)
    halves = torch.full((1, 2, 1, 2), -math.log(2), dtype=F64)
    mixture = GaussianMixture(means, halves, torch.full((1, 1, 1, 1), math.log(s), dtype=F64))
    expected = torch.full((1, 1, 2), math.hypot(s, d), dtype=F64)
    assert is_near(mixture.spread(), expected, 1e-12)


@pytest.mark.parametrize("per_pixel", [False, True])
def test_principal_axes_diagonalise_the_covariance_in_descending_order(per_pixel):
    mixture = random_mixture(dtype=F64)
    axes = mixture.principal_axes(per_pixel)
    covariance = (
        mixture.covariance() if per_pixel else mixture.covariance().mean((1, 2), keepdim=True)
    )
    assert axes.shape == covariance.shape
    turned = axes.mT @ covariance @ axes
    variances = turned.diagonal(dim1=-2, dim2=-1)
    assert is_near(axes.mT @ axes, torch.eye(3).expand_as(covariance).double(), 1e-12)
    assert is_near(turned, torch.diag_embed(variances), 1e-12)
    assert (variances.diff(dim=-1) < 0).all()


# Products


@pytest.mark.parametrize("with_over", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_times_is_the_normalised_product_of_the_densities(with_over, per_sample):
    mixture = random_mixture(batch=2, channels=2, space=(), dtype=F64)
    var = torch.tensor([[0.4], [0.9]] if per_sample else [[0.6]]).double()
    factor = IsotropicGaussian(normal(2, 2, dtype=F64), var)
    over = IsotropicGaussian(normal(2, 2, seed=2, dtype=F64), var + 0.7) if with_over else None
    product = mixture.times(factor, over)

    line = torch.linspace(-12, 12, 301, dtype=F64)
    points = torch.cartesian_prod(line, line).T.expand(2, -1, -1)  # (B, C, N)

    def exponent(gaussian):
        return -0.5 * (points - gaussian.mean.unsqueeze(2)).square().sum(1) / gaussian.var

    density = (
        repeated(mixture, 301**2).log_prob(points)
        + exponent(factor)
        - (exponent(over) if with_over else 0)
    )
    density = density.exp() / (density.exp().sum(1, keepdim=True) * (line[1] - line[0]).square())
    assert is_near(repeated(product, 301**2).log_prob(points).exp(), density, 1e-9)


def test_products_keep_their_digits_when_the_variance_is_small_beside_the_means():
    means, halves = torch.tensor([[[300.0], [300.02]]]), torch.full((1, 2, 1), 0.5)
    mixture = GaussianMixture(means, halves.log(), torch.full((1, 1, 1), -4.0))
    factor = IsotropicGaussian(torch.tensor([[300.01]]), torch.tensor([[1e-4]]))
    exact = cast(mixture, F64).times(IsotropicGaussian(factor.mean.double(), factor.var.double()))
    product = mixture.times(factor)
    assert (product.means - exact.means).abs().max() < 4e-5  # numbers near 300 are 3e-5 apart,
    assert (
        product.weights - exact.weights
    ).abs().max() < 1e-3  # which moves the log-weights by this much


@pytest.mark.parametrize("space", SPACES)
def test_means_that_a_tilted_mixture_has_without_its_components_are_theirs(space):
    mixture = random_mixture(space=space, dtype=F64)
    factors = [
        (normal(2, 3, *space, seed=seed, dtype=F64), torch.tensor(0.3 * seed)) for seed in (1, 2)
    ]
    first, second = (
        (linear, quadratic.expand(2, 1, *[1] * len(space))) for linear, quadratic in factors
    )
    tilted = mixture.as_tilted().tilted(*first)
    components = GaussianMixture(tilted.means, tilted.log_weights, tilted.log_std)
    assert is_near(tilted.mean(), components.mean(), 1e-12)
    assert is_near(tilted.tilted(*second).mean(), components.tilt(*second).mean(), 1e-12)


def test_products_that_cannot_be_normalised_widen_components_by_a_million_at_most():
    """1 + v quadratic is clamped at 1e-6: variances and distances grow by 1e6."""
    mixture, move = random_mixture(spread=1e-3, dtype=F64), normal(2, 3, 2, 3, dtype=F64)
    for below in (0.5e-6, 0.0, -1.0):
        quadratic = (below - 1) / mixture.var.squeeze(1)
        linear = quadratic * mixture.mean() + move
        tilted = mixture.tilt(linear, quadratic)
        assert is_near(tilted.var, (1e6 * mixture.var).expand_as(tilted.var), 1e-9)
        offsets = mixture.means - mixture.mean().unsqueeze(1)
        shift = 1e6 * (offsets + mixture.var * move.unsqueeze(1))
        assert is_near(tilted.means, mixture.mean().unsqueeze(1) + shift, 1e-9)
        half_norms = (0.5 * quadratic.unsqueeze(1) * offsets.square()).sum(2, keepdim=True)
        gain = 1e6 * ((offsets * move.unsqueeze(1)).sum(2, keepdim=True) - half_norms)
        assert is_near(tilted.log_weights, (mixture.log_weights + gain).log_softmax(1), 1e-9)
        assert is_near(tilted.mean(), (tilted.weights * tilted.means).sum(1), 1e-9)


def test_a_tilted_mixtures_components_have_gradients_whoever_asks_first():
    mixture = random_mixture()
    means = mixture.means.clone().requires_grad_()
    tilted = GaussianMixture(means, mixture.log_weights, mixture.log_std).as_tilted()
    tilted = tilted.tilted(normal(2, 3, 2, 3), torch.ones(2, 1, 1, 1))
    with torch.no_grad():
        assert tilted.covariance().isfinite().all()
        assert tilted.mean().isfinite().all()
    assert torch.autograd.grad(tilted.means.sum(), means, retain_graph=True)[0].abs().min() > 0
    by_components = (tilted.weights * tilted.means).sum(1).square().sum()
    expected, found = (
        torch.autograd.grad(each, means, retain_graph=True)[0]
        for each in (by_components, tilted.mean().square().sum())
    )
    assert is_near(found, expected, 1e-5)


@pytest.mark.parametrize("components", [1, 4, 40])  # short sums and long ones
@pytest.mark.parametrize("space", SPACES)
def test_means_of_many_tilts_are_those_of_each(components, space):
    mixture = random_mixture(components=components, space=space, dtype=F64)
    tilted = mixture.as_tilted()
    for seed, quadratic in ((1, 0.7), (2, -0.5), (3, 0.0)):
        linear, quadratic = (
            normal(2, 3, *space, seed=seed, dtype=F64),
            torch.full((2, 1, *[1] * len(space)), quadratic, dtype=F64),
        )
        assert is_near(
            tilted.tilted(linear, quadratic).mean(), mixture.tilt(linear, quadratic).mean(), 1e-12
        )


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_temperature_scales_log_weights_and_variance(temperature):
    mixture = random_mixture(dtype=F64)
    tempered = mixture.with_temperature(temperature)
    powers = mixture.weights ** (1 / temperature)
    assert is_near(tempered.weights, powers / powers.sum(1, keepdim=True), 1e-12)
    assert is_near(tempered.var, mixture.var * temperature, 1e-12)


# Density and draws


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("components", [1, 4])
def test_log_prob_agrees_with_torch_distributions(space, components):
    mixture = random_mixture(components=components, space=space)
    x = 2 * normal(2, 3, *space)
    means = mixture.means.movedim((1, 2), (-2, -1))  # (B, *S, K, C)
    std = mixture.log_std.exp().reshape(-1, *[1] * (len(space) + 2)).expand_as(means)
    shares = Categorical(logits=mixture.log_weights.squeeze(2).movedim(1, -1))
    peer = MixtureSameFamily(shares, Independent(Normal(means, std), 1))
    assert is_near(mixture.log_prob(x), peer.log_prob(x.movedim(1, -1)))


@pytest.mark.parametrize("components", [1, 4])
def test_draws_have_the_moments_and_the_shares_of_the_mixture(components):
    count = 100_000
    one = random_mixture(seed=3, batch=1, components=components, channels=2, space=(), spread=10.0)
    x = repeated(one, count).sample(torch.Generator().manual_seed(0)).squeeze(0)  # (2, count)
    covariance = one.covariance()[0]
    assert ((x.mean(1) - one.mean()[0]).abs() < 4 * (covariance.diagonal() / count).sqrt()).all()
    assert is_near(x.cov(), covariance, 0.02)
    nearest = (
        (x.T.unsqueeze(1) - one.means[0]).square().sum(-1).argmin(1)
    )  # components are far apart
    shares = nearest.bincount(minlength=components) / count
    assert (shares - one.weights.flatten()).abs().max() < 4 * 0.5 / math.sqrt(count)


def test_recorded_draws_and_generators_determine_a_sample():
    mixture = random_mixture()
    component, noise = (
        torch.randint(4, (2, 2, 3), generator=torch.Generator().manual_seed(0)),
        normal(2, 3, 2, 3),
    )
    x = mixture.sample(component=component, noise=noise)
    for b, i, j in ((0, 0, 0), (1, 1, 2), (0, 1, 1)):
        expected = (
            mixture.means[b, component[b, i, j], :, i, j]
            + mixture.log_std[b].exp().flatten() * noise[b, :, i, j]
        )
        assert torch.equal(x[b, :, i, j], expected)
    first, again, other = (
        mixture.sample(torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_weights_that_rounding_left_below_1_still_draw_a_component(monkeypatch):
    mixture = random_mixture()
    mixture = GaussianMixture(mixture.means, mixture.log_weights - 1e-6, mixture.log_std)
    monkeypatch.setattr(
        torch, "rand", lambda shape, **_: torch.full(shape, 1 - 2**-24)
    )  # the largest uniform number
    assert torch.equal(mixture.sample(noise=torch.zeros(2, 3, 2, 3)), mixture.means[:, -1])


# Types and errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    full = random_mixture()
    half = cast(full, dtype)
    same = GaussianMixture(
        *(t.to(dtype).float() for t in (full.means, full.log_weights, full.log_std))
    )
    gaussian = IsotropicGaussian(full.mean().to(dtype), torch.ones(1, 1, 1, 1, dtype=dtype))
    assert gaussian.mean.dtype == gaussian.var.dtype == torch.float32
    assert (
        half.mean().dtype
        == half.sample().dtype
        == half.times(gaussian).means.dtype
        == torch.float32
    )
    assert torch.equal(half.moment_match().var, same.moment_match().var)


@pytest.mark.parametrize(
    ("means", "log_weights", "log_std", "quoted"),
    [
        ((4, 2), (4, 2), (4, 2), r"\(4, 2\)"),
        (
            (2, 4, 3, 5),
            (2, 4, 1, 6),
            (2, 1, 1, 1),
            r"\(2, 4, 1, 6\).*\(2, 4, 3, 5\).*\(2, 4, 1, 5\)",
        ),
        ((2, 4, 3), (2, 4), (2, 1, 1), r"\(2, 4\).*\(2, 4, 1\)"),
        ((2, 4, 3), (2, 4, 1), (2, 4, 1), r"\(2, 4, 1\).*\(2, 1, 1\)"),
        ((2, 4, 3, 5), (2, 4, 1, 5), (2, 1, 1), r"\(2, 1, 1\).*\(2, 1, 1, 5\)"),
    ],
)
def test_shapes_that_do_not_belong_together_are_quoted(means, log_weights, log_std, quoted):
    with pytest.raises(ValueError, match=quoted):
        GaussianMixture(torch.zeros(means), torch.zeros(log_weights), torch.zeros(log_std))


def test_other_errors_quote_the_value():
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*\(2, 1\)"):
        IsotropicGaussian(torch.zeros(2, 3, 4), torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"-0\.5"):
        random_mixture().with_temperature(-0.5)


# Golden figures


def test_golden_moments_densities_and_draws():
    figures, mixture = golden("ops_mixture"), golden_mixture("ops_mixture", "gm")
    assert is_near(mixture.mean(), figures["gm_to_mean"])
    assert is_near(mixture.moment_match().var, figures["iso.var"])
    assert is_near(mixture.covariance(), figures["gaussian.cov"])
    for draw in range(2):
        assert is_near(mixture.log_prob(figures["samples"][:, draw]), figures["logprob"][:, draw])
    for draw in range(3):
        component, noise = (
            figures["gm_to_sample.inds"][..., draw].long(),
            figures["gm_to_sample.noise"][:, draw],
        )
        assert is_near(
            mixture.sample(component=component, noise=noise), figures["gm_to_sample.out"][:, draw]
        )
    assert same_mixture(
        mixture.with_temperature(0.3), golden_mixture("ops_mixture", "temperature0.3")
    )


@pytest.mark.parametrize(
    ("result", "factor", "over"),
    [
        ("gm_mul_iso.p1p1", ("g1.mean", "g1.var"), None),
        ("gm_mul_iso.perpixel", ("g1.mean", "g3.var"), None),
        ("chain.result", ("chain.out.mean", "chain.out.var"), ("iso.mean", "chain.in.var")),
    ],
)
def test_golden_products(result, factor, over):
    factor, over = (
        names and IsotropicGaussian(*(golden("ops_mixture")[name] for name in names))
        for names in (factor, over)
    )
    product = golden_mixture("ops_mixture", "gm").times(factor, over)
    assert same_mixture(product, golden_mixture("ops_mixture", result))


def test_the_density_at_the_mean_of_a_certain_component_is_finite():
    mean = normal(2, 3)
    mixture = GaussianMixture(mean.unsqueeze(1), torch.zeros(2, 1, 1), torch.full((2, 1, 1), -50.0))
    assert mixture.log_prob(mean).tolist() == pytest.approx([3 * (50 - 0.5 * LOG_2PI)] * 2)


def test_densities_of_many_points_under_one_mixture_have_gradients():
    mixture, x = random_mixture(batch=1, space=(), dtype=F64), normal(5, 3, dtype=F64)
    leaves = [t.clone().requires_grad_() for t in vars(mixture).values()]
    assert torch.autograd.gradcheck(lambda *parts: GaussianMixture(*parts).log_prob(x), leaves)
