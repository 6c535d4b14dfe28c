"""Ordinary flow models as mixtures: one Gaussian of x_0 (K = 1) around the predicted mean.

An ordinary flow model predicts the mean velocity u and no spread. Its mixture has one component:
velocities around u with standard deviation `spread`, so x_0 = x - sigma u has the standard
deviation spread * sigma. The spread decides how far the posterior mean follows x between two
network calls, and how strong probabilistic guidance is; with a spread of 0 it is a point mass.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..gaussians.mixture import GaussianMixture
from ..gaussians.tensors import at_least_float
from .path import Sigma, expand_sigma, positive

USUAL_SPREAD = 0.5  # standard deviation of the velocity; docs/results.md has what it is worth
MIN_LOG_STD = -30.0  # of x_0, for a spread of 0, as `GaussianMixture.point_mass` has it

Spread = float | Tensor | Callable[[Sigma], float | Tensor]


def single_gaussian(mean_x0: Tensor, sigma: Sigma, spread: Spread) -> GaussianMixture:
    """Return the mixture of one Gaussian of x_0, with the std spread * sigma.

    Args:
        mean_x0: x - sigma u for the mean velocity u predicted at (x, sigma), (B, C, *S).
        sigma: as in `velocity_to_x0`; at least 1e-6 in the standard deviation.
        spread: standard deviation of the velocity, at least 0: a number, one per sample (B,), a
            tensor that broadcasts to (B, 1, *S), or a function that returns one of these when it
            is called with `sigma`.

    Raises:
        ValueError: `spread` is a number below 0 or not finite, or a tensor that does not fit.
    """
    if callable(spread):
        spread = spread(sigma)
    mean_x0 = at_least_float(mean_x0)
    std = positive(expand_sigma(sigma, mean_x0)) * _expand_spread(spread, mean_x0)
    log_std = std.log().clamp(min=MIN_LOG_STD).unsqueeze(1)
    means = mean_x0.unsqueeze(1)  # (B, 1, C, *S)
    return GaussianMixture(means, torch.zeros_like(means[:, :, :1]), log_std)


def _expand_spread(spread: float | Tensor, x: Tensor) -> Tensor:
    """Return `spread` as a tensor that broadcasts to (B, 1, *S)."""
    if not isinstance(spread, Tensor) and not (spread >= 0 and math.isfinite(spread)):
        raise ValueError(
            f"spread is {spread}; the velocity's standard deviation must be a number of at least 0"
        )
    try:
        return expand_sigma(spread, x[:, :1])
    except ValueError as error:
        raise ValueError(
            f"spread of shape {tuple(spread.shape)} does not fit x of shape {tuple(x.shape)}; give "
            "a number, one value per sample, or a tensor that broadcasts to (B, 1, *S)"
        ) from error
