"""Mixtures in one dimension and the normal distribution: quantiles and normal scores, the two directions of
`GaussianMixture`'s Knothe-Rosenblatt map along one axis."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

STEPS = 24  # enough for 64 components at 10,000 standard deviations from each other


def normal_cdf(x: Tensor) -> Tensor:
    """Phi(x), exact in the lower tail too (torch's own ndtr is 0 below -5.5 in float32)."""
    return 0.5 * torch.erfc(x * -math.sqrt(0.5))


def normal_score(weights: Tensor, offsets: Tensor) -> Tensor:
    """Phi^-1(sum_k w_k Phi(offset_k)), through the nearer tail: (B, K, *S) -> (B, *S)."""
    below, above = ((weights * normal_cdf(each)).sum(1) for each in (offsets, -offsets))
    score = torch.special.ndtri(torch.minimum(below, above).clamp(min=torch.finfo(below.dtype).tiny))
    return torch.where(below < above, score, -score)


def mixture_quantile(means: Tensor, std: Tensor, log_weights: Tensor, z: Tensor) -> Tensor:
    """The quantile of a 1-D mixture at level Phi(z). From |z| = 11 on (35 in float64), where probabilities come to their end,
    the tail goes on as that of one component.

    Gradients in all arguments come from one last, exact Newton step (implicit function theorem).

    Args:
        means, log_weights: (B, K, *S), the latter up to a constant; std: broadcastable to (B, 1, *S); z: (B, *S).

    Returns:
        (B, *S).
    """
    z = z.unsqueeze(1)
    near = z.clamp(-math.sqrt(2) * (_reach(z) - 1), math.sqrt(2) * (_reach(z) - 1))
    weights = log_weights.softmax(1)
    unit = torch.copysign(math.sqrt(2) * std, z)  # in which a component's tail on the side of z is erfc / 2
    goal = (math.sqrt(0.5) * near.abs()).erfc()
    with torch.no_grad():
        x = _quantile(means, weights, std, unit, near, goal, drop_out=z.device.type == "cpu")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (means, std, log_weights, z)):
        distance = (x - means) / unit
        slope = (weights * (-distance.square()).exp()).sum(1, keepdim=True) * (2 / math.sqrt(math.pi))
        excess = (weights * distance.erfc()).sum(1, keepdim=True) - goal
        x = x + (excess - excess.detach()) * (unit / slope.clamp(min=1e-30)).detach()
    return (x + std * (z - near)).squeeze(1)


def _quantile(means: Tensor, weights: Tensor, std: Tensor, unit: Tensor, z: Tensor, goal: Tensor, drop_out: bool) -> Tensor:
    """x with sum_k w_k erfc((x - mean_k) / unit) = goal: (B, K, *S) twice, else broadcastable to (B, 1, *S), as the result is.

    Chebyshev's method (Newton's and the curvature) on the logarithm of the tail, from the quantile of the moment-matched
    Gaussian; two or three evaluations as a rule. x lies between the smallest and the largest of the own quantiles
    mean_k + std z of the components that matter, and every evaluation narrows that bracket; a step of more than half of it
    (as in a gap without density) is replaced by bisection.

    Args:
        drop_out: pixels leave when they have converged. To know them a GPU has to be waited for; without, all take STEPS steps.
    """
    shape, dtype, reach, eps = goal.shape, goal.dtype, _reach(goal), torch.finfo(goal.dtype).eps
    close = eps ** (1 / 3)  # the error after a step is about the third power of that before
    means, weights = (each.movedim(1, 0).reshape(each.shape[1], -1) for each in (means, weights))  # (K, n)
    std, unit, z, goal = (each.expand(shape).flatten() for each in (std, unit, z, goal))  # (n,)
    distance, density = torch.empty_like(means), torch.empty_like(means)  # room to work in
    mean = torch.mul(means, weights, out=distance).sum(0)
    var = torch.sub(means, mean, out=distance).square_().mul_(weights).sum(0) + std * std
    gone = weights <= goal * (eps / len(means))  # and would stretch the bracket over a gap that Newton's steps do not cross
    lowest, highest = (means.masked_fill(gone, end) for end in (math.inf, -math.inf))
    low, high = torch.addcmul(lowest.amin(0), std, z), torch.addcmul(highest.amax(0), std, z)
    state = torch.stack([torch.addcmul(mean, var.sqrt_(), z).clamp_(low, high), low, high, unit, 1 / unit, goal])
    x, low, high, unit, rate, goal = state
    result, pixels = x, None
    for _ in range(4 * STEPS if drop_out else STEPS):
        torch.sub(x, means, out=distance).mul_(rate).clamp_(-reach, reach)
        torch.mul(distance, distance, out=density).neg_().exp_().mul_(weights)
        slope, bend = density.sum(0), density.mul_(distance).sum(0)
        tail = distance.erfc_().mul_(weights).sum(0)
        excess = hardshrink((tail / goal).log_(), 2 * eps)  # less is a rounding error
        newton = tail.div_(slope).mul_(0.5 * math.sqrt(math.pi))
        step = bend.div_(slope).mul_(newton).sub_(0.5).mul_(excess).clamp_(-0.5, 1).add_(1).mul_(newton).mul_(excess)
        move, far = step * unit, step.abs() > close
        upwards = (move > 0).to(dtype)
        torch.lerp(low, x, upwards, out=low)
        torch.lerp(x, high, upwards, out=high)
        halfway = torch.lerp(low, high, 0.5)
        bisect = (far & (move.abs() > (halfway - x).abs_())).to(dtype)
        new = torch.lerp(move.add_(x).clamp_(low, high), halfway, bisect)
        far &= new != x  # a bracket of neighbouring numbers
        x.copy_(new)
        if drop_out:
            left = far.nonzero().squeeze(1)
            if 2 * len(left) <= len(x):
                result = x if pixels is None else result.index_copy_(0, pixels, x)
                pixels = left if pixels is None else pixels.index_select(0, left)
                x, low, high, unit, rate, goal = state = state.index_select(1, left)
                means, weights = means.index_select(1, left), weights.index_select(1, left)
                distance, density = torch.empty_like(means), torch.empty_like(means)
            if len(left) == 0:
                break
    return (x if pixels is None else result.index_copy_(0, pixels, x)).reshape(shape)


def _reach(like: Tensor) -> float:
    """Where erfc(x) and exp(-x^2) are taken for constant: short of denormal numbers, which take many times as long."""
    return 9.0 if like.dtype == torch.float32 else 26.0
