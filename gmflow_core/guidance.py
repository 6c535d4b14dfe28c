"""Guidance on distributions: steer the conditional mixture away from the unconditional mean without leaving the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .mixture import GaussianMixture, IsotropicGaussian


@dataclass(frozen=True, eq=False, kw_only=True)
class GuidedMixture(GaussianMixture):
    """A guided mixture that remembers what it was made of, so that a second-order solver can fuse its own correction with
    the guidance into one update of `cond` (see `gmflow_core.solvers.second_order`).

    Args:
        cond: the conditional mixture before guidance.
        bias: what guidance adds to the mean of `cond`, (B, C, *S).
        scale: the guidance weight w, broadcastable to (B, 1, *1).
    """

    cond: GaussianMixture
    bias: Tensor
    scale: Tensor


def probabilistic_guidance(
    cond: GaussianMixture, uncond_mean: Tensor, scale: float | Tensor, orthogonal: float = 1.0
) -> GuidedMixture:
    """Probabilistic guidance (GMFlow, ICML 2025): cond times N(mean + bias, (1 - w^2) V) / N(mean, V).

    The bias points from the unconditional to the conditional mean, without its part along the conditional mean, and has
    the mean square w^2 V, V the variance of `cond` averaged over channels and space: it shifts the mixture by w
    standard deviations at most, whatever the distance of the two means, and narrows it in exchange.

    Args:
        cond: conditional mixture of x_0.
        uncond_mean: unconditional mean of x_0, (B, C, *S).
        scale: w in [0, 1), a number or one per sample (B,); 0 leaves `cond` as it is.
        orthogonal: how much of the parallel part is removed, in [0, 1].

    Raises:
        ValueError: `scale` (when a number) or `orthogonal` is out of range.
    """
    if not isinstance(scale, Tensor) and not 0 <= scale < 1:
        raise ValueError(f"guidance scale {scale} is outside [0, 1); probabilistic guidance is not classifier-free guidance")
    if not 0 <= orthogonal <= 1:
        raise ValueError(f"orthogonal is {orthogonal}; it must be in [0, 1]")
    gaussian = image_gaussian(cond)
    mean, var = gaussian.mean, gaussian.var
    scale = torch.as_tensor(scale, dtype=mean.dtype, device=mean.device).reshape(-1, *[1] * (mean.ndim - 1))
    bias = mean - uncond_mean
    parallel = image_mean(bias * mean) / image_mean(mean.square()).clamp(min=1e-6)
    bias = bias - orthogonal * parallel * mean
    bias = bias * (scale * (var / image_mean(bias.square()).clamp(min=1e-6)).sqrt())
    guided = cond.times(IsotropicGaussian(mean + bias, var * (1 - scale.square())), over=gaussian)
    return GuidedMixture(guided.means, guided.log_weights, guided.log_std, cond=cond, bias=bias, scale=scale)


def image_mean(x: Tensor) -> Tensor:
    """The average over everything but the batch, with its dimensions kept: (B, C, *S) -> (B, 1, *1)."""
    return x.mean(tuple(range(1, x.ndim)), keepdim=True)


def image_gaussian(mixture: GaussianMixture) -> IsotropicGaussian:
    """The moment-matched Gaussian with one variance for each image: mean (B, C, *S), var (B, 1, *1)."""
    gaussian = mixture.moment_match()
    return IsotropicGaussian(gaussian.mean, image_mean(gaussian.var))
