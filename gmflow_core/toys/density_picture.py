"""Pictures of the density of 2-D samples."""

from __future__ import annotations

import torch
from PIL import ImageDraw
from torch import Tensor

from ..pictures import to_image
from .checkerboard import CELLS, EXTENT, histogram

# Perceptually uniform colours, from no samples to many
_COLOURS = torch.tensor(
    [
        [13, 8, 45],
        [60, 15, 110],
        [125, 30, 125],
        [190, 55, 105],
        [235, 100, 70],
        [252, 165, 55],
        [252, 240, 160],
    ],
    dtype=torch.float32,
)
_OUTLINE = torch.tensor([90, 235, 225], dtype=torch.float32)


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
    level = (histogram(points.detach().cpu(), bins, extent) / expected).clamp(0, 1)
    position = level * (len(_COLOURS) - 1)
    low = position.long().clamp(max=len(_COLOURS) - 2)
    picture = torch.lerp(_COLOURS[low], _COLOURS[low + 1], (position - low).unsqueeze(-1).float())
    cell = torch.arange(size) * bins // size
    picture = picture.flip(0)[cell][:, cell]
    if outline:
        picture = _draw_board(picture, extent)
    return picture / 255


def _draw_board(picture: Tensor, extent: float) -> Tensor:
    """Draw the outlines of the filled squares over `picture` (size, size, 3) in [0, 255]."""
    size = len(picture)
    image = to_image(picture / 255)
    draw = ImageDraw.Draw(image)
    side = 2 * EXTENT / CELLS
    for column in range(CELLS):
        for row in range(column % 2, CELLS, 2):
            x, y = column * side - EXTENT, row * side - EXTENT
            corners = [(x + extent), (extent - y - side), (x + side + extent), (extent - y)]
            box = [round(c * size / (2 * extent)) for c in corners]
            draw.rectangle(box, outline=tuple(_OUTLINE.int().tolist()), width=max(1, size // 256))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(size, size, 3).float()
