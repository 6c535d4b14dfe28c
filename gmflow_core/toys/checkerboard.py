"""2-D checkerboard that the toy models learn, and measures of how close samples are to it.

The distribution is uniform on 8 of the 16 squares of side 2 that tile [-4, 4]^2, the lower-left
square among them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EXTENT = 4.0  # the board is [-EXTENT, EXTENT]^2
CELLS = 4  # squares a side
BINS = 64  # histogram bins a side
LEAST_SIGNAL = 1e-5  # of the exact posterior, which differs by less than 1e-3 at a signal of 0


def draw_checkerboard(count: int, generator: torch.Generator | None = None, device="cpu") -> Tensor:
    """Draw exact samples (count, 2), on the generator's device, and move them to `device`."""
    source = generator.device if generator is not None else device
    square = torch.randint(CELLS * CELLS // 2, (count,), generator=generator, device=source)
    row = square // (CELLS // 2)
    column = 2 * (square % (CELLS // 2)) + row % 2
    corner = torch.stack([column, row], -1)
    unit = torch.rand(count, 2, generator=generator, device=source)
    return ((corner + unit) * (2 * EXTENT / CELLS) - EXTENT).to(device)


def on_board(x: Tensor, slack: float = 0.0) -> Tensor:
    """Return a mask (...) of the points (..., 2) on a filled square or within `slack` of one.

    `slack` is a Chebyshev distance.
    """
    side = 2 * EXTENT / CELLS
    cell = torch.arange(CELLS, device=x.device)
    low = cell * side - EXTENT
    x = x.unsqueeze(-1)
    inside = (x >= low - slack) & (x <= low + side + slack)  # (..., 2, CELLS)
    filled = (cell[:, None] + cell[None, :]) % 2 == 0
    return (inside[..., 0, :, None] & inside[..., 1, None, :] & filled).flatten(-2).any(-1)


def histogram(x: Tensor, bins: int = BINS, extent: float = EXTENT) -> Tensor:
    """Count points (N, 2) in a grid over [-extent, extent]^2.

    Points outside and points that are not finite are left out.

    Returns:
        (bins, bins) int64: row y, column x, with y upwards.
    """
    index = ((x.double() + extent) * (bins / (2 * extent))).floor()
    index = index[((index >= 0) & (index < bins)).all(-1)].long()
    counts = torch.bincount(index[:, 1] * bins + index[:, 0], minlength=bins * bins)
    return counts.reshape(bins, bins)


def board_density(bins: int = BINS) -> Tensor:
    """Return the exact probability of every bin of `histogram`; `bins` is a multiple of 4."""
    cell = torch.arange(bins) // (bins // CELLS)
    filled = (cell[:, None] + cell[None, :]) % 2 == 0
    return filled / filled.sum()


def total_variation(x: Tensor) -> float:
    """Return the total variation distance between points (N, 2) and the checkerboard, in [0, 1].

    It compares 64 x 64 histograms and adds half of the share of points outside the board. 200,000
    exact samples give 0.0405.
    """
    share = histogram(x).double() / len(x)
    return 0.5 * ((share - board_density().to(share)).abs().sum() + 1 - share.sum()).item()


def board_posterior_mean(x: Tensor, sigma: Tensor) -> Tensor:
    """Return the exact E[x_0 | x, sigma] of the checkerboard at points (N, 2).

    Given x, x_0 follows N(x / a, (sigma / a)^2 I), a = 1 - sigma, within the filled squares: a
    mixture of truncated Gaussians. It is differentiable, and computed in float64.

    Args:
        sigma: (N,) in (0, 1].

    Returns:
        (N, 2), in x's dtype.
    """
    sigma = sigma.to(x.device, torch.float64).reshape(-1, 1, 1)
    signal = (1 - sigma).clamp(min=LEAST_SIGNAL)
    std, centre = sigma / signal, x.double().unsqueeze(-1) / signal  # (N, 1, 1), (N, 2, 1)
    side = 2 * EXTENT / CELLS
    low = torch.arange(CELLS, device=x.device, dtype=torch.float64) * side - EXTENT
    log_mass, mean = _truncated(centre, std, low, low + side)  # (N, 2, CELLS)
    cells = torch.arange(CELLS, device=x.device)
    empty = (cells[:, None] + cells) % 2 == 1  # (column, row)
    joint = log_mass[:, 0, :, None] + log_mass[:, 1, None, :]
    weights = joint.masked_fill(empty, -torch.inf).flatten(1).softmax(1).reshape(joint.shape)
    means = [(weights.sum(2 - axis) * mean[:, axis]).sum(1) for axis in range(2)]
    return torch.stack(means, 1).to(x.dtype)


def _truncated(centre: Tensor, std: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-mass and mean of N(centre, std^2) between low and high, elementwise."""
    middle = 0.5 * (low + high)
    sign = torch.where(centre < middle, -1.0, 1.0)  # mirrored: log_ndtr is exact in its lower tail
    near = sign * (torch.where(sign > 0, high, low) - centre) / std
    far = sign * (torch.where(sign > 0, low, high) - centre) / std
    log_near, log_far = torch.special.log_ndtr(near), torch.special.log_ndtr(far)
    log_mass = log_near + torch.log1p(-(log_far - log_near).exp())

    def share(bound: Tensor) -> Tensor:
        return (-0.5 * (bound.square() + math.log(2 * math.pi)) - log_mass).exp()

    return log_mass, centre - sign * std * (share(near) - share(far))
