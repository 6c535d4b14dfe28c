"""The rollout: between two network calls every pixel follows the ODE of its own mixture.

The definition is `gmflow_core.flow.following`. Faster forms that give the same numbers are in
`gmflow_core.fast`; this file takes one of them.
"""

from __future__ import annotations

from torch import Tensor

from ..fast.choice import chosen_method, machine_rollout
from ..flow.blended import BlendedPolicy, Followed
from ..flow.checks import whole_number
from ..flow.following import Check, Constrain, follow, settled
from ..flow.path import Sigma, expand_sigma, sigmas_between
from ..flow.policy import NO_MIXTURES, ArcPolicy


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
        substeps: number of Euler steps, from 1 to MOST_STEPS; with 1 only the mixture's mean
            matters.
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
        ValueError: `substeps` is no whole number or out of range, or `method` is unknown.
    """
    substeps = whole_number("substeps", substeps)
    method = chosen_method(method)
    if isinstance(sigma, Tensor) or isinstance(sigma_end, Tensor):
        sigma, sigma_end = expand_sigma(sigma, x), expand_sigma(sigma_end, x)
    if isinstance(x0, ArcPolicy):
        return settled(x0.advance(x, sigma, sigma_end), sigma_end, constrain, check)
    if constrain is None and not isinstance(x0, (*NO_MIXTURES, BlendedPolicy)):
        arguments = x0, x, sigma, sigma_end, substeps, shift
        result = machine_rollout(*arguments, check, method, follow)
        if result is not None:
            return result
    sigmas = sigmas_between(sigma, sigma_end, substeps, shift)
    return follow(x0, x, sigmas, constrain, check)
