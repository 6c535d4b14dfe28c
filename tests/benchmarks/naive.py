"""Naive forms of the papers' formulas, for the benchmarks to compare with.

Every K x C tensor is in memory; nothing is cached, fused or rearranged. Run in float64, these forms
give the exact results for the errors. Shapes are those of `gmflow_core`: mixtures (B, K, C, *S),
x (B, C, *S); sigmas are numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gmflow_core import GaussianMixture

ROOT_2 = math.sqrt(2)


def velocity_to_x0(velocity: GaussianMixture, x: Tensor, sigma: float | Tensor) -> GaussianMixture:
    """Convert a mixture of velocities u to the mixture of x_0 = x - sigma u."""
    sigma = torch.as_tensor(sigma).to(x).reshape(-1, *[1] * x.ndim)
    return GaussianMixture(
        x.unsqueeze(1) - sigma * velocity.means,
        velocity.log_weights,
        velocity.log_std + sigma.log(),
    )


def mean_of(mixture: GaussianMixture) -> Tensor:
    """Return the mean (B, C, *S)."""
    return (mixture.log_weights.softmax(1) * mixture.means).sum(1)


def posterior_mean(
    x0: GaussianMixture, x_src: Tensor, sigma_src: float, x: Tensor, sigma: float
) -> Tensor:
    """Return E[x_0 | x, sigma] (GMFlow, analytic denoiser).

    The mixture at (x_src, sigma_src) is multiplied by the ratio of the likelihoods of x and x_src,
    which is a Gaussian.
    """
    alpha_src, alpha = 1 - sigma_src, 1 - sigma
    zeta = alpha**2 * sigma_src**2 - alpha_src**2 * sigma**2
    mean = ((alpha * sigma_src**2 * x - alpha_src * sigma**2 * x_src) / zeta).unsqueeze(1)
    var = sigma**2 * sigma_src**2 / zeta
    return mean_of(product(x0, mean, var))


def product(mixture: GaussianMixture, mean: Tensor, var: float | Tensor) -> GaussianMixture:
    """Return the mixture times N(mean, var I), renormalised.

    Args:
        mean: (B, 1, C, *S).
        var: a number or (B, 1, 1, *1).
    """
    own = (2 * mixture.log_std).exp()
    total = own + var
    differences = mixture.means - mean
    return GaussianMixture(
        (var * mixture.means + own * mean) / total,
        (mixture.log_weights - differences.square().sum(2, keepdim=True) / (2 * total)).log_softmax(
            1
        ),
        0.5 * (own * var / total).log(),
    )


def rollout(
    x0: GaussianMixture, x: Tensor, sigma: float, sigma_end: float, substeps: int
) -> Tensor:
    """Take equal Euler steps along u = (x - E[x_0 | x, sigma]) / sigma."""
    x_src, sigma_src = x, sigma
    size = (sigma - sigma_end) / substeps
    for substep in range(substeps):
        mean = mean_of(x0) if substep == 0 else posterior_mean(x0, x_src, sigma_src, x, sigma)
        x = x - size * (x - mean) / sigma
        sigma = sigma - size
    return x


# Guidance and the second order


def image_mean(x: Tensor) -> Tensor:
    """Average over all dimensions but the batch, which are kept: (B, 1, *1)."""
    return x.mean(tuple(range(1, x.ndim)), keepdim=True)


def moments(mixture: GaussianMixture) -> tuple[Tensor, Tensor]:
    """Return the mean (B, C, *S), and the variance averaged over the image (B, 1, *1)."""
    mean = mean_of(mixture)
    between = (mixture.log_weights.exp() * (mixture.means - mean.unsqueeze(1)).square()).sum(1)
    return mean, image_mean(between + (2 * mixture.log_std).exp().squeeze(1))


def replaced(
    mixture: GaussianMixture, mean: Tensor, var: Tensor, to_mean: Tensor, to_var: Tensor
) -> GaussianMixture:
    """Return the mixture times N(to_mean, to_var) / N(mean, var)."""
    quotient_var = to_var * var / (var - to_var)
    quotient_mean = (var * to_mean - to_var * mean) / (var - to_var)
    return product(mixture, quotient_mean.unsqueeze(1), quotient_var.unsqueeze(1))


def guided_gm_ode(
    velocities: list[GaussianMixture], x: Tensor, sigmas: list[float], substeps: int, weight: float
) -> Tensor:
    """Run GM-ODE of second order with probabilistic guidance.

    `velocities` are the network's outputs, with [cond, uncond] in one batch.
    """
    previous = None
    for velocity, sigma, sigma_next in zip(velocities, sigmas[:-1], sigmas[1:], strict=True):
        both = velocity_to_x0(velocity, torch.cat([x, x]), sigma)
        cond, uncond = both.chunk(2)
        mean, var = moments(cond)
        bias = mean - mean_of(uncond)
        bias = bias - image_mean(bias * mean) / image_mean(mean.square()) * mean
        bias = bias * weight * (var / image_mean(bias.square())).sqrt()
        mixture = first_order = replaced(cond, mean, var, mean + bias, var * (1 - weight**2))
        size = sigma - sigma_next
        if previous is not None:
            old, old_x, old_sigma, old_size = previous
            trust = (1 - var * (weight**2 + 0.005) / old_size**2).clamp(min=0).sqrt()
            change = mean_of(mixture) - posterior_mean(old, old_x, old_sigma, x, sigma)
            bias = bias + trust * (0.5 * size / old_size) * change
            power = image_mean(bias.square())
            bias = bias * (var / power).clamp(max=1).sqrt()
            mixture = replaced(
                cond, mean, var, mean + bias, var * (1 - power / var).clamp(min=1e-6)
            )
        previous = first_order, x, sigma, size
        x = rollout(mixture, x, sigma, sigma_next, substeps)
    return x


# Knothe-Rosenblatt transport


def principal_axes(mixture: GaussianMixture) -> Tensor:
    """Return the axes of the covariance averaged over space.

    (B, C, C), as columns by descending variance.
    """
    means = mixture.means.flatten(3).permute(0, 3, 1, 2)  # (B, S, K, C)
    weights = mixture.log_weights.exp().flatten(3).permute(0, 3, 1, 2)
    differences = means - (weights * means).sum(2, keepdim=True)
    covariance = (
        (weights[..., None] * differences[..., :, None] * differences[..., None, :]).sum(2).mean(1)
    )
    covariance = covariance + torch.eye(means.shape[-1]).to(means) * (
        2 * mixture.log_std
    ).exp().reshape(-1, 1, 1)
    return torch.linalg.eigh(covariance).eigenvectors.flip(-1)


def rotated(x: Tensor, axes: Tensor) -> Tensor:
    """Return x in the coordinates of the axes (B, C, C).

    x is (B, C, S) or (B, K, C, S), flattened over space.
    """
    return axes.transpose(-1, -2).reshape(len(axes), *[1] * (x.ndim - 3), *axes.shape[1:]) @ x


def from_normal(
    mixture: GaussianMixture, z: Tensor, axes: Tensor | None = None, steps: int = 16
) -> Tensor:
    """Map standard normal z (B, C, *S) to samples of the mixture, axis by axis.

    Newton's method inverts the mixture's CDF given the earlier axes. It starts at the
    moment-matched Gaussian, and no step is longer than 1.5 standard deviations. GMFlow takes 16
    steps.
    """
    axes = principal_axes(mixture) if axes is None else axes
    means, z = rotated(mixture.means.flatten(3), axes), z.flatten(2)
    log_weights, std = (
        mixture.log_weights.flatten(3).squeeze(2),
        mixture.log_std.exp().reshape(-1, 1, 1),
    )
    samples = []
    for axis in range(z.shape[1]):
        centres, level = means[:, :, axis], torch.erf(z[:, axis] / ROOT_2)
        weights = log_weights.exp()
        mean = (weights * centres).sum(1)
        var = (weights * (centres - mean.unsqueeze(1)).square()).sum(1) + std.squeeze(1) ** 2
        x = mean + var.sqrt() * z[:, axis]
        for _ in range(steps):
            offsets = (x.unsqueeze(1) - centres) / std
            cdf = (weights * torch.erf(offsets / ROOT_2)).sum(1)
            density = (
                weights * (-0.5 * offsets.square()).exp() / (std * math.sqrt(2 * math.pi))
            ).sum(1)
            step = 0.5 * (cdf - level) / density.clamp(min=1e-6)
            x = x - torch.minimum(torch.maximum(step, -1.5 * std[:, 0]), 1.5 * std[:, 0])
        samples.append(x)
        log_weights = (log_weights - 0.5 * ((x.unsqueeze(1) - centres) / std).square()).log_softmax(
            1
        )
    return rotated(torch.stack(samples, 1), axes.transpose(-1, -2)).reshape(
        len(mixture.means), *mixture.means.shape[2:]
    )


def to_normal(mixture: GaussianMixture, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Invert `from_normal`: map every axis by its CDF given the earlier ones, all at once."""
    axes = principal_axes(mixture) if axes is None else axes
    means = rotated(mixture.means.flatten(3), axes)
    offsets = (rotated(x.flatten(2), axes).unsqueeze(1) - means) / mixture.log_std.exp().reshape(
        -1, 1, 1, 1
    )  # (B, K, C, S)
    before = offsets.square().cumsum(2) - offsets.square()
    weights = (mixture.log_weights.flatten(3) - 0.5 * before).softmax(1)
    level = (weights * torch.erf(offsets / ROOT_2)).sum(1).clamp(-1 + 1e-6, 1 - 1e-6)
    return (ROOT_2 * torch.erfinv(level)).reshape(x.shape)


def sample_with_spectrum(
    mixture: GaussianMixture, log_power: Tensor, noise: Tensor, axes: Tensor | None = None
) -> Tensor:
    """Draw samples from noise with a power spectrum, through `from_normal`; images only.

    The even and the odd part of the noise under k -> -k are the spectrum's real and imaginary part.
    """
    coefficients = noise * (0.5 * log_power).exp()
    mirrored = coefficients.flip((-2, -1)).roll((1, 1), (-2, -1))
    spectrum = torch.complex(coefficients + mirrored, coefficients - mirrored) / 2
    return from_normal(mixture, torch.fft.ifft2(spectrum, norm="ortho").real, axes)


# Losses


def transition_nll(
    velocity: GaussianMixture, x_low: Tensor, x_high: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """Return GMFlow's loss (B, *S): the NLL of x_low under the mixture predicted at x_high.

    `low` and `high` are the sigmas (B,) of x_low and x_high.
    """
    low, high = (sigma.reshape(-1, *[1] * x_high.ndim) for sigma in (low, high))
    x_low, x_high = x_low.unsqueeze(1), x_high.unsqueeze(1)
    means_x0 = x_high - high * velocity.means
    shrink, decay = low / high, (1 - high) / (1 - low)
    bridge = 1 - (shrink * decay) ** 2
    means = shrink**2 * decay * x_high + bridge * (1 - low) * means_x0
    var = (bridge * (1 - low) * high * velocity.log_std.exp()) ** 2 + bridge * low**2
    log_density = (-0.5 * (x_low - means).square() / var - 0.5 * var.log()).sum(2, keepdim=True)
    return -(velocity.log_weights + log_density).logsumexp(1).squeeze(1)


def spectral_nll(velocity: GaussianMixture, target: Tensor, log_power: Tensor) -> Tensor:
    """Return GMFlow's spectral loss (B, *S) of images, with gradients in `log_power` only."""
    with torch.no_grad():
        spectrum = torch.fft.fft2(to_normal(velocity, target), norm="ortho")
        power = (spectrum.real + spectrum.imag).square()
    return 0.5 * (power * ((-log_power).exp() - 1) + log_power).sum(1)


def round_rows(weight: Tensor, group: int = 256) -> tuple[Tensor, Tensor]:
    """Round a weight (N, K) to int8 with one scale a row.

    Groups of its inputs are rotated by the regular Hadamard matrix first.
    """
    four, matrix = torch.ones(4, 4) - 2 * torch.eye(4).flip(0), torch.ones(1, 1)
    while len(matrix) < group:
        matrix = torch.kron(matrix, four) / 2
    rotated = (weight.float().unflatten(1, (-1, group)) @ matrix).flatten(1)
    scale = rotated.abs().amax(1, keepdim=True) / 127
    return (rotated / scale).round().clamp(-127, 127).to(torch.int8), scale
