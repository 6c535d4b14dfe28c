"""The second-order correction of GM-ODE and GM-SDE (GMFlow, ICML 2025)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..flow.blended import BlendedPolicy
from ..flow.path import posterior_mean
from ..gaussians.mixture import Mixture, TiltedMixture
from .guidance import GaussianShift, image_mean, shift_of, with_shift


class Step(NamedTuple):
    """A sampling step, for the correction of the next one.

    Args:
        mixture: first-order (guided, uncorrected) mixture of x_0 at (x, sigma), or a blend.
        x: (B, C, *S).
        sigma: start of the step.
        size: sigma minus the next sigma.
    """

    mixture: Mixture | BlendedPolicy
    x: Tensor
    sigma: float
    size: float


def corrected(
    mixture: Mixture | BlendedPolicy, previous: Step, x: Tensor, sigma: float, size: float
) -> TiltedMixture | BlendedPolicy:
    """Correct a step's mixture as `second_order`, or each mixture of a blend in its place.

    A blend of other parts than that of the step before stays as it is.
    """
    if not isinstance(mixture, BlendedPolicy):
        if isinstance(previous.mixture, BlendedPolicy):
            return mixture
        return second_order(mixture, previous, x, sigma, size)
    if not mixture.is_alike(previous.mixture):
        return mixture
    before = iter(previous.mixture.parts)

    def correct(policy: Mixture, now: Tensor, then: Tensor) -> TiltedMixture:
        step = Step(next(before).policy, then, previous.sigma, previous.size)
        return second_order(policy, step, now, sigma, size)

    return mixture.map(correct, x, previous.x)


def second_order(
    mixture: Mixture,
    previous: Step,
    x: Tensor,
    sigma: float,
    size: float,
    ca: float = 0.005,
    cb: float = 1.0,
) -> TiltedMixture:
    """Correct a step's mixture with the one of the step before (GMFlow, ICML 2025).

    The previous mixture, carried to (x, sigma), predicts a mean. Half the difference to the new
    mean, scaled by the ratio of the step sizes and damped where it is mostly network error,
    extrapolates to the middle of the coming step. It is added to the guidance bias, and both
    are applied to the unguided mixture at once.

    Args:
        mixture: first-order mixture of x_0 at (x, sigma), guided or not; not one that has been
            corrected already.
        previous: the step before.
        x: (B, C, *S).
        size: sigma minus the next sigma.
        ca, cb: network error relative to V, without guidance and per guidance weight.
    """
    predicted = posterior_mean(previous.mixture, previous.x, previous.sigma, x, sigma)
    mean, mixture = mixture.mean(), mixture.as_tilted()
    var, bias, weight = shift_of(mixture)
    error = var * (weight * cb**2 + ca) / previous.size**2
    gain = (1 - error).clamp(min=0).sqrt() * (0.5 * size / previous.size)
    bias = bias + (mean - predicted) * gain
    power = image_mean(bias.square())
    bias = bias * (var / power.clamp(min=1e-6)).clamp(max=1).sqrt()
    weight = (power / var.clamp(min=1e-6)).clamp(max=1)
    return with_shift(mixture, GaussianShift(var, bias, weight))
