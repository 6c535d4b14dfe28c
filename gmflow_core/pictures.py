"""Grids of images and captioned sheets of pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def to_image(picture: Tensor) -> Image.Image:
    """Convert a picture (H, W, 3) in [0, 1] to a PIL image."""
    return Image.fromarray((picture * 255).round().clamp(0, 255).to(torch.uint8).numpy())


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[tuple[str, Tensor]]]],
    reference: tuple[str, Tensor],
    title: str,
    tile: int = 256,
) -> Image.Image:
    """Draw pictures in a captioned grid, below a title and a reference picture.

    Args:
        rows: (row caption, [(caption, picture (H, W, 3)), ...]).
        reference: (caption, picture), drawn beside the title.
        title: one or more lines.
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
    draw.multiline_text(
        (left + tile + 2 * gap, gap + tile // 3), title, "black", font, spacing=line // 2
    )
    return sheet


def image_grid(images: Tensor, columns: int, scale: int = 1, gap: int = 2) -> Tensor:
    """Arrange images (B, 3, h, w) in [0, 1] row by row on white, and return the picture (H, W, 3).

    Each pixel is drawn as `scale` x `scale` pixels, with `gap` white pixels between images.
    """
    images = images.float().cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    rows = -(-len(images) // columns)
    height, width = images.shape[2] + gap, images.shape[3] + gap
    grid = torch.ones(gap + rows * height, gap + columns * width, 3)
    for i, image in enumerate(images):
        y, x = gap + i // columns * height, gap + i % columns * width
        grid[y : y + height - gap, x : x + width - gap] = image.permute(1, 2, 0)
    return grid
