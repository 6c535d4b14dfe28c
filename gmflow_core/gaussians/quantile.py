"""Mixtures in one dimension and the normal distribution: quantiles and normal scores, the two directions of
`GaussianMixture`'s Knothe-Rosenblatt map along one axis."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import hardshrink, softshrink

from ..fast.compiling import compiles, fusible

STEPS = 24  # enough for 64 components at 10,000 standard deviations from each other
FIRST = 2  # of them, which most pixels need
FEW = 8  # pixels that are not worth being sorted out
ERFCX = (  # coefficients of exp(x^2) erfc(x) / t, the lowest first: see `erfc_by_polynomial`
    0.394955968, 0.394244549, 0.306768922, 0.0455754774, 0.127993712, -0.806998324,
    0.649320037, 0.226533396, -0.628884469, 0.365011722, -0.0745210096,
)  # fmt: skip
EXP2 = (  # of 2^x: see `exp2_by_polynomial`
    1.0, 0.693147206, 0.240226469, 0.0555032878, 0.00961848896, 0.00133999312, 0.000153458116,
)  # fmt: skip


def normal_cdf(x: Tensor) -> Tensor:
    """Phi(x), exact in the lower tail too (torch's own ndtr is 0 below -5.5 in float32)."""
    return 0.5 * torch.erfc(x * -math.sqrt(0.5))


def normal_score(weights: Tensor, offsets: Tensor) -> Tensor:
    """Phi^-1(sum_k w_k Phi(offset_k)), through the nearer tail: (B, K, *S) -> (B, *S)."""
    below, above = ((weights * normal_cdf(each)).sum(1) for each in (offsets, -offsets))
    score = torch.special.ndtri(
        torch.minimum(below, above).clamp(min=torch.finfo(below.dtype).tiny)
    )
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
    with torch.no_grad():
        x = _quantile(means, std, log_weights, z, drop_out=z.device.type == "cpu")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (means, std, log_weights, z)):
        unit, level = _standard(z, std)
        weights, distance = log_weights.softmax(1), (x - means) / unit
        slope = (weights * (-distance.square()).exp()).sum(1, keepdim=True) * (
            2 / math.sqrt(math.pi)
        )
        excess = (weights * distance.erfc()).sum(1, keepdim=True) - level.erfc()
        x = (
            x
            + (excess - excess.detach())
            * (unit / slope.clamp(min=torch.finfo(slope.dtype).tiny)).detach()
        )
    return torch.addcmul(x, std, softshrink(z, math.sqrt(2) * (_reach(z) - 1))).squeeze(1)


def _standard(z: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """The unit in which a component's tail on the side of z is erfc / 2, and its level, short of where probabilities end."""
    return torch.copysign(math.sqrt(2) * std, z), (math.sqrt(0.5) * z.abs()).clamp(
        max=_reach(z) - 1
    )


def _quantile(means: Tensor, std: Tensor, log_weights: Tensor, z: Tensor, drop_out: bool) -> Tensor:
    """The quantile (B, 1, *S), arguments as of `mixture_quantile`, but z: (B, 1, *S). In units of `_standard` it is the x with
    sum_k w_k erfc(x - mean_k) = erfc(level), level >= 0.

    A fourth-order step (Householder's series: Newton's, the curvature, its change) on the logarithm of the tail, from the
    quantile of the moment-matched Gaussian; two evaluations as a rule. x lies between the smallest and the largest of the own
    quantiles mean_k + level of the components that matter, and every evaluation narrows that bracket; a step of more than half
    of it (as in a gap without density) is replaced by bisection.

    Args:
        drop_out: pixels leave when they have converged. To know them a GPU has to be waited for; without, all take STEPS steps.
    """
    shape, components = z.shape, means.shape[1]
    means, log_weights = (
        each.movedim(1, 0).reshape(components, -1) for each in (means, log_weights)
    )
    unit, state, means, weights, far = _start(
        means, std.expand(shape).reshape(-1), log_weights, z.reshape(-1)
    )
    x, pixels = state[0], None
    together = 3 if compiles() else 1  # where to call costs more than some steps of few pixels
    for _ in range(math.ceil(((4 * STEPS if drop_out else STEPS) - FIRST) / together)):
        if drop_out:
            left = far.nonzero().squeeze(1)
            if not len(left):
                break
            if FEW <= 2 * len(left) <= len(far):
                x = state[0] if pixels is None else x.index_copy_(0, pixels, state[0])
                pixels = left if pixels is None else pixels.index_select(0, left)
                state, means, weights = (
                    each.index_select(1, left) for each in (state, means, weights)
                )
        state, far = _improve(state, means, weights, together)
    x = state[0] if pixels is None else x.index_copy_(0, pixels, state[0])
    return (x * unit).reshape(shape)


@fusible
def _start(
    means: Tensor, std: Tensor, log_weights: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The first FIRST evaluations of n quantiles, from (K, n) twice and (n,) twice.

    Returns:
        the unit (n,); `_improve`'s state, means and weights; and which pixels need more.
    """
    unit, level = _standard(z, std)
    means, weights = means / unit, log_weights.softmax(0)
    goal, numbers = _erfc(level), torch.finfo(level.dtype)
    mean = (means * weights).sum(0)
    var = (means - mean).square_().mul_(weights).sum(0).add_(0.5)
    # components that do not matter would stretch the bracket over gaps that Newton's steps do not cross
    matter = (goal * (numbers.eps / len(means))).clamp_(min=numbers.tiny)
    away = _positive(matter - weights).to(weights.dtype).mul_(numbers.max / 2)
    low, high = (means + away).amin(0).add_(level), (means - away).amax(0).add_(level)
    state = torch.stack(
        [torch.addcmul(mean, var.mul_(2).sqrt_(), level).clamp_(low, high), low, high, goal]
    )
    state, far = _improve(state, means, weights, FIRST)
    return unit, state, means, weights, far


@fusible
def _improve(state: Tensor, means: Tensor, weights: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """So many steps.

    Args:
        state: x, its bracket, and the tail to reach, (4, n).
        means, weights: (K, n).

    Returns:
        the state after them, and whether x was still far from the quantile before the last, (n,).
    """
    for _ in range(steps):
        state, far = _step(state, means, weights)
    return state, far


def _step(state: Tensor, means: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """See `_improve`."""
    x, low, high, goal = state.unbind(0)
    reach, eps = _reach(x), torch.finfo(x.dtype).eps
    close = eps ** (1 / 4)  # the error after a step is about the fourth power of that before
    distance = (x - means).clamp_(-reach, reach)
    gauss = _gauss(distance)
    density = gauss * weights
    slope, bend, twist = (
        density.sum(0),
        density.mul_(distance).sum(0),
        density.mul_(distance).sum(0),
    )
    tail = _erfc(distance, gauss).mul_(weights).sum(0)
    excess = hardshrink((tail / goal).log_(), 2 * eps)  # less is a rounding error
    per_slope = slope.reciprocal_()
    newton = (
        tail.mul_(per_slope).mul_(0.5 * math.sqrt(math.pi)).clamp_(max=1e17)
    )  # whose square is finite
    second = bend.mul_(per_slope).mul_(newton).sub_(0.5)
    third = twist.mul_(per_slope).mul_(-2).add_(1).mul_(newton).mul_(newton).add_(0.5).mul_(1 / 3)
    third = third.add_(second).addcmul_(second, second, value=2)
    move = (
        third.mul_(excess)
        .add_(second)
        .mul_(excess)
        .clamp_(-0.5, 1)
        .add_(1)
        .mul_(newton)
        .mul_(excess)
    )
    upwards = _positive(move)
    low, high = _choose(upwards, x, low), _choose(upwards, high, x)
    halfway, size = torch.lerp(low, high, 0.5), move.abs()
    bisect = _positive(torch.sub(size, (halfway - x).abs_().clamp_(min=close)))
    new = _choose(bisect, halfway, move.add_(x).clamp_(low, high))
    far = (size > close) & (new != x)  # unless the bracket is one of neighbouring numbers
    return torch.stack([new, low, high, goal]), far


def _positive(x: Tensor) -> Tensor:
    """Where x > 0: 1 and 0, or, where it is compiled, true and false."""
    return x > 0 if torch.compiler.is_compiling() else x.sign().clamp_(min=0)


def _choose(which: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where `_positive` says so, elsewhere b. Where it is not compiled torch.where takes several times as long."""
    return torch.where(which, a, b) if torch.compiler.is_compiling() else torch.lerp(b, a, which)


# In what torch.compile makes, torch's erfc takes about as long as the rest of a step, and exp2 is a call for every few numbers;
# there, in single precision, others take their place.
def _in_loops(x: Tensor) -> bool:
    return torch.compiler.is_compiling() and x.dtype == torch.float32


def _gauss(x: Tensor) -> Tensor:
    """exp(-x^2), x within `_reach`."""
    exponent = (x * x).mul_(-math.log2(math.e))
    return exp2_by_polynomial(exponent) if _in_loops(x) else exponent.exp2_()


def _erfc(x: Tensor, gauss: Tensor | None = None) -> Tensor:
    """erfc(x), x within `_reach`; `gauss` is exp(-x^2), where it is known."""
    if _in_loops(x):
        return erfc_by_polynomial(x, _gauss(x) if gauss is None else gauss)
    return x.erfc()


def exp2_by_polynomial(x: Tensor) -> Tensor:
    """2^x in single precision, -126 <= x < 127.5: a power of two, whose bits are the whole number next to x, times a polynomial
    in the rest, fitted for the least relative error: 3e-9, and 1e-7 as single precision computes it."""
    whole = x.round()
    rest = x - whole
    value = rest * EXP2[-1] + EXP2[-2]
    for coefficient in EXP2[-3::-1]:
        value = value * rest + coefficient
    return value * ((whole.to(torch.int32) + 127) << 23).view(torch.float32)


def erfc_by_polynomial(x: Tensor, gauss: Tensor) -> Tensor:
    """erfc(x) in single precision, from exp(-x^2): that times a polynomial in t = 1 / (1 + 0.7 |x|), fitted for the least
    relative error where |x| <= 9.2: 2e-8, and 2.5e-7 as single precision computes it."""
    t = 1 / (1 + 0.7 * x.abs())
    value = t * ERFCX[-1]
    for coefficient in ERFCX[-2::-1]:
        value = (value + coefficient) * t
    upper = value * gauss
    return torch.where(x < 0, 2 - upper, upper)


def _reach(like: Tensor) -> float:
    """Where erfc(x) and exp(-x^2) are taken for constant: short of denormal numbers, which take many times as long."""
    return 9.0 if like.dtype == torch.float32 else 26.0
