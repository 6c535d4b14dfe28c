"""Pictures of the density of 2-D samples."""

from __future__ import annotations

import torch
from PIL import ImageDraw
from torch import Tensor

from ..pictures import colours, to_image, to_picture
from .checkerboard import CELLS, EXTENT, histogram

_OUTLINE = (90, 235, 225)


def density_picture(
    points: Tensor,
    size: int = 512,
    bins: int = 128,
    extent: float = 4.4,
    peak: float | None = None,
    outline: bool = False,
) -> Tensor:
    """Draw the density of points, with y upwards.

    Args:
        points: (N, 2).
        size: pixels a side.
        bins: histogram cells a side, at most `size`.
        extent: the picture shows [-extent, extent]^2.
        peak: density per unit area that gets the brightest colour; 1.5 times that of a checkerboard
            if None.
        outline: draw the border of the checkerboard's filled squares.

    Returns:
        (size, size, 3), float32 in [0, 1].

    Raises:
        ValueError: `points` are not (N, 2) with N > 0, or a number is not positive.
    """
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(
            f"points of shape {tuple(points.shape)} cannot be drawn; "
            "give (N, 2) with at least one point"
        )
    if not 1 <= bins <= size or not extent > 0:
        raise ValueError(
            f"bins {bins} must be between 1 and size {size}, and extent {extent} positive"
        )
    peak = 1.5 / (2 * EXTENT**2) if peak is None else peak
    expected = len(points) * peak * (2 * extent / bins) ** 2
    picture = colours((histogram(points.detach().cpu(), bins, extent) / expected).clamp(0, 1))
    cell = torch.arange(size) * bins // size
    picture = picture.flip(0)[cell][:, cell]
    return _draw_board(picture, extent) if outline else picture


def _draw_board(picture: Tensor, extent: float) -> Tensor:
    """Draw the outlines of the filled squares over `picture` (size, size, 3)."""
    size = len(picture)
    image = to_image(picture)
    draw = ImageDraw.Draw(image)
    side = 2 * EXTENT / CELLS
    for column in range(CELLS):
        for row in range(column % 2, CELLS, 2):
            x, y = column * side - EXTENT, row * side - EXTENT
            corners = [(x + extent), (extent - y - side), (x + side + extent), (extent - y)]
            box = [round(c * size / (2 * extent)) for c in corners]
            draw.rectangle(box, outline=_OUTLINE, width=max(1, size // 256))
    return to_picture(image)
