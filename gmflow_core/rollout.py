"""What happens between two network calls: every pixel follows the ODE of its own mixture. The hot path."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .path import MIN_SIGMA, Sigma, expand_sigma, posterior_means, shift_time, unshift_time
from .policy import DXPolicy, Policy

Constrain = Callable[[Tensor, Tensor], Tensor]


def rollout(
    x0: Policy,
    x: Tensor,
    sigma: Sigma,
    sigma_end: Sigma,
    substeps: int,
    *,
    shift: float = 1.0,
    constrain: Constrain | None = None,
) -> Tensor:
    """Integrate dx / dsigma = (x - E[x_0 | x, sigma]) / sigma from sigma down to sigma_end in Euler steps, with the posterior
    mean that the mixture predicted at the start implies on the way (GM-ODE of GMFlow, ICML 2025; the GM policy of pi-Flow), or
    with the x_0 of a DX policy.

    Args:
        x0: mixture of x_0 given (x, sigma), or a DX policy predicted there.
        x: (B, C, *S) at sigma.
        sigma, sigma_end: numbers, one per sample, or broadcastable to x.
        substeps: number of Euler steps, at least 1; with 1 only the mixture's mean matters.
        shift: the steps are equal in unshifted time, see `shift_time`.
        constrain: called as constrain(x, sigma) after every substep; returns the x to go on with. For masks, and the
            place to raise from when the user interrupts.

    Returns:
        x at sigma_end, (B, C, *S).

    Raises:
        ValueError: `substeps` is below 1.
    """
    if substeps < 1:
        raise ValueError(f"substeps is {substeps}; at least 1 is needed")
    start, end = expand_sigma(sigma, x), expand_sigma(sigma_end, x)
    first, last = unshift_time(start, shift), unshift_time(end, shift)
    now = start
    later_mean = _means_along(x0, x, start) if substeps > 1 else None
    for substep in range(substeps):
        mean = x0.mean() if substep == 0 else later_mean(x, now)
        following = end if substep == substeps - 1 else shift_time(first + (last - first) * ((substep + 1) / substeps), shift)
        x = mean + (following / now.clamp(min=MIN_SIGMA)) * (x - mean)
        now = following
        if constrain is not None:
            x = constrain(x, now)
    return x


def _means_along(x0: Policy, x: Tensor, sigma: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean of x_0 as a function of (x, sigma), from a policy predicted at (x, sigma)."""
    if isinstance(x0, DXPolicy):
        return lambda x, sigma: x0.at(sigma)
    return posterior_means(x0, x, sigma)
