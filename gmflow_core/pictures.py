"""Pictures: densities of 2-D samples, grids of images, captioned sheets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .checkerboard import CELLS, EXTENT, histogram

# Perceptually even colours from no samples to many.
_COLOURS = torch.tensor(
    [[13, 8, 45], [60, 15, 110], [125, 30, 125], [190, 55, 105], [235, 100, 70], [252, 165, 55], [252, 240, 160]],
    dtype=torch.float32,
)
_OUTLINE = torch.tensor([90, 235, 225], dtype=torch.float32)


def density_picture(
    points: Tensor, size: int = 512, bins: int = 128, extent: float = 4.4, peak: float | None = None, outline: bool = False
) -> Tensor:
    """A picture of where points lie, y upwards.

    Args:
        points: (N, 2).
        size: pixels a side.
        bins: histogram cells a side, at most `size`.
        extent: the picture shows [-extent, extent]^2.
        peak: the density per unit area that gets the brightest colour; 1.5 times that of a checkerboard if None.
        outline: draw the border of the checkerboard's filled squares.

    Returns:
        (size, size, 3), float32 in [0, 1].

    Raises:
        ValueError: `points` are not (N, 2) with N > 0, or a number is not positive.
    """
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"points of shape {tuple(points.shape)} cannot be drawn; give (N, 2) with at least one point")
    if not 1 <= bins <= size or not extent > 0:
        raise ValueError(f"bins {bins} must be between 1 and size {size}, and extent {extent} positive")
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
    """The outlines of the filled squares over `picture` (size, size, 3)."""
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
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(size, size, 3).float()


def to_image(picture: Tensor) -> Image.Image:
    """(H, W, 3) in [0, 1] as a PIL image."""
    return Image.fromarray((picture * 255).round().clamp(0, 255).to(torch.uint8).numpy())


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[tuple[str, Tensor]]]], reference: tuple[str, Tensor], title: str, tile: int = 256
) -> Image.Image:
    """Pictures in a captioned grid, below a title with a picture to compare them with.

    Args:
        rows: (row caption, [(caption, picture (H, W, 3)), ...]).
        reference: (caption, picture), beside the title.
        title: may have several lines.
        tile: pixels a side of each picture on the sheet.
    """
    gap, line, left = tile // 16, max(12, tile // 14), tile // 2
    font, small = ImageFont.load_default(line * 1.1), ImageFont.load_default(line * 0.9)
    cell = tile + int(line * 1.4) + gap
    columns = max(len(cells) for _, cells in rows)
    sheet = Image.new("RGB", (left + columns * (tile + gap), gap + (1 + len(rows)) * cell), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (name, cells) in enumerate([("", [reference]), *rows]):
        y = gap + r * cell
        draw.multiline_text((gap, y + tile // 2 - line), name, "black", font)
        for c, (caption, picture) in enumerate(cells):
            x = left + c * (tile + gap)
            sheet.paste(to_image(picture).resize((tile, tile), Image.Resampling.BOX), (x, y))
            draw.text((x, y + tile + line // 5), caption, "black", small)
    draw.multiline_text((left + tile + 2 * gap, gap + tile // 3), title, "black", font, spacing=line // 2)
    return sheet


def image_grid(images: Tensor, columns: int, scale: int = 1, gap: int = 2) -> Tensor:
    """Images (B, 3, h, w) in [0, 1] side by side, row after row, on white: (H, W, 3), each pixel drawn `scale` x `scale`."""
    images = images.float().cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    rows = -(-len(images) // columns)
    height, width = images.shape[2] + gap, images.shape[3] + gap
    grid = torch.ones(gap + rows * height, gap + columns * width, 3)
    for i, image in enumerate(images):
        y, x = gap + i // columns * height, gap + i % columns * width
        grid[y : y + height - gap, x : x + width - gap] = image.permute(1, 2, 0)
    return grid
