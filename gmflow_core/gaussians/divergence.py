"""Entropy and Kullback-Leibler divergence of mixtures, per pixel: bounds and estimates.

Neither has a closed form for more than one component. The bounds are closed forms of all pairs of
components (K K' C floats per pixel); the estimates are means of seeded draws. Both are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .density import LOG_2PI
from .mixture import GaussianMixture, Mixture
from .products import differences, log_normal
from .tensors import widest

POWERS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # of `_most_expected`; the least bound counts
ROUNDS = 20  # of `_variational_bound`
LEAST_LOG_WEIGHT = -1e4  # for weights of 0, so that no difference of infinities comes up
ELEMENTS = 2**20  # of the means that are drawn from at a time


class Bounds(NamedTuple):
    """Lower and upper bound of a quantity per pixel, (B, *S) each, in nats."""

    lower: Tensor
    upper: Tensor


class Estimate(NamedTuple):
    """Estimate of a quantity per pixel from draws, and its standard error, (B, *S) each."""

    value: Tensor
    standard_error: Tensor


def entropy_bounds(mixture: Mixture) -> Bounds:
    """Return closed bounds of the differential entropy.

    Lower: the larger of the bound from Bhattacharyya distances (Kolchinsky & Tracey 2017) and that
    of `_most_expected`. Upper: the smaller of the bound from Kullback-Leibler divergences (same
    source) and the entropy of a Gaussian with the mixture's covariance. Both are exact for one
    component, and approach each other as components lie far apart.
    """
    p = _floored(mixture)
    weights, pairs = p.weights, _Pairs.of(p, p)
    near = (pairs.log_weights - pairs.distance / (8 * p.var.unsqueeze(2))).logsumexp(2)
    by_distance = _own_entropy(p) - _mean_over(weights, near)
    lower = torch.maximum(by_distance, -_mean_over(weights, _most_expected(p, pairs)))
    _, log_det = torch.linalg.slogdet(p.covariance())  # (B, *S)
    gaussian = 0.5 * (log_det + p.means.shape[2] * (1 + LOG_2PI))
    upper = torch.minimum(gaussian, -_mean_over(weights, _least_expected(p, pairs)))
    return Bounds(lower, upper)


def kl_bounds(p: Mixture, q: Mixture) -> Bounds:
    """Return closed bounds of the divergence D(p || q).

    Upper: the smaller of the variational bound (Hershey & Olsen 2007), which is 0 for equal
    mixtures up to its convergence, and minus the lower bounds of p's entropy and of E_p[log q].
    Lower: the larger of minus the upper bounds of those two and `_gaussian_bound`, and at least 0.
    Both are exact for one component each.

    Raises:
        ValueError: the mixtures' shapes differ.
    """
    p, q = _floored(p), _floored(q)
    pairs, entropy = _Pairs.of(p, q), entropy_bounds(p)
    most, least = (
        _mean_over(p.weights, each(p, pairs)) for each in (_most_expected, _least_expected)
    )
    upper = torch.minimum(-entropy.lower - least, _variational_bound(p, q, pairs))
    lower = torch.maximum(-entropy.upper - most, _gaussian_bound(p, q))
    return Bounds(lower.clamp(min=0), upper)


def entropy(
    mixture: Mixture, draws: int = 1000, generator: torch.Generator | None = None
) -> Estimate:
    """Estimate the differential entropy, E[-log p], from draws of the mixture.

    Args:
        draws: number of draws per pixel, at least 2.
        generator: source of the draws, on any device; torch's if None.

    Raises:
        ValueError: `draws` is below 2.
    """
    return _estimate(mixture, lambda own, x: -own.log_prob(x), draws, generator)


def kl_divergence(
    p: Mixture, q: Mixture, draws: int = 1000, generator: torch.Generator | None = None
) -> Estimate:
    """Estimate the divergence D(p || q) = E_p[log p - log q] from draws of p.

    An estimate can be below 0, which the divergence is not.

    Args:
        draws, generator: as for `entropy`.

    Raises:
        ValueError: `draws` is below 2, or the mixtures' shapes differ.
    """
    q = q.components()
    differences(p.components(), q)

    def log_ratio(own: GaussianMixture, x: Tensor) -> Tensor:
        other = _repeated(q, len(x) // len(q.means))
        return own.log_prob(x) - other.log_prob(x)

    return _estimate(p, log_ratio, draws, generator)


# Bounds


class _Pairs(NamedTuple):
    """What bounds need of the pairs of components of p and q.

    Args:
        distance: |m - m'|^2, (B, K, K', 1, *S).
        var: of q's components, (B, 1, 1, 1, *S).
        log_weights: of q's components, (B, 1, K', 1, *S).
        channels: C.
    """

    distance: Tensor
    var: Tensor
    log_weights: Tensor
    channels: int

    @classmethod
    def of(cls, p: GaussianMixture, q: GaussianMixture) -> _Pairs:
        """Return the pairs of p and q."""
        offsets = differences(p, q)
        distance = offsets.square().sum(3, keepdim=True)
        return cls(distance, q.var.unsqueeze(2), q.log_weights.unsqueeze(1), offsets.shape[3])


def _most_expected(p: GaussianMixture, pairs: _Pairs) -> Tensor:
    """Return an upper bound of E_f[log q] for every component f of p, (B, K, 1, *S).

    By Jensen's inequality, for every r > 0, E_f[log q] is at most the logarithm of the integral of
    f^r q, plus (1 - r) E_f[log f]. For Gaussians this is
    log sum_k' w_k' N(m; m', v / r + v') - C / 2 (1 - r + log r). r = 1 is the product bound; large
    ones are tighter for mixtures that lie far apart.
    """
    bounds = []
    for r in POWERS:
        var = p.var.unsqueeze(2) / r + pairs.var
        density = log_normal(pairs.distance, var, pairs.channels)
        constant = 0.5 * pairs.channels * (1 - r + math.log(r))
        bounds.append((pairs.log_weights + density).logsumexp(2) - constant)
    return torch.stack(bounds).amin(0)


def _least_expected(p: GaussianMixture, pairs: _Pairs) -> Tensor:
    """Return a lower bound of E_f[log q] for every component f of p, (B, K, 1, *S).

    It is log sum_k' w_k' exp(E_f[log g_k']) (Hershey & Olsen 2007).
    """
    distance = pairs.distance + pairs.channels * p.var.unsqueeze(2)  # E |x - m'|^2
    density = log_normal(distance, pairs.var, pairs.channels)
    return (pairs.log_weights + density).logsumexp(2)


def _variational_bound(p: GaussianMixture, q: GaussianMixture, pairs: _Pairs) -> Tensor:
    """Return the variational upper bound of D(p || q), (B, *S) (Hershey & Olsen 2007).

    It couples components of p and q; ROUNDS rounds improve the coupling, from the independent one.
    Every round's is a bound.
    """
    ratio = p.var.unsqueeze(2) / pairs.var
    divergence = 0.5 * (
        pairs.distance / pairs.var + pairs.channels * (ratio - 1 - ratio.log())
    )  # of every pair
    log_weights = p.log_weights.unsqueeze(2)
    coupling = log_weights + pairs.log_weights
    for _ in range(ROUNDS):
        share = pairs.log_weights + coupling - coupling.logsumexp(1, keepdim=True) - divergence
        total = share.logsumexp(2, keepdim=True)
        coupling = log_weights + share - total
    return _mean_over(p.weights, (log_weights - total).squeeze(2))


def _gaussian_bound(p: GaussianMixture, q: GaussianMixture) -> Tensor:
    """Return the lower bound E_p[t] - log E_q[exp t] of D(p || q), (B, *S) (Donsker & Varadhan).

    t is the log-ratio of the isotropic Gaussians with the moments of p and q. E_p[t] is their
    divergence, and E_q[exp t] a sum over q's components.
    """
    near, far, channels = p.moment_match(), q.moment_match(), p.means.shape[2]
    offset, ratio = near.mean - far.mean, near.var / far.var
    distance = offset.square().sum(1, keepdim=True)
    divergence = 0.5 * (distance / far.var + channels * (ratio - 1 - ratio.log()))
    slope, quadratic = offset / near.var, near.var.reciprocal() - far.var.reciprocal()
    means, var = q.means - far.mean.unsqueeze(1), q.var.squeeze(1)
    scale = 1 + var * quadratic  # positive, as q's variance is at least its components'
    inner = (means * (slope.unsqueeze(1) - 0.5 * quadratic.unsqueeze(1) * means)).sum(2)
    exponent = (inner + 0.5 * (var * slope.square()).sum(1, keepdim=True)) / scale
    exponent = (q.log_weights.squeeze(2) + exponent).logsumexp(1, keepdim=True)
    constant = 0.5 * (distance / near.var + channels * (ratio.log() + scale.log()))
    return (divergence - exponent + constant).squeeze(1)


def _own_entropy(p: GaussianMixture) -> Tensor:
    """Return the entropy of p's components, broadcastable to (B, *S)."""
    channels = p.means.shape[2]
    return (channels * (p.log_std + 0.5 * (1 + LOG_2PI))).squeeze((1, 2))


def _mean_over(weights: Tensor, values: Tensor) -> Tensor:
    """Return the mean over components, (B, K, 1, *S) -> (B, *S)."""
    return (weights * values).sum((1, 2))


def _floored(mixture: Mixture) -> GaussianMixture:
    """Return the mixture with finite log-weights."""
    own = mixture.components()
    return GaussianMixture(own.means, own.log_weights.clamp(min=LEAST_LOG_WEIGHT), own.log_std)


# Estimates


def _estimate(
    mixture: Mixture,
    quantity: Callable[[GaussianMixture, Tensor], Tensor],
    draws: int,
    generator: torch.Generator | None,
) -> Estimate:
    """Return mean and standard error of quantity(mixture, x) over draws x of the mixture."""
    if draws < 2:
        raise ValueError(f"draws is {draws}; at least 2 are needed for a standard error")
    own, values = mixture.components(), []
    most = max(1, ELEMENTS // own.means.numel())
    for start in range(0, draws, most):
        many = _repeated(own, min(most, draws - start))
        found = quantity(many, many.sample(generator))
        values.append(found.unflatten(0, (-1, len(own.means))))
    values = torch.cat(values).to(widest(own.means.device))  # (draws, B, *S)
    error = values.std(0) / math.sqrt(draws)
    return Estimate(values.mean(0).to(own.means), error.to(own.means))


def _repeated(mixture: GaussianMixture, count: int) -> GaussianMixture:
    """Return the mixture's batch `count` times over, (count B, K, C, *S)."""
    full = mixture.log_std.expand(len(mixture.means), *mixture.log_std.shape[1:])
    parts = (mixture.means, mixture.log_weights, full)
    return GaussianMixture(*(part.repeat(count, *[1] * (part.ndim - 1)) for part in parts))
