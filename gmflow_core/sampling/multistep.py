"""Multistep solvers of the mean velocity: DPM-Solver++(2M) and UniPC, with one call a step.

With the mean m of x_0 the flow is dx/dsigma = (x - m) / sigma. In lambda = -log(sigma) a step of
size h is linear in x and in the means along it:

    x' = e^-h x + integral from 0 to h of e^(s - h) m(lambda + s) ds.

Both solvers extrapolate m as a polynomial in lambda, which is finite at sigma = 1. So do ComfyUI's
`dpmpp_2m` (from k-diffusion) and `uni_pc`. A step that ends at 0 takes m as constant: x' = m.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .denoisers import Denoiser
from .hooks import Hooks
from .steps import batch_sigma, intervals
from .trajectory import with_trajectory

HIGHEST_ORDER = 3  # of UniPC


class Call(NamedTuple):
    """A network call: its sigma and its mean of x_0, (B, C, *S)."""

    sigma: float
    mean: Tensor


@with_trajectory
def sample_dpmpp_2m(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor | Sequence[float], **hooks: Any
) -> Tensor:
    """Sample with DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095) on the mixture's mean.

    Each step takes the mean at its middle, on the line through the last two means. The first step,
    and one that ends at 0, are of first order.
    Arguments, return value and errors as `sample_gm_ode`.
    """
    hooks, previous = Hooks(**hooks), None
    for index, (sigma, sigma_next) in enumerate(intervals(sigmas)):
        mean = target = _mean(denoiser, x, sigma, hooks)
        hooks.report(index, x, lambda mean=mean: mean)
        if previous is not None and sigma_next > 0:
            ratio = math.log(sigma / sigma_next) / math.log(previous.sigma / sigma)
            target = mean + (mean - previous.mean) * (0.5 * ratio)
        x = hooks.settle(_advance(x, sigma, sigma_next, [Call(sigma, target)]), sigma_next)
        previous = Call(sigma, mean)
        if hooks.check is not None:
            hooks.check()
    return x


@with_trajectory
def sample_uni_pc(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor | Sequence[float], **hooks: Any
) -> Tensor:
    """Sample with UniPC (Zhao et al. 2023, arXiv 2302.04867) on the mixture's mean.

    Each step predicts x through the means of up to three calls. After the next call, whose mean is
    then known at the step's end too, it is taken once more (the corrector), without a further call.
    It is the multistep form that predicts x_0, with B(h) = h, of order 3 at most and lower at both
    ends. Arguments, return value and errors as `sample_gm_ode`.
    """
    hooks, steps, calls, start = Hooks(**hooks), intervals(sigmas), [], x
    highest = max(1, min(HIGHEST_ORDER, len(steps) - 1))
    order = 1
    for index, (sigma, sigma_next) in enumerate(steps):
        call = Call(sigma, _mean(denoiser, x, sigma, hooks))
        hooks.report(index, x, lambda call=call: call.mean)
        if calls:  # correct the step that led here
            x = _advance(start, calls[0].sigma, sigma, calls[:order], call)
            x = hooks.settle(x, sigma)
        calls, start = [call, *calls][:HIGHEST_ORDER], x
        order = min(highest, index + 1, len(steps) - index)
        x = hooks.settle(_advance(x, sigma, sigma_next, calls[:order]), sigma_next)
        if hooks.check is not None:
            hooks.check()
    return x


def _mean(denoiser: Denoiser, x: Tensor, sigma: float, hooks: Hooks) -> Tensor:
    """Return the mean of x_0 of a network call, as blended: later steps use it, too."""
    return hooks.blended(x, sigma, denoiser(x, batch_sigma(x, sigma)).mean(), 0.0)


def _advance(
    x: Tensor, sigma: float, sigma_next: float, calls: list[Call], end: Call | None = None
) -> Tensor:
    """Return x at sigma_next, from x at sigma and the means of calls.

    Args:
        calls: at sigma and before it, the newest first.
        end: a call at sigma_next.
    """
    newest, kept = calls[0].mean, sigma_next / sigma
    result = kept * x + (1 - kept) * newest
    others = [*calls[1:], *([] if end is None else [end])]
    if not others or sigma_next == 0:
        return result
    size = math.log(sigma / sigma_next)
    places = [math.log(sigma / call.sigma) / size for call in others]
    for weight, call in zip(_weights(size, places), others, strict=True):
        result = result + weight * (call.mean - newest)
    return result


def _weights(size: float, places: list[float]) -> list[float]:
    """Return the weight of each mean's difference to the newest one, in a step of that size.

    Args:
        size: h.
        places: of the means in lambda, relative to the step: 0 at its start, 1 at its end.
    """
    if len(places) == 1:  # UniPC's simplified form; exact is moment 1
        return [size / 2 / places[0]]
    weights = []
    for own in places:  # integrate the polynomial that is 1 there, and 0 at the others and at 0
        factors = [0.0, *(place for place in places if place != own)]
        coefficients = [1.0]  # of rising powers
        for root in factors:
            raised, lowered = [0.0, *coefficients], [*coefficients, 0.0]
            coefficients = [a - root * b for a, b in zip(raised, lowered, strict=True)]
        whole = sum(c * _moment(size, power) for power, c in enumerate(coefficients))
        weights.append(whole / math.prod(own - root for root in factors))
    return weights


def _moment(size: float, power: int) -> float:
    """Return the integral from 0 to 1 of h e^(h (u - 1)) u^power du, with h = size."""
    if size > 1:
        value = -math.expm1(-size)
        for each in range(1, power + 1):
            value = 1 - each / size * value
        return value
    terms = (size**n / (math.factorial(n) * (n + power + 1)) for n in range(20))
    return size * math.exp(-size) * sum(terms)
