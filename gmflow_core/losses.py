"""Training losses of a network that predicts a mixture of velocities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .mixture import LOG_2PI, GaussianMixture
from .path import Sigma, reverse_transition, velocity_to_x0
from .spectral import hartley

MIN_STD = 1e-4  # a predicted standard deviation counts as at least this, or rounding errors of x would dominate the loss


def nll(mixture: GaussianMixture, target: Tensor) -> Tensor:
    """Negative log-likelihood of target (B, C, *S) per pixel, (B, *S): in nats, summed over channels, without the
    constant C/2 log 2 pi. With the mixture of velocities and the target u it is the loss of GMFlow's minimal trainer."""
    mixture = GaussianMixture(mixture.means, mixture.log_weights, mixture.log_std.clamp(min=math.log(MIN_STD)))
    return -mixture.log_prob(target) - 0.5 * target.shape[1] * LOG_2PI


def transition_nll(velocity: GaussianMixture, x_low: Tensor, x_high: Tensor, sigma_low: Sigma, sigma_high: Sigma) -> Tensor:
    """GMFlow's transition loss (ICML 2025): the NLL of x_low under the mixture that the velocities at x_high imply for it.

    Args:
        velocity: the network's output at (x_high, sigma_high).
        x_low, x_high: (B, C, *S), x_high drawn from x_low by `forward_transition`.
        sigma_low, sigma_high: sigma_low < sigma_high; sigma_low = 0 gives the NLL of x_0 itself.

    Returns:
        (B, *S) in nats, summed over channels, without the constant C/2 log 2 pi.
    """
    x0 = velocity_to_x0(velocity, x_high, sigma_high)
    return nll(reverse_transition(x0, x_high, sigma_low, sigma_high), x_low)


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
