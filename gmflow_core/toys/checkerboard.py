"""The 2-D checkerboard that the toy models learn, and how far samples are from it.

The distribution is uniform on 8 of the 16 squares of side 2 that tile [-4, 4]^2, the lower-left one among them.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXTENT = 4.0  # the board is [-EXTENT, EXTENT]^2
CELLS = 4  # squares a side
BINS = 64  # histogram bins a side


def draw_checkerboard(count: int, generator: torch.Generator | None = None, device="cpu") -> Tensor:
    """`count` exact samples, (count, 2); drawn on the generator's device and moved to `device`."""
    source = generator.device if generator is not None else device
    square = torch.randint(CELLS * CELLS // 2, (count,), generator=generator, device=source)
    row = square // (CELLS // 2)
    column = 2 * (square % (CELLS // 2)) + row % 2
    corner = torch.stack([column, row], -1)
    unit = torch.rand(count, 2, generator=generator, device=source)
    return ((corner + unit) * (2 * EXTENT / CELLS) - EXTENT).to(device)


def on_board(x: Tensor, slack: float = 0.0) -> Tensor:
    """Which points (..., 2) lie on a filled square, or within `slack` of one (Chebyshev distance)."""
    side = 2 * EXTENT / CELLS
    cell = torch.arange(CELLS, device=x.device)
    low = cell * side - EXTENT
    inside = (x.unsqueeze(-1) >= low - slack) & (
        x.unsqueeze(-1) <= low + side + slack
    )  # (..., 2, CELLS)
    filled = (cell[:, None] + cell[None, :]) % 2 == 0
    return (inside[..., 0, :, None] & inside[..., 1, None, :] & filled).flatten(-2).any(-1)


def histogram(x: Tensor, bins: int = BINS, extent: float = EXTENT) -> Tensor:
    """Counts of points (N, 2) in a bins x bins grid over [-extent, extent]^2, (row y, column x), y upwards; points
    outside, and points that are not finite, are left out."""
    index = ((x.double() + extent) * (bins / (2 * extent))).floor()
    index = index[((index >= 0) & (index < bins)).all(-1)].long()
    return torch.bincount(index[:, 1] * bins + index[:, 0], minlength=bins * bins).reshape(
        bins, bins
    )


def board_density(bins: int = BINS) -> Tensor:
    """The exact probability of every bin of `histogram`; `bins` a multiple of 4."""
    cell = torch.arange(bins) // (bins // CELLS)
    filled = (cell[:, None] + cell[None, :]) % 2 == 0
    return filled / filled.sum()


def total_variation(x: Tensor) -> float:
    """Total variation distance between the 64 x 64 histogram of points (N, 2) and the exact one, in [0, 1]; half of the
    probability that falls outside the board counts too. 200,000 exact samples give 0.0405."""
    share = histogram(x).double() / len(x)
    return 0.5 * ((share - board_density().to(share)).abs().sum() + 1 - share.sum()).item()
