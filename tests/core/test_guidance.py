"""Probabilistic guidance: laws of its bias and its mixture, and the reference's figures."""

import pytest
import torch

from gmflow_core import GaussianMixture, probabilistic_guidance
from gmflow_core.sampling.guidance import image_gaussian, image_mean, shift_of
from tests.helpers import (
    F64,
    SPACES,
    golden,
    golden_mixture,
    is_near,
    normal,
    random_mixture,
    same_mixture,
)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("scale", [0.05, 0.9])
@pytest.mark.parametrize("orthogonal", [0.0, 0.6, 1.0])
def test_the_bias_has_the_mean_square_and_the_direction_asked_for(space, scale, orthogonal):
    cond, uncond_mean = random_mixture(space=space, dtype=F64), normal(2, 3, *space, dtype=F64)
    guided = probabilistic_guidance(cond, uncond_mean, scale, orthogonal)
    mean, difference = cond.mean().flatten(1), (cond.mean() - uncond_mean).flatten(1)
    covariance = cond.covariance()
    variance = covariance.diagonal(dim1=-2, dim2=-1).flatten(1).mean(1)
    assert is_near(shift_of(guided).bias.square().flatten(1).mean(1), scale**2 * variance, 1e-12)
    parallel = (difference * mean).sum(1, keepdim=True) / mean.square().sum(1, keepdim=True) * mean
    expected = difference - orthogonal * parallel
    cosine = torch.nn.functional.cosine_similarity(shift_of(guided).bias.flatten(1), expected)
    assert is_near(cosine, torch.ones_like(cosine), 1e-12)
    if orthogonal == 1:
        assert (shift_of(guided).bias.flatten(1) * mean).sum(1).abs().max() < 1e-12


def test_the_guided_mixture_is_cond_times_the_quotient_of_the_two_gaussians():
    cond = random_mixture(dtype=F64)
    guided = probabilistic_guidance(cond, normal(2, 3, 2, 3, dtype=F64), 0.6)
    gaussian = image_gaussian(cond)

    def log_ratio(x):
        target = (
            -0.5
            * (x - gaussian.mean - shift_of(guided).bias).square().sum(1)
            / (0.64 * gaussian.var.squeeze(1))
        )
        log_quotient = target + 0.5 * (x - gaussian.mean).square().sum(1) / gaussian.var.squeeze(1)
        return guided.log_prob(x) - cond.log_prob(x) - log_quotient

    constants = torch.stack(
        [log_ratio(2 * normal(2, 3, 2, 3, seed=seed, dtype=F64)) for seed in range(5)]
    )
    assert is_near(constants, constants[:1].expand_as(constants), 1e-11)


def test_with_one_component_guidance_shifts_and_narrows_it():
    cond = random_mixture(components=1, dtype=F64)
    guided = probabilistic_guidance(cond, normal(2, 3, 2, 3, dtype=F64), 0.6)
    assert is_near(guided.means[:, 0], cond.means[:, 0] + shift_of(guided).bias, 1e-12)
    assert is_near(guided.var, 0.64 * cond.var, 1e-12)


def test_scale_0_is_the_identity():
    cond = random_mixture()
    assert same_mixture(probabilistic_guidance(cond, normal(2, 3, 2, 3), 0.0), cond, 1e-6)


def test_only_the_direction_of_the_difference_matters():
    cond, step = random_mixture(dtype=F64), normal(2, 3, 2, 3, dtype=F64)
    near, far = (
        probabilistic_guidance(cond, cond.mean() - length * step, 0.4) for length in (0.1, 30)
    )
    assert same_mixture(near, far, 1e-12)


def test_one_scale_for_each_sample_equals_one_by_one():
    cond, uncond_mean = random_mixture(), normal(2, 3, 2, 3)
    together = probabilistic_guidance(cond, uncond_mean, torch.tensor([0.2, 0.7]))
    for b, scale in enumerate((0.2, 0.7)):
        part = GaussianMixture(
            cond.means[b : b + 1], cond.log_weights[b : b + 1], cond.log_std[b : b + 1]
        )
        alone = probabilistic_guidance(part, uncond_mean[b : b + 1], scale)
        assert is_near(shift_of(together).bias[b : b + 1], shift_of(alone).bias, 1e-6)
        assert is_near(together.means[b : b + 1], alone.means, 1e-6)


def test_a_guided_mixture_remembers_what_it_was_made_of():
    cond = random_mixture()
    guided = probabilistic_guidance(cond, cond.mean() + 1, 0.3)
    assert is_near(image_gaussian(guided).mean - shift_of(guided).bias, cond.mean())
    assert shift_of(guided).weight.sqrt().flatten().tolist() == pytest.approx([0.3, 0.3])
    assert is_near(
        image_mean(shift_of(guided).bias.square()), 0.09 * image_gaussian(cond).var, 1e-5
    )


@pytest.mark.parametrize(
    ("scale", "orthogonal", "quoted"),
    [(1.0, 1.0, "1.0"), (-0.1, 1.0, "-0.1"), (7.5, 1.0, "7.5"), (0.3, 2.0, "2.0")],
)
def test_values_out_of_range_are_quoted(scale, orthogonal, quoted):
    with pytest.raises(ValueError, match=rf" {quoted}"):
        probabilistic_guidance(random_mixture(), normal(2, 3, 2, 3), scale, orthogonal)


@pytest.mark.parametrize("scale", [0.04, 0.45, 0.9])
@pytest.mark.parametrize("orthogonal", [0, 1])
def test_golden_guidance(scale, orthogonal):
    figures, case = golden("guidance"), f"s{scale}_o{orthogonal}"
    cond, uncond_mean = (
        golden_mixture("guidance", "gm_cond"),
        golden_mixture("guidance", "gm_uncond").mean(),
    )
    guided = probabilistic_guidance(cond, uncond_mean, scale, orthogonal)
    gaussian = image_gaussian(cond)
    assert is_near(uncond_mean, figures["uncond_mean"])
    assert is_near(gaussian.mean, figures["cond.mean"])
    assert is_near(gaussian.var, figures["cond.var"])
    assert is_near(shift_of(guided).bias, figures[f"{case}.bias"])
    assert is_near(gaussian.mean + shift_of(guided).bias, figures[f"{case}.mean"])
    assert same_mixture(guided, golden_mixture("guidance", f"{case}.gm"))


def test_guidance_of_a_guided_mixture_starts_from_that_mixture():
    first = probabilistic_guidance(random_mixture(dtype=F64), normal(2, 3, 2, 3, dtype=F64), 0.3)
    other = normal(2, 3, 2, 3, seed=5, dtype=F64)
    assert is_near(probabilistic_guidance(first, other, 0.0).mean(), first.mean(), 1e-12)
    own = GaussianMixture(first.means, first.log_weights, first.log_std)
    expected = probabilistic_guidance(own, other, 0.4)
    assert is_near(probabilistic_guidance(first, other, 0.4).mean(), expected.mean(), 1e-12)
