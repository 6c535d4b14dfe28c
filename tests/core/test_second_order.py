"""Second-order correction: limits in closed form, and the reference's figures."""

import pytest
import torch

from gmflow_core import GaussianMixture, probabilistic_guidance, second_order
from gmflow_core.sampling.guidance import image_gaussian
from gmflow_core.sampling.second_order import Step
from tests.helpers import (
    F64,
    golden,
    golden_mixture,
    is_near,
    normal,
    random_mixture,
    same_mixture,
)


def test_the_correction_extrapolates_half_a_step_when_the_mean_moves_little():
    """Far below the limits the mean moves by half the difference to the last prediction."""
    mixture, x, size = random_mixture(dtype=F64), normal(2, 3, 2, 3, dtype=F64), 0.2
    moved = GaussianMixture(mixture.means + 1e-2, mixture.log_weights, mixture.log_std)
    corrected = second_order(moved, Step(mixture, x, 0.5, size), x, 0.5, size / 4, ca=0.0)
    assert is_near(
        image_gaussian(corrected).mean - moved.mean(), torch.full_like(x, 1e-2 * 0.5 / 4), 1e-9
    )
    assert is_near(corrected.moment_match().mean, image_gaussian(corrected).mean, 0.01)


@pytest.mark.parametrize(("before", "size"), [(0.4, 0.1), (0.4, 0.8), (0.1, 0.4)])
def test_the_correction_is_damped_by_the_size_of_the_step_before(before, size):
    """Network error ca V counts against the square of the previous step, not of this one."""
    mixture, x, ca = random_mixture(dtype=F64), normal(2, 3, 2, 3, dtype=F64), 0.02
    moved = GaussianMixture(mixture.means + 1e-2, mixture.log_weights, mixture.log_std)
    var = moved.moment_match().var.mean((1, 2, 3), keepdim=True)
    damping = (1 - ca * var / before**2).clamp(min=0).sqrt()
    assert ((damping > 0) == (before == 0.4)).all()  # both sides of the limit are tested
    corrected = second_order(moved, Step(mixture, x, 0.9, before), x, 0.9, size, ca=ca)
    shift = (damping * (1e-2 * 0.5 * size / before)).expand_as(x)
    assert (image_gaussian(corrected).mean - moved.mean() - shift).abs().max() < 1e-11


def test_the_correction_stays_within_the_mixtures_own_spread():
    mixture, x = random_mixture(dtype=F64), normal(2, 3, 2, 3, dtype=F64)
    moved = GaussianMixture(mixture.means + 100, mixture.log_weights, mixture.log_std)
    corrected = second_order(moved, Step(mixture, x, 0.5, 0.1), x, 0.5, 0.1, ca=0.0)
    shift, var = (
        image_gaussian(corrected).mean - moved.mean(),
        moved.moment_match().var.mean((1, 2, 3), keepdim=True),
    )
    assert is_near(shift.square().mean((1, 2, 3), keepdim=True), var, 1e-9)
    assert is_near(image_gaussian(corrected).var, 1e-6 * var, 1e-9)


@pytest.mark.parametrize("scale", ["0.0", "0.04", "0.45"])
def test_golden_second_order(scale):
    figures, case = golden("second_order"), f"g{scale}_c0"
    cond, uncond_mean = (
        golden_mixture("second_order", "gm_cond"),
        golden_mixture("second_order", "gm_uncond").mean(),
    )
    mixture = cond if scale == "0.0" else probabilistic_guidance(cond, uncond_mean, float(scale))
    assert same_mixture(mixture, golden_mixture("second_order", f"{case}.first_order"))
    previous = Step(golden_mixture("second_order", "prev_gm"), figures["prev_x_t"], 0.875, 0.125)
    corrected = second_order(mixture, previous, figures["x_t"], 0.75, 0.125)
    assert same_mixture(corrected, golden_mixture("second_order", f"{case}.gm"))
    assert is_near(image_gaussian(corrected).mean, figures[f"{case}.gaussian.mean"])
    assert is_near(image_gaussian(corrected).var, figures[f"{case}.gaussian.var"])
