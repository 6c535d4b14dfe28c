"""Follow a policy: Euler steps with the x_0 that it gives on the way, between two network calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor

from .blended import BlendedPolicy, Followed
from .path import Sigma, expand_sigma, positive, posterior_means
from .policy import ArcPolicy, DXPolicy

Constrain = Callable[[Tensor, Tensor], Tensor]
Check = Callable[[], None]


def follow(
    x0: Followed,
    x: Tensor,
    sigmas: Sequence[Sigma],
    constrain: Constrain | None = None,
    check: Check | None = None,
) -> Tensor:
    """Take an Euler step from each of `sigmas` to the next; arguments as in `rollout`."""
    mean_at = means_along(x0, x, sigmas[0]) if len(sigmas) > 2 else None
    # the posterior at the start is the mixture itself
    return follow_means(mean_at, x, sigmas, x0.mean(), constrain, check)


def follow_means(
    mean_at: Callable[[Tensor, Sigma], Tensor] | None,
    x: Tensor,
    sigmas: Sequence[Sigma],
    mean: Tensor | None = None,
    constrain: Constrain | None = None,
    check: Check | None = None,
) -> Tensor:
    """Take Euler steps with E[x_0 | x, sigma] as `means_along` returns it.

    Args:
        mean_at: called as mean_at(x, sigma).
        x: (B, C, *S) at the first of `sigmas`, which need not be the place of the prediction.
        mean: its value there, if it is known.
        others: as in `rollout`.
    """
    for step, (now, following) in enumerate(itertools.pairwise(sigmas)):
        if step > 0 or mean is None:
            mean = mean_at(x, now)
        x = mean + following / positive(now) * (x - mean)
        x = settled(x, following, constrain, check)
    return x


def settled(x: Tensor, sigma: Sigma, constrain: Constrain | None, check: Check | None) -> Tensor:
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
