"""What happens between two network calls: every pixel follows the ODE of its own mixture. The hot path.

`rollout` has one meaning and several ways there, METHODS:

- plain: the definition, one substep after the other over the whole tensor. It has gradients, and constraints between substeps.
- tiled: on its way x stays in the span of the source point and the K means, so that a substep needs their inner products only,
  not the means. They are computed once for a tile of pixels, whose whole rollout then stays in the cache. Plain torch.
- compiled: tiled, with the inner parts compiled by torch.compile: on a CPU with a C++ compiler, and ten to thirty seconds
  for each K and C, in the first rollout and again when a second size comes. With few substeps, the definition compiled.
- triton: all substeps of a block of pixels in one kernel, on a GPU that Triton knows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import Tensor

from ..fast.choice import _by_triton, _compiled
from ..fast.compiling import chosen_method, followed, fusible
from ..fast.tiled import EAGER, Check, _tiled
from ..flow.path import MIN_SIGMA, Sigma, _sigmas_between, expand_sigma, posterior_means
from ..flow.policy import DXPolicy, Policy
from ..gaussians.mixture import GaussianMixture, TiltedMixture

Constrain = Callable[[Tensor, Tensor], Tensor]
FEW, FEW_TILTED = (
    2,
    4,
)  # substeps that are done sooner than the inner products (and a tilted mixture's components) are computed


def rollout(
    x0: Policy,
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
    """Integrate dx / dsigma = (x - E[x_0 | x, sigma]) / sigma from sigma down to sigma_end in Euler steps, with the posterior
    mean that the mixture predicted at the start implies on the way (GM-ODE of GMFlow, ICML 2025; the GM policy of pi-Flow), or
    with the x_0 of a DX policy.

    Args:
        x0: mixture of x_0 given (x, sigma), or a DX policy predicted there.
        x: (B, C, *S) at sigma.
        sigma, sigma_end: numbers, one per sample, or broadcastable to (B, 1, *S).
        substeps: number of Euler steps, at least 1; with 1 only the mixture's mean matters.
        shift: the steps are equal in unshifted time, see `shift_time`.
        constrain: called as constrain(x, sigma) after every substep; returns the x to go on with. For masks.
        check: called often, or once after a kernel that does it all; what it raises ends the rollout. For the user's
            interruption.
        method: one of METHODS; None takes the environment's GMFLOW_METHOD, or else the fastest for the tensors' device that
            compiles nothing on a CPU. Gradients, constraints, DX policies and single steps are always plain. Where a method
            cannot run, the log says so once and another takes its place.

    Returns:
        x at sigma_end, (B, C, *S).

    Raises:
        ValueError: `substeps` is no whole number or below 1, or there is no such method.
    """
    if not isinstance(substeps, int) or substeps < 1:
        raise ValueError(f"substeps is {substeps}; a whole number, at least 1, is needed")
    method = chosen_method(method)
    simple = substeps == 1 or constrain is not None or isinstance(x0, DXPolicy) or not x.numel()
    if simple or followed(x0, x, sigma, sigma_end):
        method = "plain"
    if (
        method is None
        and substeps <= (FEW_TILTED if isinstance(x0, TiltedMixture) else FEW)
        and not x.is_cuda
    ):
        method = "plain"
    if method == "plain":
        return _plain(x0, x, sigma, sigma_end, substeps, shift, constrain, check)
    if method == "compiled" and substeps <= FEW_TILTED:
        x = _few.compiled(x0, x, _sigmas_between(sigma, sigma_end, substeps, shift, x))
        if check is not None:
            check()
        return x
    sigma, sigma_end = (
        expand_sigma(each, x) if isinstance(each, Tensor) else each for each in (sigma, sigma_end)
    )
    if method == "triton" or (method is None and x.is_cuda):
        done = _by_triton(x0, x, sigma, sigma_end, substeps, shift)
        if done is not None:
            if check is not None:
                check()
            return done
    arguments = x0, x, sigma, sigma_end, substeps, shift, check
    if method == "compiled":
        done = _compiled(*arguments)
        if done is not None:
            return done
    return _tiled(*arguments, EAGER)


# The definition
def _plain(
    x0: Policy,
    x: Tensor,
    sigma: Sigma,
    sigma_end: Sigma,
    substeps: int,
    shift: float,
    constrain: Constrain | None,
    check: Check | None,
) -> Tensor:
    return _follow(x0, x, _sigmas_between(sigma, sigma_end, substeps, shift, x), constrain, check)


def _follow(
    x0: Policy,
    x: Tensor,
    sigmas: tuple[Sigma, ...],
    constrain: Constrain | None = None,
    check: Check | None = None,
) -> Tensor:
    later_mean = _means_along(x0, x, sigmas[0]) if len(sigmas) > 2 else None
    for substep, (now, following) in enumerate(itertools.pairwise(sigmas)):
        mean = x0.mean() if substep == 0 else later_mean(x, now)
        kept = following / (
            now.clamp(min=MIN_SIGMA) if isinstance(now, Tensor) else max(now, MIN_SIGMA)
        )
        x = mean + kept * (x - mean)
        if constrain is not None:
            x = constrain(x, expand_sigma(following, x))
        if check is not None:
            check()
    return x


@fusible
def _few(x0: GaussianMixture, x: Tensor, sigmas: tuple[Sigma, ...]) -> Tensor:
    """A rollout of few substeps, which are written out. What the sigmas are made from stays outside: compiled, it would be
    computed again for every few pixels."""
    return _follow(x0, x, sigmas)


def _means_along(x0: Policy, x: Tensor, sigma: Sigma) -> Callable[[Tensor, Sigma], Tensor]:
    """The mean of x_0 as a function of (x, sigma), from a policy predicted at (x, sigma)."""
    if isinstance(x0, DXPolicy):
        return lambda x, sigma: x0.at(sigma)
    return posterior_means(x0, x, sigma)
