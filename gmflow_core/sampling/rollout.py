"""The rollout: between two network calls every pixel follows the ODE of its own mixture.

This file holds the definition. Faster forms that give the same numbers are in `gmflow_core.fast`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor

from ..fast.choice import chosen_method, machine_rollout
from ..flow.blended import BlendedPolicy, Followed
from ..flow.path import Sigma, expand_sigma, positive, posterior_means, sigmas_between
from ..flow.policy import NO_MIXTURES, ArcPolicy, DXPolicy

Constrain = Callable[[Tensor, Tensor], Tensor]
Check = Callable[[], None]


def rollout(
    x0: Followed,
    x: Tensor,
    sigma: Sigma,
    sigma_end: Sigma,
    substeps: int,
    *,
    shift: float = 1.0,
    constrain: Constrain | None = None,
    check: Check | None = None,
    method: str | None = None,
) -> Tensor:
    """Integrate dx / dsigma = (x - E[x_0 | x, sigma]) / sigma from sigma down to sigma_end.

    Takes Euler steps with the posterior mean that the mixture predicted at the start implies on
    the way (GM-ODE of GMFlow, ICML 2025; the GM policy of pi-Flow, arXiv 2510.14974), or with the
    x_0 of a DX policy. ArcFlow's policy takes one exact step instead, whatever `substeps` is.

    Args:
        x0: mixture of x_0 given (x, sigma), or another policy or a blend predicted there.
        x: (B, C, *S) at sigma.
        sigma, sigma_end: numbers, one per sample, or broadcastable to (B, 1, *S).
        substeps: number of Euler steps, at least 1; with 1 only the mixture's mean matters.
        shift: the steps are equal in unshifted time, see `shift_time`.
        constrain: called as constrain(x, sigma) after every substep; returns the x to go on with.
            For inpainting masks.
        check: called often, at least once; an exception from it ends the rollout. For the user's
            interruption.
        method: "plain" for this definition, or a faster form, see `gmflow_core.fast.choice`; None
            takes the environment's GMFLOW_METHOD, or else what is fastest on the device. Gradients,
            constraints, DX policies and single steps always take the definition.

    Returns:
        x at sigma_end, (B, C, *S).

    Raises:
        ValueError: `substeps` is not a whole number of at least 1, or `method` is unknown.
    """
    if not isinstance(substeps, int) or substeps < 1:
        raise ValueError(f"substeps is {substeps}; a whole number, at least 1, is needed")
    method = chosen_method(method)
    if isinstance(sigma, Tensor) or isinstance(sigma_end, Tensor):
        sigma, sigma_end = expand_sigma(sigma, x), expand_sigma(sigma_end, x)
    if isinstance(x0, ArcPolicy):
        return _settled(x0.advance(x, sigma, sigma_end), sigma_end, constrain, check)
    if constrain is None and not isinstance(x0, (*NO_MIXTURES, BlendedPolicy)):
        arguments = x0, x, sigma, sigma_end, substeps, shift
        result = machine_rollout(*arguments, check, method, follow)
        if result is not None:
            return result
    sigmas = sigmas_between(sigma, sigma_end, substeps, shift)
    return follow(x0, x, sigmas, constrain, check)


def follow(
    x0: Followed,
    x: Tensor,
    sigmas: Sequence[Sigma],
    constrain: Constrain | None = None,
    check: Check | None = None,
) -> Tensor:
    """Take an Euler step from each of `sigmas` to the next; arguments as in `rollout`."""
    mean = x0.mean()  # the posterior at the start is the mixture itself
    mean_at = means_along(x0, x, sigmas[0]) if len(sigmas) > 2 else None
    for step, (now, following) in enumerate(itertools.pairwise(sigmas)):
        if step > 0:
            mean = mean_at(x, now)
        x = mean + following / positive(now) * (x - mean)
        x = _settled(x, following, constrain, check)
    return x


def _settled(x: Tensor, sigma: Sigma, constrain: Constrain | None, check: Check | None) -> Tensor:
    """Return x at sigma as the constraint wants it, after the check."""
    if constrain is not None:
        x = constrain(x, expand_sigma(sigma, x))
    if check is not None:
        check()
    return x


def means_along(x0: Followed, x: Tensor, sigma: Sigma) -> Callable[[Tensor, Sigma], Tensor]:
    """Return E[x_0 | x, sigma] as a function, for a policy that was predicted at (x, sigma)."""
    if isinstance(x0, ArcPolicy):
        return lambda x, sigma: x - expand_sigma(sigma, x) * x0.velocity(sigma)
    if isinstance(x0, DXPolicy):
        return lambda x, sigma: x0.at(sigma)
    if isinstance(x0, BlendedPolicy):
        start = expand_sigma(sigma, x)
        along = [means_along(each.policy, each.of(x), each.of(start)) for each in x0.parts]
        return lambda x, sigma: x0.average(
            [
                mean_at(each.of(x), each.of(expand_sigma(sigma, x)))
                for each, mean_at in zip(x0.parts, along, strict=True)
            ]
        )
    return posterior_means(x0, x, sigma)
