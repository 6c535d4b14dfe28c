"""The Knothe-Rosenblatt map between a Gaussian mixture and the standard normal distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..fast.compiling import fusible
from .tensors import sum_of_products

if TYPE_CHECKING:
    from .mixture import GaussianMixture


def _given(log_weights: Tensor, offset: Tensor) -> Tensor:
    """The log-weights (B, K, *S), up to a constant, once a coordinate is known: `offset` standard deviations from the
    components'."""
    return torch.addcmul(log_weights, offset, offset, value=-0.5)


@fusible
def _given_point(log_weights: Tensor, x: Tensor, means: Tensor, std: Tensor) -> Tensor:
    """`_given` with the coordinate itself, (B, *S), and the components' means, (B, K, *S)."""
    return _given(log_weights, (x.unsqueeze(1) - means) / std)


@fusible
def _principal_axes(mixture: GaussianMixture, per_pixel: bool) -> Tensor:
    covariance = mixture.covariance(average=not per_pixel)
    finite = covariance.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    channels = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    covariance = torch.where(finite, covariance, channels)  # or LAPACK gives up
    return torch.linalg.eigh(covariance).eigenvectors.flip(-1)


def _root_weighted(means: Tensor, log_weights: Tensor) -> Tensor:
    """The means relative to their mean, times the roots of the weights, (B, K, C, *S)."""
    roots = (0.5 * log_weights).exp()
    return (means - sum_of_products(means, roots.square(), 1)) * roots


def _rotate(x: Tensor, axes: Tensor) -> Tensor:
    """(B, K, C, *S) in the coordinates along the columns of axes (B, *S or *1, C, C)."""
    space = x.shape[3:]
    if axes.shape[1:-2].numel() == 1 and space:  # shared by the pixels
        return (axes.reshape(-1, 1, *axes.shape[-2:]).mT @ x.flatten(3)).unflatten(3, space)
    return (x.movedim((1, 2), (-2, -1)) @ axes).movedim((-2, -1), (1, 2))
