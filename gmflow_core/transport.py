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
    level = math.sqrt(0.5) * near.abs()
    with torch.no_grad():
        x = _quantile(means / unit, weights, level, drop_out=z.device.type == "cpu") * unit
    if torch.is_grad_enabled() and any(t.requires_grad for t in (means, std, log_weights, z)):
        distance = (x - means) / unit
        slope = (weights * (-distance.square()).exp()).sum(1, keepdim=True) * (2 / math.sqrt(math.pi))
        excess = (weights * distance.erfc()).sum(1, keepdim=True) - level.erfc()
        x = x + (excess - excess.detach()) * (unit / slope.clamp(min=torch.finfo(slope.dtype).tiny)).detach()
    return (x + std * (z - near)).squeeze(1)


def _quantile(means: Tensor, weights: Tensor, level: Tensor, drop_out: bool) -> Tensor:
    """x with sum_k w_k erfc(x - mean_k) = erfc(level): (B, K, *S) twice, else (B, 1, *S), as the result is; level >= 0.

    A fourth-order step (Householder's series: Newton's, the curvature, its change) on the logarithm of the tail, from the
    quantile of the moment-matched Gaussian; two evaluations as a rule. x lies between the smallest and the largest of the own
    quantiles mean_k + level of the components that matter, and every evaluation narrows that bracket; a step of more than half
    of it (as in a gap without density) is replaced by bisection.

    Args:
        drop_out: pixels leave when they have converged. To know them a GPU has to be waited for; without, all take STEPS steps.
    """
    shape, reach, eps = level.shape, _reach(level), torch.finfo(level.dtype).eps
    close = eps ** (1 / 4)  # the error after a step is about the fourth power of that before
    means, weights = (each.movedim(1, 0).reshape(each.shape[1], -1) for each in (means, weights))  # (K, n)
    level = level.flatten()  # (n,)
    goal = level.erfc()
    distance, density = torch.empty_like(means), torch.empty_like(means)  # room to work in
    mean = torch.mul(means, weights, out=distance).sum(0)
    var = torch.sub(means, mean, out=distance).square_().mul_(weights).sum(0).add_(0.5)
    # components that do not matter would stretch the bracket over gaps that Newton's steps do not cross
    matter = (goal * (eps / len(means))).clamp_(min=torch.finfo(level.dtype).tiny)
    away = torch.sub(matter, weights, out=density).sign_().clamp_(min=0).mul_(torch.finfo(level.dtype).max / 2)
    low = torch.add(means, away, out=distance).amin(0).add_(level)
    high = torch.sub(means, away, out=distance).amax(0).add_(level)
    state = torch.stack([torch.addcmul(mean, var.mul_(2).sqrt_(), level).clamp_(low, high), low, high, goal])
    x, low, high, goal = state
    result, pixels = x, None
    for _ in range(4 * STEPS if drop_out else STEPS):
        torch.sub(x, means, out=distance).clamp_(-reach, reach)
        torch.mul(distance, distance, out=density).mul_(-math.log2(math.e)).exp2_().mul_(weights)
        slope, bend, twist = density.sum(0), density.mul_(distance).sum(0), density.mul_(distance).sum(0)
        tail = distance.erfc_().mul_(weights).sum(0)
        excess = hardshrink((tail / goal).log_(), 2 * eps)  # less is a rounding error
        newton = tail.div_(slope).mul_(0.5 * math.sqrt(math.pi)).clamp_(max=1e17)  # whose square is finite
        second = bend.div_(slope).mul_(newton).sub_(0.5)
        third = twist.div_(slope).mul_(-2).add_(1).mul_(newton).mul_(newton).add_(0.5).div_(3)
        third = third.add_(second).addcmul_(second, second, value=2)
        move = third.mul_(excess).add_(second).mul_(excess).clamp_(-0.5, 1).add_(1).mul_(newton).mul_(excess)
        upwards = move.sign().clamp_(min=0)
        torch.lerp(low, x, upwards, out=low)
        torch.lerp(x, high, upwards, out=high)
        halfway, size = torch.lerp(low, high, 0.5), move.abs()
        bisect = torch.sub(size, (halfway - x).abs_().clamp_(min=close)).sign_().clamp_(min=0)
        new = torch.lerp(move.add_(x).clamp_(low, high), halfway, bisect)
        far = (size > close) & (new != x)  # unless the bracket is one of neighbouring numbers
        x.copy_(new)
        if drop_out:
            left = far.nonzero().squeeze(1)
            if 2 * len(left) <= len(x):
                result = x if pixels is None else result.index_copy_(0, pixels, x)
                pixels = left if pixels is None else pixels.index_select(0, left)
                x, low, high, goal = state = state.index_select(1, left)
                means, weights = means.index_select(1, left), weights.index_select(1, left)
                distance, density = torch.empty_like(means), torch.empty_like(means)
            if len(left) == 0:
                break
    return (x if pixels is None else result.index_copy_(0, pixels, x)).reshape(shape)


def _reach(like: Tensor) -> float:
    """Where erfc(x) and exp(-x^2) are taken for constant: short of denormal numbers, which take many times as long."""
    return 9.0 if like.dtype == torch.float32 else 26.0
