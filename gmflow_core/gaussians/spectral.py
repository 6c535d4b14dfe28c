"""Correlated draws: standard normal fields with a given power spectrum."""

from __future__ import annotations

import torch
from torch import Tensor

from .mixture import Mixture
from .transport import AxisMap


def hartley(x: Tensor) -> Tensor:
    """Return real plus imaginary part of the orthonormal Fourier transform over space.

    This is the Hartley transform (with the opposite sign of the sines): real, orthogonal, and its
    own inverse for every size. (B, C, *S) -> (B, C, *S).
    """
    spectrum = torch.fft.fftn(x, dim=tuple(range(2, x.ndim)), norm="ortho")
    return spectrum.real + spectrum.imag


def sample_with_spectrum(
    mixture: Mixture,
    log_power: Tensor,
    noise: Tensor,
    axes: Tensor | None = None,
    axis_map: AxisMap | None = None,
) -> Tensor:
    """Draw from `mixture` with pixels that vary together as a power spectrum says.

    Noise with that spectrum goes through the inverse Knothe-Rosenblatt map, so every pixel still
    follows its own mixture (spectral sampling of GMFlow, ICML 2025).

    Args:
        log_power: (B, C, *S), logarithm of the power at every frequency (in the FFT's order) of
            every principal axis, with mean power 1 per axis. A spectrum that is equal at k and -k,
            as real images have, gives every pixel exactly its own mixture.
        noise: standard normal, (B, C, *S).
        axes: recorded principal axes; `mixture.principal_axes()` if None.
        axis_map: see `GaussianMixture.from_normal`.

    Returns:
        (B, C, *S).
    """
    return mixture.from_normal(hartley(noise * (0.5 * log_power).exp()), axes, axis_map)


def spectral_log_prob(
    mixture: Mixture, x: Tensor, log_power: Tensor, axes: Tensor | None = None
) -> Tensor:
    """Return the joint log-density in nats of x under the draws of `sample_with_spectrum`.

    The map to white frequencies is invertible: `to_normal` per pixel, whose Jacobian turns N(0, I)
    into the mixture's density, then an orthogonal transform and a scale per frequency. So the
    density is the product of the pixels' own, times that of the frequencies under the spectrum over
    that under a white one.

    Args:
        x: (B, C, *S).
        log_power, axes: as for the draws.

    Returns:
        (B,), with the 2 pi term.
    """
    power = hartley(mixture.to_normal(x, axes)).square()
    gain = 0.5 * (power * (1 - (-log_power).exp()) - log_power)  # (B, C, *S)
    return mixture.log_prob(x).flatten(1).sum(1) + gain.flatten(1).sum(1)
