"""Products of two mixtures, and mixtures with fewer components.

Pairs of components take K K' C floats per pixel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .density import LOG_2PI
from .mixture import GaussianMixture, Mixture


def mixture_product(a: Mixture, b: Mixture) -> GaussianMixture:
    """Multiply two mixtures' densities per pixel and renormalise.

    The product of component k of `a`, N(m, v), and component k' of `b`, N(m', v'), is
    N(m + v / (v + v') (m' - m), v v' / (v + v')), weighted by N(m; m', v + v'). The std stays
    shared, since every pair has the same.

    Args:
        a, b: mixtures of samples (B, C, *S), with K and K' components.

    Returns:
        A mixture of K K' components, those of b within those of a.

    Raises:
        ValueError: the mixtures' shapes differ.
    """
    a, b = a.components(), b.components()
    share = a.var / (a.var + b.var)  # (B, 1, 1, *S)
    offsets = differences(a, b)
    means = a.means.unsqueeze(2) + share.unsqueeze(2) * -offsets
    log_std = b.log_std + 0.5 * share.log()
    return GaussianMixture(
        means.flatten(1, 2), _log_pairs(a, b, offsets).flatten(1, 2).log_softmax(1), log_std
    )


def log_overlap(a: Mixture, b: Mixture) -> Tensor:
    """Return log of the integral of the product of two mixtures' densities per pixel, (B, *S).

    It is the logarithm of the constant that `mixture_product` divides by.

    Raises:
        ValueError: the mixtures' shapes differ.
    """
    a, b = a.components(), b.components()
    return _log_pairs(a, b, differences(a, b)).logsumexp((1, 2)).squeeze(1)


def differences(a: GaussianMixture, b: GaussianMixture) -> Tensor:
    """Return means of `a` minus means of `b`, for all pairs, (B, K, K', C, *S).

    Raises:
        ValueError: the mixtures' shapes differ.
    """
    if not a.fits(b.means[:, 0]):
        shapes = (tuple(m.means[:, 0].shape) for m in (a, b))
        raise ValueError("mixtures of samples {} and {} differ in shape".format(*shapes))
    return a.means.unsqueeze(2) - b.means.unsqueeze(1)


def log_normal(distance: Tensor, var: Tensor, channels: int) -> Tensor:
    """Return log N(d; 0, var I) in nats, for |d|^2 = `distance` in that many channels."""
    return -0.5 * (distance / var + channels * (var.log() + LOG_2PI))


def _log_pairs(a: GaussianMixture, b: GaussianMixture, offsets: Tensor) -> Tensor:
    """Return the log-integral of every pair of weighted components, (B, K, K', 1, *S)."""
    distance = offsets.square().sum(3, keepdim=True)
    density = log_normal(distance, (a.var + b.var).unsqueeze(2), offsets.shape[3])
    return a.log_weights.unsqueeze(2) + b.log_weights.unsqueeze(1) + density


def reduce_components(mixture: Mixture, count: int) -> GaussianMixture:
    """Merge components until `count` are left; the mean and the variance of every pixel stay.

    Each step merges two components into their mean: those whose merge adds least to the variance
    within components, w w' / (w + w') |m - m'|^2 (Ward 1963). As the std is shared, all components
    take their share of that variance.

    Args:
        count: at least 1; a mixture with no more components is returned as it is.

    Returns:
        A mixture with log_std (B, 1, 1, *S).

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; at least 1 component must be left")
    own = mixture.components()
    means, log_weights, lost = own.means, own.log_weights, torch.zeros_like(own.means[:, :1, :1])
    while means.shape[1] > count:
        means, log_weights, cost = _merge_closest(means, log_weights)
        lost = lost + cost
    if means is own.means:
        return own
    log_std = 0.5 * (own.var + lost / means.shape[2]).log()
    return GaussianMixture(means, log_weights.log_softmax(1), log_std)


def _merge_closest(means: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the closest two of K components per pixel.

    Returns:
        Means (B, K - 1, C, *S), log-weights (B, K - 1, 1, *S), and what the merge adds to the
        variance within components, summed over channels, (B, 1, 1, *S).
    """
    components = means.shape[1]
    weights = log_weights.exp()
    total = (weights.unsqueeze(2) + weights.unsqueeze(1)).clamp(min=torch.finfo(means.dtype).tiny)
    gaps = (means.unsqueeze(2) - means.unsqueeze(1)).square().sum(3, keepdim=True)
    costs = weights.unsqueeze(2) * (weights.unsqueeze(1) / total) * gaps
    pairs = torch.triu_indices(components, components, 1, device=means.device)
    cost, closest = costs[:, pairs[0], pairs[1]].min(1, keepdim=True)  # (B, 1, 1, *S)
    first, second = pairs[0][closest], pairs[1][closest]

    def part(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(1, index.expand_as(values[:, :1]))

    weight = part(weights, second)
    share = weight / (part(weights, first) + weight).clamp(min=torch.finfo(means.dtype).tiny)
    merged = part(means, first) + share * (part(means, second) - part(means, first))
    log_sum = torch.logaddexp(part(log_weights, first), part(log_weights, second))
    kept = []
    for values, new in ((means, merged), (log_weights, log_sum)):
        last = values[:, -1:].clone()
        filled = values.scatter(1, second.expand_as(new), last)  # the last one fills the gap
        kept.append(filled.scatter(1, first.expand_as(new), new)[:, :-1])
    return *kept, cost
