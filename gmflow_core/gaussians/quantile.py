"""Normal scores and quantiles of 1-D Gaussian mixtures.

These are the two directions of the Knothe-Rosenblatt map (`transport.py`) along one axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import hardshrink, softshrink

from .tensors import where_it_is_known

FIRST_STEPS = 2  # enough for most pixels
MAX_STEPS = 94  # a bound: bisection alone ends sooner
FEW_PIXELS = 8  # below this number, unconverged pixels are not gathered


def normal_cdf(x: Tensor) -> Tensor:
    """Return Phi(x), accurate in the lower tail (torch's ndtr is 0 below -5.5 in float32)."""
    return 0.5 * torch.erfc(x * -math.sqrt(0.5))


def normal_score(weights: Tensor, offsets: Tensor) -> Tensor:
    """Return Phi^-1(sum_k w_k Phi(offset_k)), computed from the smaller tail.

    Args:
        weights: (B, K, *S), normalised over K.
        offsets: (B, K, *S), distances from the components' means in standard deviations.

    Returns:
        (B, *S).
    """
    below, above = ((weights * normal_cdf(each)).sum(1) for each in (offsets, -offsets))
    tail = torch.minimum(below, above).clamp(min=torch.finfo(below.dtype).tiny)
    score = where_it_is_known(torch.special.ndtri, tail)
    return torch.where(below < above, score, -score)


def mixture_quantile(
    means: Tensor,
    std: Tensor,
    log_weights: Tensor,
    z: Tensor,
    solve: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the quantile of a 1-D mixture at level Phi(z).

    Beyond |z| = 10 (25.8 in float64) probabilities underflow; there the tail continues as that of
    one component. Gradients come from one exact Newton step (implicit function theorem).

    Args:
        means: (B, K, *S).
        std: standard deviation of all components, broadcastable to (B, 1, *S).
        log_weights: (B, K, *S), up to a constant.
        z: (B, *S).
        solve: finds the quantile, with the arguments and result of `solve_quantile`, the default.

    Returns:
        (B, *S).
    """
    z = z.unsqueeze(1)
    with torch.no_grad():
        x = (solve or solve_quantile)(means, std, log_weights, z)
    inputs = (means, std, log_weights, z)
    if torch.is_grad_enabled() and any(each.requires_grad for each in inputs):
        unit, level = tail_unit(std, z)
        weights, distance = log_weights.softmax(1), (x - means) / unit
        slope = (weights * (-distance.square()).exp()).sum(1, keepdim=True)
        slope = (slope * (2 / math.sqrt(math.pi))).clamp(min=torch.finfo(slope.dtype).tiny)
        excess = (weights * distance.erfc()).sum(1, keepdim=True) - level.erfc()
        x = x + (excess - excess.detach()) * (unit / slope).detach()
    return torch.addcmul(x, std, softshrink(z, math.sqrt(2) * largest_level(z))).squeeze(1)


def tail_unit(std: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale the quantile equation so that only the upper tail is solved.

    Returns the unit of length and the level. In this unit, signed as z is, a component's tail on
    the side of z is erfc / 2, and the quantile solves sum_k w_k erfc(x - mean_k) = erfc(level) with
    level = |z| / sqrt(2) >= 0.
    """
    level = (math.sqrt(0.5) * z.abs()).clamp(max=largest_level(z))
    return torch.copysign(math.sqrt(2) * std, z), level


def underflow(like: Tensor) -> float:
    """Return the x beyond which erfc(x) and exp(-x^2) count as constant.

    It stays short of denormal numbers, which take many times as long to compute with.
    """
    return 9.0 if like.dtype == torch.float32 else 26.0


def largest_level(like: Tensor) -> float:
    """Return the largest level of `tail_unit`, one unit short of `underflow`."""
    return underflow(like) - 1


def solve_quantile(
    means: Tensor,
    std: Tensor,
    log_weights: Tensor,
    z: Tensor,
    start: Callable[..., tuple[Tensor, ...]] | None = None,
    improve: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Solve for the quantile with safeguarded fourth-order steps; no gradient.

    Householder's series (Newton's step, the curvature, its change) on the logarithm of the tail
    starts from the quantile of the moment-matched Gaussian and needs two steps as a rule. The
    quantile lies between the smallest and the largest quantile of the single components, and every
    step narrows that bracket; a step longer than half of it (in a gap without density) becomes a
    bisection. Converged pixels drop out: finding them forces a GPU sync.

    Args:
        means, log_weights: (B, K, *S).
        std: broadcastable to (B, 1, *S).
        z: (B, 1, *S).
        start, improve: `start_quantile` and `improve_quantile`, the defaults, or equal functions.

    Returns:
        (B, 1, *S).
    """
    start, improve = start or start_quantile, improve or improve_quantile
    unit, state, means, weights, far = start(*flatten_pixels(means, std, log_weights, z))
    x, pixels = state[0], None
    for _ in range(MAX_STEPS):
        left = far.nonzero().squeeze(1)
        if not len(left):
            break
        if FEW_PIXELS <= 2 * len(left) <= len(far):  # go on with the unconverged pixels alone
            x = state[0] if pixels is None else x.index_copy_(0, pixels, state[0])
            pixels = left if pixels is None else pixels.index_select(0, left)
            state, means, weights = (t.index_select(1, left) for t in (state, means, weights))
        state, far = improve(state, means, weights)
    x = state[0] if pixels is None else x.index_copy_(0, pixels, state[0])
    return (x * unit).reshape(z.shape)


def flatten_pixels(
    means: Tensor, std: Tensor, log_weights: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flatten batch and space into one pixel dimension: (K, n), (n,), (K, n), (n,)."""
    means, log_weights = (
        each.movedim(1, 0).reshape(means.shape[1], -1) for each in (means, log_weights)
    )
    return means, std.expand(z.shape).reshape(-1), log_weights, z.reshape(-1)


def gaussian_and_erfc(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(-x^2) and erfc(x)."""
    return (x * x).mul_(-math.log2(math.e)).exp2_(), x.erfc()


def bracket_quantile(
    means: Tensor, std: Tensor, log_weights: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Bracket n quantiles, arguments as `flatten_pixels` returns them.

    Returns:
        Unit (n,); state (4, n): the moment-matched Gaussian's quantile, the lower and upper end of
        the bracket, and the tail to reach; means (K, n) in that unit; weights (K, n).
    """
    unit, level = tail_unit(std, z)
    means, weights = means / unit, log_weights.softmax(0)
    goal, numbers = level.erfc(), torch.finfo(level.dtype)
    mean = (means * weights).sum(0)
    var = (means - mean).square_().mul_(weights).sum(0).add_(0.5)
    # negligible components would stretch the bracket over gaps that Newton steps do not cross
    negligible = weights < (goal * (numbers.eps / len(means))).clamp_(min=numbers.tiny)
    away = negligible.to(weights.dtype).mul_(numbers.max / 2)
    low, high = (means + away).amin(0).add_(level), (means - away).amax(0).add_(level)
    x = torch.addcmul(mean, var.mul_(2).sqrt_(), level).clamp_(low, high)
    return unit, torch.stack([x, low, high, goal]), means, weights


def start_quantile(
    means: Tensor,
    std: Tensor,
    log_weights: Tensor,
    z: Tensor,
    special: Callable[[Tensor], tuple[Tensor, Tensor]] = gaussian_and_erfc,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Bracket n quantiles and take the first steps towards them.

    Returns:
        As `bracket_quantile`, with x after FIRST_STEPS steps; and which pixels need more, (n,).
    """
    unit, state, means, weights = bracket_quantile(means, std, log_weights, z)
    for _ in range(FIRST_STEPS):
        state, far = improve_quantile(state, means, weights, special)
    return unit, state, means, weights, far


def improve_quantile(
    state: Tensor,
    means: Tensor,
    weights: Tensor,
    special: Callable[[Tensor], tuple[Tensor, Tensor]] = gaussian_and_erfc,
) -> tuple[Tensor, Tensor]:
    """Take one safeguarded step of `solve_quantile`.

    Args:
        state: x, lower end, upper end, goal, (4, n).
        means, weights: (K, n).
        special: `gaussian_and_erfc`, or an equal function.

    Returns:
        The state after the step; and whether x was still far from the quantile before it, (n,).
    """
    x, low, high, goal = state.unbind(0)
    limit, eps = underflow(x), torch.finfo(x.dtype).eps
    close = eps ** (1 / 4)  # the error after a step is about the fourth power of that before
    distance = (x - means).clamp_(-limit, limit)
    density, tail = special(distance)
    density = density * weights
    slope = density.sum(0)
    bend, twist = density.mul_(distance).sum(0), density.mul_(distance).sum(0)
    tail = (tail * weights).sum(0)
    excess = hardshrink((tail / goal).log_(), 2 * eps)  # smaller values are rounding errors
    per_slope = slope.reciprocal_()
    newton = tail.mul_(per_slope).mul_(0.5 * math.sqrt(math.pi)).clamp_(max=1e17)  # square: finite
    second = bend.mul_(per_slope).mul_(newton).sub_(0.5)
    third = twist.mul_(per_slope).mul_(-2).add_(1).mul_(newton).mul_(newton).add_(0.5).mul_(1 / 3)
    third = third.add_(second).addcmul_(second, second, value=2)
    step = third.mul_(excess).add_(second).mul_(excess).clamp_(-0.5, 1).add_(1)
    step = step.mul_(newton).mul_(excess)
    up = step.sign().clamp_(min=0)  # 1 where x is too low; lerp with it selects
    low, high = torch.lerp(low, x, up), torch.lerp(x, high, up)
    middle, size = torch.lerp(low, high, 0.5), step.abs()
    bisect = torch.sub(size, (middle - x).abs_().clamp_(min=close)).sign_().clamp_(min=0)
    new = torch.lerp(step.add_(x).clamp_(low, high), middle, bisect)
    far = (size > close) & (new != x)  # new == x where the ends are neighbouring numbers
    return torch.stack([new, low, high, goal]), far
