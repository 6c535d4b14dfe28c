"""Straight path x_sigma = (1 - sigma) x_0 + sigma eps: conversions, transitions, posteriors.

sigma is in [0, 1], 0 data and 1 noise; alpha = 1 - sigma; the velocity is u = eps - x_0. Wherever a
function takes a sigma it may be a number, one value per sample (B,), or a tensor that broadcasts
to x, (B, 1, *S).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..gaussians.mixture import GaussianMixture, IsotropicGaussian, Mixture
from ..gaussians.tensors import at_least_float
from .checks import whole_number

MIN_SIGMA = 1e-6  # lower bound in divisions: below it x_sigma equals x_0 to float32 accuracy

Sigma = float | Tensor


def expand_sigma(sigma: Sigma, x: Tensor) -> Tensor:
    """Return `sigma` as a floating-point tensor on x's device that broadcasts to x (B, C, *S).

    Raises:
        ValueError: its shape does not fit x.
    """
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    if not isinstance(sigma, Tensor):  # torch.full fills on the device; as_tensor would sync
        return torch.full([1] * x.ndim, sigma, dtype=dtype, device=x.device)
    sigma = sigma.to(x.device, dtype)
    if sigma.ndim == 1 and sigma.shape[0] in (1, x.shape[0]):
        return sigma.reshape(-1, *[1] * (x.ndim - 1))
    if sigma.ndim == 0:
        return sigma.reshape([1] * x.ndim)
    if sigma.ndim == x.ndim and all(
        n in (1, size) for n, size in zip(sigma.shape, x.shape, strict=True)
    ):
        return sigma
    raise ValueError(
        f"sigma of shape {tuple(sigma.shape)} does not fit x of shape {tuple(x.shape)}; "
        "give a number, one value per sample, or a tensor that broadcasts to x"
    )


def positive(sigma: Sigma) -> Sigma:
    """Return `sigma`, at least MIN_SIGMA, for divisions."""
    return sigma.clamp(min=MIN_SIGMA) if isinstance(sigma, Tensor) else max(sigma, MIN_SIGMA)


def shift_time(t: Sigma, shift: float) -> Sigma:
    """Shift times in [0, 1]: t -> shift t / (1 + (shift - 1) t) (Esser et al. 2024).

    A shift above 1 moves times towards noise.
    """
    return shift * t / (1 + (shift - 1) * t)


def unshift_time(sigma: Sigma, shift: float) -> Sigma:
    """Invert `shift_time`."""
    return sigma / (shift + (1 - shift) * sigma)


def sigma_between(start: Sigma, end: Sigma, part: float | Tensor, shift: float) -> Sigma:
    """Return the sigma that lies `part` of the way from start to end in unshifted time."""
    first, last = unshift_time(start, shift), unshift_time(end, shift)
    return shift_time(first + (last - first) * part, shift)


def sigmas_between(start: Sigma, end: Sigma, substeps: int, shift: float) -> tuple[Sigma, ...]:
    """Return the `substeps` + 1 sigmas from start to end, evenly spaced in unshifted time."""
    between = (sigma_between(start, end, i / substeps, shift) for i in range(1, substeps))
    return start, *between, end


def flow_sigmas(
    steps: int,
    shift: float = 1.0,
    *,
    start: float = 1.0,
    final_step_size: float = 1.0,
    end: float = 0.0,
) -> Tensor:
    """Return `steps` + 1 sigmas in descending order, evenly spaced before the time shift.

    Args:
        steps: number of network calls, from 1 to MOST_STEPS.
        shift: see `shift_time`.
        start: first time before the shift, in (0, 1]; below 1 for image to image.
        final_step_size: size of the last step relative to the others, which are equal, in (0, 1];
            pi-Flow uses 0.5.
        end: last time before the shift, in [0, start); MM-FM ends its 49 steps at 0.001 and takes
            x there for the sample.

    Raises:
        ValueError: an argument is out of range.
    """
    steps = whole_number("steps", steps)
    if not shift > 0:
        raise ValueError(f"shift is {shift}; it must be positive (1 leaves the grid uniform)")
    for name, value in (("start", start), ("final_step_size", final_step_size)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} is {value}; it must be above 0 and at most 1")
    if not 0 <= end < start:
        raise ValueError(f"end is {end}; it must be at least 0 and below start, {start}")
    times = 1 - torch.arange(steps + 1, dtype=torch.float64) / (steps - 1 + final_step_size)
    sigmas = shift_time(end + (start - end) * times.clamp(min=0), shift).float()
    if not (sigmas.diff() < 0).all():  # true of NaN too
        raise ValueError(
            f"shift is {shift}, with which {steps} steps from {start} to {end} are not told apart "
            "in float32; give a shift nearer to 1, or fewer steps"
        )
    return sigmas


def diffuse(x0: Tensor, sigma: Sigma, noise: Tensor) -> Tensor:
    """Return x_sigma = (1 - sigma) x_0 + sigma noise; all (B, C, *S)."""
    sigma = expand_sigma(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def velocity_to_x0(
    velocity: Mixture | IsotropicGaussian | Tensor, x: Tensor, sigma: Sigma
) -> GaussianMixture | IsotropicGaussian | Tensor:
    """Convert velocities at (x, sigma) to x_0 = x - sigma u.

    Args:
        velocity: (B, C, *S), or a Gaussian or a mixture of velocities.
        x: (B, C, *S).

    Returns:
        x_0 in the type of `velocity`.
    """
    sigma = expand_sigma(sigma, x)
    if isinstance(velocity, Tensor):
        return x - sigma * velocity
    scale = sigma.clamp(min=MIN_SIGMA)
    if isinstance(velocity, IsotropicGaussian):
        return IsotropicGaussian(x - sigma * velocity.mean, scale.square() * velocity.var)
    return GaussianMixture(
        means=torch.addcmul(x.unsqueeze(1), sigma.unsqueeze(1), velocity.means, value=-1),
        log_weights=velocity.log_weights,
        log_std=velocity.log_std + scale.unsqueeze(1).log(),
    )


def x0_to_velocity(x0: Tensor, x: Tensor, sigma: Sigma) -> Tensor:
    """Return u = (x - x_0) / sigma, the inverse of `velocity_to_x0`; sigma is at least 1e-6."""
    return (x - x0) / expand_sigma(sigma, x).clamp(min=MIN_SIGMA)


def forward_transition(x_low: Tensor, sigma_low: Sigma, sigma_high: Sigma, noise: Tensor) -> Tensor:
    """Draw x at sigma_high given x at sigma_low <= sigma_high.

    Args:
        x_low: (B, C, *S).
        noise: standard normal, (B, C, *S).
    """
    low, high = expand_sigma(sigma_low, x_low), expand_sigma(sigma_high, x_low)
    ratio = (1 - high) / (1 - low).clamp(min=MIN_SIGMA)
    return ratio * x_low + (high.square() - (ratio * low).square()).clamp(min=0).sqrt() * noise


def reverse_transition(
    x0: Mixture | Tensor,
    x_high: Tensor,
    sigma_low: Sigma,
    sigma_high: Sigma,
    noise: Tensor | None = None,
) -> GaussianMixture | Tensor:
    """Return x at sigma_low given x at sigma_high and x_0: N(c1 x_high + c2 x_0, c3 I).

    This is the Gaussian bridge of the path.

    Args:
        x0: a sample (B, C, *S), which gives a sample; or a mixture, which gives a mixture.
        x_high: (B, C, *S).
        noise: standard normal (B, C, *S), for a sample; None gives the bridge's mean.
    """
    c1, c2, c3 = bridge(x_high, sigma_low, sigma_high)
    if isinstance(x0, Tensor):
        mean = c1 * x_high + c2 * x0
        return mean if noise is None else mean + c3.sqrt() * noise
    c1, c2, c3, x0 = c1.unsqueeze(1), c2.unsqueeze(1), c3.unsqueeze(1), x0.components()
    return GaussianMixture(
        means=c1 * x_high.unsqueeze(1) + c2 * x0.means,
        log_weights=x0.log_weights,
        log_std=bridge_log_std(x0.log_std, c2, c3),
    )


def bridge(x_high: Tensor, sigma_low: Sigma, sigma_high: Sigma) -> tuple[Tensor, Tensor, Tensor]:
    """Return c1, c2, c3 of `reverse_transition`, broadcastable to x_high."""
    low = expand_sigma(sigma_low, x_high)
    high = expand_sigma(sigma_high, x_high).clamp(min=MIN_SIGMA)
    shrink = low / high
    decay = (1 - high) / (1 - low).clamp(min=MIN_SIGMA)
    weight = 1 - (shrink * decay).square()
    return shrink.square() * decay, weight * (1 - low), weight * low.square()


def bridge_log_std(log_std: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    """Return the log-std of x_low from that of x_0: log sqrt((c2 std)^2 + c3)."""
    tiny = torch.finfo(c2.dtype).tiny
    scaled = 2 * (log_std + c2.clamp(min=tiny).log())
    return 0.5 * torch.logaddexp(scaled, c3.clamp(min=tiny).log())


def posterior(
    x0: Mixture, x_src: Tensor, sigma_src: Sigma, x: Tensor, sigma: Sigma
) -> GaussianMixture:
    """Return the mixture of x_0 given (x, sigma), from the mixture given (x_src, sigma_src).

    This is GMFlow's analytic denoiser between two network calls (ICML 2025): the given mixture
    times the ratio of the two likelihoods of x_0. With a = 1 - sigma the ratio has the quadratic
    term (a / sigma)^2 - (a_src / sigma_src)^2 and the linear term
    a x / sigma^2 - a_src x_src / sigma_src^2; as differences of ratios both stay accurate down to
    sigma = 0.
    """
    return x0.tilt(*likelihood_ratio(x_src, sigma_src, x, sigma))


def posterior_mean(x0: Mixture, x_src: Tensor, sigma_src: Sigma, x: Tensor, sigma: Sigma) -> Tensor:
    """Return E[x_0 | x, sigma], (B, C, *S), from the mixture of x_0 given (x_src, sigma_src).

    See `posterior`.
    """
    return posterior_means(x0, x_src, sigma_src)(x, sigma)


def posterior_means(
    x0: Mixture, x_src: Tensor, sigma_src: Sigma
) -> Callable[[Tensor, Sigma], Tensor]:
    """Return `posterior_mean` as a function of (x, sigma), for several calls."""
    x0 = x0.as_tilted()
    return lambda x, sigma: x0.tilted(*likelihood_ratio(x_src, sigma_src, x, sigma)).mean()


def likelihood_ratio(
    x_src: Tensor, sigma_src: Sigma, x: Tensor, sigma: Sigma
) -> tuple[Tensor, Sigma]:
    """Return the linear and the quadratic term of `posterior`, for `GaussianMixture.tilt`."""
    x_src, x = at_least_float(x_src), at_least_float(x)
    src, dst = (
        positive(expand_sigma(each, x) if isinstance(each, Tensor) else each)
        for each in (sigma_src, sigma)
    )
    signal_src, signal = (1 - src) / src, (1 - dst) / dst
    linear = (signal / dst) * x - (signal_src / src) * x_src
    return linear, signal * signal - signal_src * signal_src
