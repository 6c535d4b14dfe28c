"""Knothe-Rosenblatt map between a Gaussian mixture and the standard normal distribution.

The map goes axis after axis: the first coordinate through its marginal CDF, each later one through
its CDF given the earlier ones. All functions take a mixture as tensors: means (B, K, C, *S),
log_weights (B, K, 1, *S), log_std broadcastable to (B, 1, 1, *S).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .quantile import mixture_quantile, normal_score
from .tensors import sum_of_products, where_it_is_known


def covariance(means: Tensor, log_weights: Tensor, log_std: Tensor, average: bool) -> Tensor:
    """Return the full covariance over channels, per pixel or averaged over space.

    Returns:
        (B, *S or *1, C, C).
    """
    channels, *space = means.shape[2:]
    within = (2 * log_std[:, 0, 0, ..., None, None]).exp()  # (B, *S or *1, 1, 1)
    roots = (0.5 * log_weights).exp()
    offsets = (means - sum_of_products(means, roots.square(), 1)) * roots
    if average and space:
        offsets = offsets.flatten(3)  # (B, K, C, n)
        between = (offsets @ offsets.mT).sum(1).div(offsets.shape[-1])
        between = between.unflatten(0, (-1, *[1] * len(space)))
        within = within.mean(tuple(range(1, 1 + len(space))), keepdim=True)
    else:
        offsets = offsets.movedim((2, 1), (-2, -1))  # (B, *S, C, K)
        between = offsets @ offsets.mT
    return between + within * torch.eye(channels, dtype=means.dtype, device=means.device)


@torch.no_grad()
def principal_axes(means: Tensor, log_weights: Tensor, log_std: Tensor, per_pixel: bool) -> Tensor:
    """Return orthonormal channel axes, as columns, in descending order of variance.

    Signs are LAPACK's choice. Falls back to the channel axes if the covariance is not finite.

    Returns:
        (B, *S or *1, C, C).
    """
    matrix = covariance(means, log_weights, log_std, average=not per_pixel)
    finite = matrix.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    channels = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    matrix = torch.where(finite, matrix, channels)  # LAPACK raises on inf and NaN
    axes = where_it_is_known(lambda each: torch.linalg.eigh(each).eigenvectors, matrix)
    return axes.flip(-1)


def to_normal(
    x: Tensor, means: Tensor, log_weights: Tensor, log_std: Tensor, axes: Tensor
) -> Tensor:
    """Map samples of the mixture (B, C, *S) to standard normal ones; channel i lies along axis i.

    Args:
        axes: (B, *S or *1, C, C), as columns.
    """
    offsets = (rotate(x.unsqueeze(1) - means, axes) / log_std.exp()).unbind(2)  # C of (B, K, *S)
    log_weights, normal = log_weights.squeeze(2), []
    for offset in offsets:
        normal.append(normal_score(log_weights.softmax(1), offset))
        log_weights = weights_given_offset(log_weights, offset)
    return torch.stack(normal, 1)


def from_normal(
    z: Tensor,
    means: Tensor,
    log_weights: Tensor,
    log_std: Tensor,
    axes: Tensor,
    axis_map: AxisMap | None = None,
) -> Tensor:
    """Map standard normal samples (B, C, *S) to samples of the mixture: inverse of `to_normal`.

    Args:
        axes: (B, *S or *1, C, C), as columns.
        axis_map: the steps along one axis; PLAIN if None.
    """
    batch, _, channels, *space = means.shape
    # by axis and pixel: (C, 1, K, n), (1, K, n), (1, 1, n), (C, 1, n)
    means = rotate(means, axes).movedim((2, 1), (0, 1)).flatten(2).unsqueeze(1)
    log_weights = log_weights.movedim(1, 0).flatten(1).unsqueeze(0)
    std = log_std.exp().expand(batch, 1, 1, *space).reshape(1, 1, -1)
    z = z.movedim(1, 0).reshape(channels, 1, -1)
    quantile, given = axis_map or PLAIN
    x = [quantile(means[0], std, log_weights, z[0])]
    for axis in range(1, channels):
        log_weights = given(x[-1], means[axis - 1], std, log_weights)
        x.append(quantile(means[axis], std, log_weights, z[axis]))
    x = torch.stack(x, 1).unflatten(2, (batch, *space)).movedim(2, 0)  # (B, 1, C, *S)
    return rotate(x, axes.mT).squeeze(1)


def weights_given_offset(log_weights: Tensor, offset: Tensor) -> Tensor:
    """Return the log-weights (B, K, *S), up to a constant, given one coordinate.

    Args:
        offset: (B, K, *S), the coordinate's distance from the means in standard deviations.
    """
    return torch.addcmul(log_weights, offset, offset, value=-0.5)


def weights_given(x: Tensor, means: Tensor, std: Tensor, log_weights: Tensor) -> Tensor:
    """Return the log-weights (B, K, *S), up to a constant, given the coordinate x (B, *S)."""
    return weights_given_offset(log_weights, (x.unsqueeze(1) - means) / std)


class AxisMap(NamedTuple):
    """One form of the two steps along an axis of `from_normal`.

    Args:
        quantile: `mixture_quantile`, or an equal function.
        given: `weights_given`, or an equal function.
    """

    quantile: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    given: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


PLAIN = AxisMap(mixture_quantile, weights_given)


def rotate(x: Tensor, axes: Tensor) -> Tensor:
    """Return x (B, K, C, *S) in the coordinates along the columns of axes (B, *S or *1, C, C)."""
    space = x.shape[3:]
    if axes.shape[1:-2].numel() == 1 and space:  # one set of axes for all pixels
        return (axes.reshape(-1, 1, *axes.shape[-2:]).mT @ x.flatten(3)).unflatten(3, space)
    return (x.movedim((1, 2), (-2, -1)) @ axes).movedim((-2, -1), (1, 2))
