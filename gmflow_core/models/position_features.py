"""Fixed features of time and position: sines and cosines, not trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..gaussians.tensors import widest


def time_features(sigma: Tensor, size: int, *, include_end: bool = False) -> Tensor:
    """Return cosines, then sines, of t = 1000 sigma, (B,) -> (B, size).

    The frequencies are spaced geometrically from 1 down to 1e-4.

    Args:
        sigma: (B,) in [0, 1].
        size: number of features, even.
        include_end: if True, the last frequency is 1e-4; if False, the one after the last would be.
    """
    half = size // 2
    last = max(half - 1 if include_end else half, 1)
    steps = torch.arange(half, dtype=torch.float32, device=sigma.device) / last
    angle = 1000 * sigma.float().unsqueeze(-1) * (-math.log(10000) * steps).exp()
    return torch.cat([angle.cos(), angle.sin()], -1)


def grid_features(
    height: int, width: int, size: int, extent: int, device: torch.device | None = None
) -> Tensor:
    """Return sine and cosine features of the positions in a grid of patches, row by row.

    The first half of the features encodes the column, the second the row; within each, sines come
    before cosines. The grid is stretched to `extent` patches both ways.

    Args:
        height, width: patches in a column and in a row.
        size: number of features, divisible by 4.
        extent: patches a side that the network was trained at.

    Returns:
        (height * width, size), float32.
    """
    rows, columns = grid_angles(height, width, size // 4, extent, device)
    features = [columns.sin(), columns.cos(), rows.sin(), rows.cos()]
    return torch.cat(features, -1).flatten(0, 1).float()


def grid_angles(
    height: int, width: int, count: int, extent: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Return the angles of the rows and of the columns of a grid, each (height, width, count).

    An angle is position times frequency. Positions are stretched from 0 ... height - 1 (or width -
    1) to `extent`; the frequencies are spaced geometrically from 1 down to 1e-4. float64, or
    float32 on devices that lack it.
    """
    dtype = widest(torch.device(device or "cpu"))
    frequency = 10000 ** (-torch.arange(count, dtype=dtype, device=device) / count)

    def axis(length: int) -> Tensor:
        position = torch.arange(length, dtype=dtype, device=device) * (extent / length)
        return position.outer(frequency)

    shape = (height, width, count)
    return axis(height).unsqueeze(1).expand(shape), axis(width).expand(shape)
