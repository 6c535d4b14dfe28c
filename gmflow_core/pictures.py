"""Grids of images and captioned sheets of pictures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# Perceptually uniform colours, from nothing to much
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
_NOTHING = torch.tensor([225.0, 225.0, 225.0])


def to_image(picture: Tensor) -> Image.Image:
    """Convert a picture (H, W, 3) in [0, 1] to a PIL image."""
    return Image.fromarray((picture * 255).round().clamp(0, 255).to(torch.uint8).numpy())


def to_picture(image: Image.Image) -> Tensor:
    """Convert a PIL image to a picture (H, W, 3) in [0, 1]."""
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return pixels.reshape(image.height, image.width, 3).float() / 255


def colours(level: Tensor) -> Tensor:
    """Return perceptually uniform colours (..., 3) in [0, 1], dark for 0 and bright for 1.

    Levels that are not finite, which stand for "nothing here", are light grey.
    """
    known = level.isfinite()
    position = torch.where(known, level, 0).clamp(0, 1) * (len(_COLOURS) - 1)
    low = position.long().clamp(max=len(_COLOURS) - 2)
    colour = torch.lerp(_COLOURS[low], _COLOURS[low + 1], (position - low).unsqueeze(-1).float())
    return torch.where(known.unsqueeze(-1), colour, _NOTHING) / 255


@dataclass(frozen=True)
class SheetLayout:
    """Places on a sheet of captioned pictures.

    Args:
        tile: pixels from side to side of each picture.
        height: pixels from top to bottom of each picture.
        named: rows have a caption at their left.
        header: pixels from the sheet's top to its first row of pictures.
    """

    tile: int
    height: int
    named: bool = True
    header: int = 0

    @property
    def gap(self) -> int:
        """Pixels between pictures."""
        return self.tile // 16

    @property
    def line(self) -> int:
        """Pixels to a line of text."""
        return max(12, self.tile // 14)

    @property
    def left(self) -> int:
        """Pixels to the left of the first column."""
        return self.tile // 2 if self.named else self.gap

    @property
    def cell(self) -> int:
        """Pixels from one row of pictures to the next."""
        return self.height + int(self.line * 1.4) + self.gap

    def place(self, row: int, column: int) -> tuple[int, int]:
        """Return the left and the top edge of a picture."""
        return self.left + column * (self.tile + self.gap), (
            self.header + self.gap + row * self.cell
        )

    def size(self, rows: int, columns: int) -> tuple[int, int]:
        """Return width and height of the sheet."""
        return self.place(0, columns)[0], self.place(rows, 0)[1]


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[tuple[str, Tensor]]]],
    reference: tuple[str, Tensor] | None,
    title: str,
    tile: int = 256,
) -> Image.Image:
    """Draw pictures in a captioned grid, below a title and, if there is one, a reference picture.

    Args:
        rows: (row caption, [(caption, picture (H, W, 3)), ...]).
        reference: (caption, picture), drawn beside the title.
        title: one or more lines.
        tile: pixels from side to side of each picture, which is at most twice as high.
    """
    layout = layout_of(rows, reference is not None, title, tile)
    font, small = _font(layout.line * 1.1), _font(layout.line * 0.9)
    drawn = [("", [reference]), *rows] if reference else list(rows)
    columns = max(len(cells) for _, cells in drawn)
    width, height = layout.size(len(drawn), columns)
    widest = max(font.getlength(line) for line in title.splitlines() or [""])
    width = width if reference else max(width, round(widest) + 2 * layout.gap)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (name, cells) in enumerate(drawn):
        y = layout.place(r, 0)[1]
        middle = y + layout.height // 2 - layout.line
        draw.multiline_text((layout.gap, middle), name, "black", font)
        for c, (caption, picture) in enumerate(cells):
            x, _ = layout.place(r, c)
            size = fitting_size(picture, layout.tile, layout.height)
            sheet.paste(to_image(picture).resize(size, Image.Resampling.BOX), (x, y))
            draw.text((x, y + layout.height + layout.line // 5), caption, "black", small)
    at = (layout.gap, layout.gap)
    if reference:
        at = (layout.left + tile + 2 * layout.gap, layout.gap + layout.height // 3)
    draw.multiline_text(at, title, "black", font, spacing=layout.line // 2)
    return sheet


def layout_of(
    rows: Sequence[tuple[str, Sequence[tuple[str, Tensor]]]],
    has_reference: bool,
    title: str,
    tile: int,
) -> SheetLayout:
    """Return the places on a `contact_sheet`."""
    pictures = [picture for _, cells in rows for _, picture in cells]
    height = max(fitting_size(picture, tile, 2 * tile)[1] for picture in pictures)
    layout = SheetLayout(tile, tile if has_reference else height, any(name for name, _ in rows))
    lines = 0 if has_reference else len(title.splitlines())
    header = lines * round(layout.line * 1.7) + layout.gap if lines else 0
    return replace(layout, header=header)


def fitting_size(picture: Tensor, width: int, height: int) -> tuple[int, int]:
    """Return the largest width and height of a picture (H, W, 3) within a box."""
    scale = min(width / picture.shape[1], height / picture.shape[0])
    return max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))


def _font(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def mean_pairwise_distance(pictures: Tensor) -> float:
    """Return how much pictures (N, H, W, 3) in [0, 1] differ: the mean distance of two of them.

    The distance of two pictures is the root mean square of the differences of their pixels' values,
    over pixels and colours: 0 for equal pictures, 1 for black and white.

    Raises:
        ValueError: there are fewer than two.
    """
    if len(pictures) < 2:
        raise ValueError(f"{len(pictures)} pictures have no distance from each other; give two")
    distances = [
        (first - second).square().mean().sqrt()
        for first, second in itertools.combinations(pictures.float(), 2)
    ]
    return float(torch.stack(distances).mean())


def stacked(pictures: Sequence[Tensor]) -> Tensor:
    """Put pictures (H, W, 3) of any sizes one below the other, with white at their right."""
    width = max(picture.shape[1] for picture in pictures)
    missing = [width - picture.shape[1] for picture in pictures]
    padded = [F.pad(p, (0, 0, 0, m), value=1.0) for p, m in zip(pictures, missing, strict=True)]
    return torch.cat(padded)


def reduced(picture: Tensor, size: int) -> Tensor:
    """Return a picture (H, W, 3) with a longer side of at most `size` pixels."""
    width, height = fitting_size(picture, size, size)
    if width >= picture.shape[1]:
        return picture
    return to_picture(to_image(picture).resize((width, height), Image.Resampling.BOX))


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
