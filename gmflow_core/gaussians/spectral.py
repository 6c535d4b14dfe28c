"""Draws whose neighbouring pixels belong together: standard normal fields with a given power spectrum."""

from __future__ import annotations

import torch
from torch import Tensor

from .mixture import GaussianMixture


def hartley(x: Tensor) -> Tensor:
    """Real plus imaginary part of the orthonormal Fourier transform over space, (B, C, *S) -> (B, C, *S): the Hartley
    transform (with the opposite sign of the sines). It is real, orthogonal, and its own inverse, whatever the size."""
    spectrum = torch.fft.fftn(x, dim=tuple(range(2, x.ndim)), norm="ortho")
    return spectrum.real + spectrum.imag


def sample_with_spectrum(
    mixture: GaussianMixture, log_power: Tensor, noise: Tensor, axes: Tensor | None = None
) -> Tensor:
    """One draw of `mixture`, (B, C, *S), whose pixels each follow their own mixture and vary together as the spectrum says
    (GMFlow, ICML 2025): noise with that spectrum goes through the inverse Knothe-Rosenblatt map.

    Args:
        log_power: (B, C, *S), logarithm of the power at every frequency (in the FFT's order) of every principal axis; each
            axis has the mean power 1. As much at -k as at k (as real images have) gives every pixel exactly its own mixture.
        noise: standard normal, (B, C, *S).
        axes: recorded principal axes; `mixture.principal_axes()` if None.
    """
    return mixture.from_normal(hartley(noise * (0.5 * log_power).exp()), axes)
