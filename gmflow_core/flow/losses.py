"""Training losses of a network that predicts a mixture of velocities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..gaussians.density import LOG_2PI, log_density
from ..gaussians.mixture import Mixture
from ..gaussians.spectral import hartley
from .path import MIN_SIGMA, Sigma, bridge, bridge_log_std, expand_sigma

MIN_STD = 1e-4  # lower bound of predicted std: below it rounding errors of x dominate the loss


def nll(mixture: Mixture, target: Tensor) -> Tensor:
    """Return the negative log-likelihood of `target` per pixel.

    With the mixture of velocities and the target u it is the loss of GMFlow's minimal trainer.

    Args:
        target: (B, C, *S).

    Returns:
        (B, *S) in nats, summed over channels, without the constant C/2 log 2 pi.
    """
    return _nll(target, mixture, mixture.log_std)


def transition_nll(
    velocity: Mixture, x_low: Tensor, x_high: Tensor, sigma_low: Sigma, sigma_high: Sigma
) -> Tensor:
    """Return GMFlow's transition loss (ICML 2025).

    It is the NLL of x_low under the mixture that the velocities at x_high imply for it.

    Args:
        velocity: the network's output at (x_high, sigma_high).
        x_low, x_high: (B, C, *S), x_high drawn from x_low by `forward_transition`.
        sigma_low, sigma_high: sigma_low < sigma_high; sigma_low = 0 gives the NLL of x_0 itself.

    Returns:
        (B, *S) in nats, summed over channels, without the constant C/2 log 2 pi.
    """
    c1, c2, c3 = bridge(x_high, sigma_low, sigma_high)
    high = expand_sigma(sigma_high, x_high)
    # x_0 = x_high - high u: x_low's components have the means (c1 + c2) x_high - c2 high u
    log_std = velocity.log_std + high.clamp(min=MIN_SIGMA).log().unsqueeze(1)
    log_std = bridge_log_std(log_std, c2.unsqueeze(1), c3.unsqueeze(1))
    target, gain = x_low - (c1 + c2) * x_high, (-c2 * high).unsqueeze(1)
    return _nll(target, velocity, log_std, gain)


def _nll(target: Tensor, mixture: Mixture, log_std: Tensor, gain: Tensor | None = None) -> Tensor:
    """Return `nll` under N(gain means_k, std^2 I) with the mixture's means and weights."""
    log_std = log_std.clamp(min=math.log(MIN_STD))
    density = log_density(target, mixture.means, mixture.log_weights, log_std, gain)
    return -density - 0.5 * target.shape[1] * LOG_2PI


def spectral_nll(velocity: Mixture, target: Tensor, log_power: Tensor) -> Tensor:
    """Return GMFlow's spectral loss (ICML 2025).

    It is the NLL of the whitened velocity's frequencies under the predicted spectrum, minus that
    under a white one. Its gradient goes to the spectrum only.

    Args:
        velocity: the network's output.
        target: velocity noise - x_0, (B, C, *S).
        log_power: (B, C, *S), the spectrum network's output for the Gaussian of x_0 that
            `velocity` implies.

    Returns:
        (B, *S) in nats, summed over channels.
    """
    with torch.no_grad():
        power = hartley(velocity.to_normal(target)).square()
    return 0.5 * (power * ((-log_power).exp() - 1) + log_power).sum(1)
