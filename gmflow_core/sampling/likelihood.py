"""Log-likelihood of samples by the probability flow: the exact density of the mean's ODE."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..flow.path import MIN_SIGMA
from ..gaussians.density import LOG_2PI
from ..gaussians.draws import Generator, standard_normal
from ..gaussians.tensors import at_least_float
from .denoisers import Denoiser

LEAST_SIGMA = 1e-4  # where float32 still has 3 digits of (x - E[x_0]) / sigma


def log_likelihood(
    denoiser: Denoiser,
    x0: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    probes: int | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Return the log-density of x_0 in nats under the flow of a denoiser's mean.

    The flow dx / dsigma = u(x, sigma) takes x_0 at sigma 0 to x at sigma 1, whose density is
    N(0, I), so log p(x_0) = log N(x; 0, I) + the integral of div u over sigma (Chen et al. 2018).
    Both are integrated by the Runge-Kutta method of fourth order, with four calls of the denoiser
    per step. It is the density of samples that follow this flow in small steps, not of those of
    few steps.

    Args:
        denoiser: one whose samples do not depend on each other, with gradients; only its mean
            counts.
        x0: (B, C, *S).
        sigmas: descending from 1, such as `flow_sigmas` gives. x_0 counts as x at the last one. At
            0 the flow is evaluated at 0.0001 instead (1e-6 in float64).
        probes: number of random directions that estimate the divergence, one backward pass each
            (Hutchinson 1989, Grathwohl et al. 2019); the estimate of log p has no bias. None
            computes the exact one with C times *S passes, for few dimensions.
        generator: source of the directions; one per sample if a list, see `standard_normal`.

    Returns:
        (B,), with the 2 pi term.

    Raises:
        ValueError: `probes` is below 1, the sigmas do not descend from 1, or the denoiser's mean
            has no gradient.
    """
    times = [float(sigma) for sigma in sigmas][::-1]
    steps = list(itertools.pairwise(times))
    if not steps or times[-1] != 1 or any(not 0 <= low < high for low, high in steps):
        raise ValueError(
            f"sigmas {times[::-1]} are not a sequence that descends from 1, of at least two values"
        )
    with torch.inference_mode(False), torch.no_grad():
        x = at_least_float(x0).clone()
        directions = _directions(x, probes, generator)
        integral = x.new_zeros(len(x))
        for low, high in steps:
            x, change = _runge_kutta(denoiser, x, low, high, directions)
            integral = integral + change
        noise = x.flatten(1)
        return integral - 0.5 * (noise.square().sum(1) + noise.shape[1] * LOG_2PI)


def _directions(x: Tensor, probes: int | None, generator: Generator | None) -> Tensor:
    """Return directions d with sum d d^T = I, (N, B or 1, C, *S); on average, if they are random.

    Their squares sum to 1 exactly in every coordinate.
    """
    if probes is None:
        size = x[0].numel()
        return torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, 1, *x.shape[1:])
    if probes < 1:
        raise ValueError(
            f"probes is {probes}; at least 1 is needed, or None for the exact divergence"
        )
    drawn = [standard_normal(tuple(x.shape), generator, like=x) for _ in range(probes)]
    return torch.stack(drawn).sign() / math.sqrt(probes)


def _runge_kutta(
    denoiser: Denoiser, x: Tensor, low: float, high: float, directions: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x at `high`, and the integral of the divergence from `low` to `high`, (B,)."""
    size, velocity, velocities, divergences = high - low, 0.0, [], []
    for part in (0.0, 0.5, 0.5, 1.0):
        sigma = low + part * size
        velocity, divergence = _flow(denoiser, x + part * size * velocity, sigma, directions)
        velocities.append(velocity)
        divergences.append(divergence)
    weights = (size / 6, size / 3, size / 3, size / 6)
    change, integral = (
        sum(weight * value for weight, value in zip(weights, values, strict=True))
        for values in (velocities, divergences)
    )
    return x + change, integral


def _flow(denoiser: Denoiser, x: Tensor, sigma: float, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the velocity (B, C, *S) and its divergence (B,) at (x, sigma)."""
    sigma = max(sigma, LEAST_SIGMA if x.dtype == torch.float32 else MIN_SIGMA)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        mean = denoiser(x, x.new_full((len(x),), sigma)).mean()
        if not mean.requires_grad:
            raise ValueError(
                "the denoiser's mean has no gradient in x, which its divergence needs; run the "
                "network without torch.no_grad and torch.inference_mode"
            )
        trace = x.new_zeros(len(x))
        for direction in directions:
            (product,) = torch.autograd.grad((mean * direction).sum(), x, retain_graph=True)
            trace = trace + (product * direction).flatten(1).sum(1)
    return ((x - mean) / sigma).detach(), (x[0].numel() - trace) / sigma
