"""Training losses of a network that predicts a mixture of velocities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..gaussians.density import LOG_2PI, log_density
from ..gaussians.mixture import GaussianMixture
from ..gaussians.spectral import hartley
from .path import MIN_SIGMA, Sigma, bridge, bridge_log_std, expand_sigma

MIN_STD = 1e-4  # a predicted standard deviation counts as at least this, or rounding errors of x would dominate the loss


def nll(mixture: GaussianMixture, target: Tensor) -> Tensor:
    """Negative log-likelihood of target (B, C, *S) per pixel, (B, *S): in nats, summed over channels, without the
    constant C/2 log 2 pi. With the mixture of velocities and the target u it is the loss of GMFlow's minimal trainer."""
    return _nll(target, mixture, mixture.log_std)


def transition_nll(
    velocity: GaussianMixture, x_low: Tensor, x_high: Tensor, sigma_low: Sigma, sigma_high: Sigma
) -> Tensor:
    """GMFlow's transition loss (ICML 2025): the NLL of x_low under the mixture that the velocities at x_high imply for it.

    Args:
        velocity: the network's output at (x_high, sigma_high).
        x_low, x_high: (B, C, *S), x_high drawn from x_low by `forward_transition`.
        sigma_low, sigma_high: sigma_low < sigma_high; sigma_low = 0 gives the NLL of x_0 itself.

    Returns:
        (B, *S) in nats, summed over channels, without the constant C/2 log 2 pi.
    """
    c1, c2, c3 = bridge(x_high, sigma_low, sigma_high)
    high = expand_sigma(sigma_high, x_high)
    # x_0 = x_high - high u gives x_low's components the means (c1 + c2) x_high - c2 high u: no mixture is made of them
    log_std = bridge_log_std(
        velocity.log_std + high.clamp(min=MIN_SIGMA).log().unsqueeze(1),
        c2.unsqueeze(1),
        c3.unsqueeze(1),
    )
    return _nll(x_low - (c1 + c2) * x_high, velocity, log_std, gain=(-c2 * high).unsqueeze(1))


def _nll(
    target: Tensor, mixture: GaussianMixture, log_std: Tensor, gain: Tensor | None = None
) -> Tensor:
    """`nll` under the components N(gain means_k, std^2 I) with the mixture's means and weights."""
    log_std = log_std.clamp(min=math.log(MIN_STD))
    density = log_density(target, mixture.means, mixture.log_weights, log_std, gain)
    return -density - 0.5 * target.shape[1] * LOG_2PI


def spectral_nll(velocity: GaussianMixture, target: Tensor, log_power: Tensor) -> Tensor:
    """GMFlow's spectral loss (ICML 2025): NLL of the whitened velocity's frequencies under the predicted spectrum, minus that
    under a white one. Its gradient goes to the spectrum only.

    Args:
        velocity: the network's output.
        target: the velocity noise - x_0, (B, C, *S).
        log_power: (B, C, *S), the spectrum network's output for the Gaussian of x_0 that `velocity` implies.

    Returns:
        (B, *S) in nats, summed over channels.
    """
    with torch.no_grad():
        power = hartley(velocity.to_normal(target)).square()
    return 0.5 * (power * ((-log_power).exp() - 1) + log_power).sum(1)
