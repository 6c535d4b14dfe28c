"""Fixed features of time and position that networks see."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def time_features(sigma: Tensor, size: int, *, include_end: bool = False) -> Tensor:
    """Cosines, then sines, of t = 1000 sigma at geometrically spaced frequencies from 1 down to 1e-4: (B,) -> (B, size).

    Args:
        size: number of features, even.
        include_end: whether the last frequency is 1e-4 itself, or the spacing is such that it would be the next one.
    """
    half = size // 2
    steps = torch.arange(half, dtype=torch.float32, device=sigma.device) / max(
        half - 1 if include_end else half, 1
    )
    angle = 1000 * sigma.float().unsqueeze(-1) * (-math.log(10000) * steps).exp()
    return torch.cat([angle.cos(), angle.sin()], -1)


def grid_features(
    height: int, width: int, size: int, extent: int, device: torch.device | None = None
) -> Tensor:
    """Sine and cosine features of the positions of a height x width grid of patches, row by row: (height * width, size).

    The first half of the features encodes the column, the second the row; within each, sines come before cosines. The
    grid is stretched to `extent` patches both ways, the size that the network was trained at.

    Args:
        size: number of features, divisible by 4.
    """
    frequency = 10000 ** (
        -torch.arange(size // 4, dtype=torch.float64, device=device) / (size // 4)
    )

    def axis(count: int) -> Tensor:
        angle = (
            torch.arange(count, dtype=torch.float64, device=device)
            .mul(extent / count)
            .outer(frequency)
        )
        return torch.cat([angle.sin(), angle.cos()], -1)  # (count, size / 2)

    columns = axis(width).expand(height, -1, -1)
    rows = axis(height).unsqueeze(1).expand(-1, width, -1)
    return torch.cat([columns, rows], -1).flatten(0, 1).float()
