"""Charts drawn with Pillow: maps with a colour scale, bars, histograms, mixtures in a plane."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .pictures import colours, fitting_size, to_image, to_picture

INK, GRID, BAR = (40, 40, 40), (215, 215, 215), (125, 30, 125)
SCALE = 16  # the colour scale under a map is 1 / SCALE as high as the map is wide
TICKS = 4  # intervals of an axis
NUMBERED = 12  # components with numbers beside them


def heat_map(values: Tensor, low: float, high: float, size: int = 256) -> Tensor:
    """Draw a map in colours, with a colour scale under it.

    Args:
        values: (h, w); those that are not finite are drawn in grey.
        low, high: values of the darkest and of the brightest colour.
        size: pixels of the map's longer side.

    Returns:
        (H, W, 3) in [0, 1]: the map, then `SCALE`'s share of it for gap and scale.
    """
    level = (values - low) / max(high - low, 1e-12)
    return with_scale(colours(level), size)


def with_scale(picture: Tensor, size: int, scale: bool = True) -> Tensor:
    """Draw a picture (h, w, 3) with a longer side of `size` pixels, and a colour scale under it.

    Args:
        scale: False leaves the scale's place white.
    """
    width, height = fitting_size(picture, size, size)
    large = to_image(picture).resize((width, height), Image.Resampling.BOX)
    strip = size // SCALE
    sheet = torch.ones(height + strip, width, 3)
    sheet[:height] = to_picture(large)
    if scale:
        sheet[height + strip // 3 :] = colours(torch.linspace(0, 1, width))
    return sheet


def bar_chart(values: Sequence[float], labels: Sequence[str], size: tuple[int, int]) -> Tensor:
    """Draw bars of values, at least 0, with a label under each (as many as there is room for).

    Args:
        size: width and height in pixels.

    Returns:
        (H, W, 3) in [0, 1].
    """
    image = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(image), _font(size[1])
    top = max(*values, 1e-12)
    decimals = max(0, 2 - math.ceil(math.log10(top)))
    numbers = [f"{top * i / TICKS:.{decimals}f}" for i in range(TICKS + 1)]
    left = 6 + max(font.getlength(number) for number in numbers)
    line = font.size * 1.4
    right, upper, lower = size[0] - 4, line / 2, size[1] - line
    for i, number in enumerate(numbers):
        y = lower - (lower - upper) * i / TICKS
        draw.line((left, y, right, y), GRID)
        draw.text((left - 3, y), number, INK, font, anchor="rm")
    step = (right - left) / len(values)
    widest = max(font.getlength(label) for label in labels) + 4
    every = max(1, -int(-widest // step))
    for i, (value, label) in enumerate(zip(values, labels, strict=True)):
        x = left + i * step
        bar = (lower - upper) * value / top
        if bar >= 1:
            draw.rectangle((x + step * 0.1, lower - bar, x + step * 0.9, lower), BAR)
        if i % every == 0:
            draw.text((x + step / 2, lower + 2), label, INK, font, anchor="mt")
    return to_picture(image)


def histogram_chart(values: Tensor, bins: int, size: tuple[int, int]) -> Tensor:
    """Draw the histogram of values in [0, 1]: the share of them in each of `bins` equal parts.

    Returns:
        (H, W, 3) in [0, 1], of `size`, width and height.
    """
    counts = torch.histc(values.float(), bins, 0.0, 1.0)
    labels = [f"{i / bins:.2g}" for i in range(bins)]
    return bar_chart((counts / counts.sum().clamp(min=1)).tolist(), labels, size)


def mixture_chart(
    means: Tensor,
    weights: Sequence[float],
    std: float,
    size: int,
    bounds: float | None = None,
    tints: Tensor | None = None,
) -> Tensor:
    """Draw the components of a mixture of two dimensions; the heaviest have their numbers.

    Each is a disc of one standard deviation, the more solid the larger its weight; a cross is the
    mean of the mixture.

    Args:
        means: (K, 2), x to the right and y upwards.
        weights: (K,), which sum to 1.
        std: of each component.
        size: pixels a side.
        bounds: the chart shows [-bounds, bounds]^2; all components around their mean if None.
        tints: colours (K, 3) in [0, 1] of the discs; all the same if None.

    Returns:
        (size, size, 3) in [0, 1].
    """
    share = torch.tensor(weights)
    mean = (share[:, None] * means).sum(0)
    centre, half = (torch.zeros(2), bounds) if bounds else (mean, _reach(means, mean, std))
    image = Image.new("RGBA", (size, size), "white")
    font = _font(size)
    unit = size / (2 * half)
    places = ((means - centre) * torch.tensor([unit, -unit]) + size / 2).tolist()
    radius = max(std * unit, 2.0)
    _draw_axes(image, font, centre.tolist(), half)
    for k in share.argsort().tolist():  # the heaviest is drawn last, above the others
        x, y = places[k]
        tint = BAR if tints is None else tuple((tints[k] * 255).round().int().tolist())
        layer = Image.new("RGBA", image.size)
        draw = ImageDraw.Draw(layer)
        solid = round(40 + 190 * float(share[k] / share.max().clamp(min=1e-12)))
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, (*tint, solid), (*INK, solid))
        image = Image.alpha_composite(image, layer)
    draw = ImageDraw.Draw(image)
    for k in share.argsort()[-NUMBERED:].tolist():
        x, y = places[k]
        side, anchor = (-1, "rm") if x + radius > 0.9 * size else (1, "lm")
        at = (x + side * (radius + 2), y)
        draw.text(at, str(k), INK, font, anchor, stroke_width=2, stroke_fill="white")
    x, y = ((mean - centre) * torch.tensor([unit, -unit]) + size / 2).tolist()
    draw.line((x - 6, y, x + 6, y), (20, 140, 130), 3)
    draw.line((x, y - 6, x, y + 6), (20, 140, 130), 3)
    return to_picture(image)


def weight_table(rows: Sequence[tuple[str, float, Tensor | None, str]], size: int) -> Tensor:
    """Draw a table with a bar for each weight; the longest is that of the largest.

    Args:
        rows: (name, weight in [0, 1], colour (3,) in [0, 1] of a swatch or None, remark).
        size: pixels a side.

    Returns:
        (size, size, 3) in [0, 1].
    """
    image = Image.new("RGB", (size, size), "white")
    draw, font = ImageDraw.Draw(image), _font(size)
    height = min(size / max(len(rows), 1), font.size * 2.2)
    name = max(font.getlength(row[0]) for row in rows) + 8
    remark = max(font.getlength(row[3]) for row in rows) + 8
    number = font.getlength("0.000") + 8
    swatch = height * 0.8 if any(row[2] is not None for row in rows) else 0
    longest = max(size - name - number - swatch - remark, size / 8)
    most = max(*(row[1] for row in rows), 1e-12)
    for i, (label, weight, colour, note) in enumerate(rows):
        y, x = (i + 0.5) * height, name + swatch
        draw.text((2, y), label, INK, font, anchor="lm")
        if colour is not None:
            tint = tuple((colour * 255).round().int().tolist())
            draw.rectangle((name, y - height * 0.35, name + swatch - 4, y + height * 0.35), tint)
        draw.rectangle((x, y - height * 0.25, x + longest * weight / most, y + height * 0.25), BAR)
        draw.text((x + longest + 4, y), f"{weight:.3f}", INK, font, anchor="lm")
        draw.text((x + longest + number, y), note, INK, font, anchor="lm")
    return to_picture(image)


def _reach(means: Tensor, mean: Tensor, std: float) -> float:
    """Return half the side of a square around the mean that holds all components."""
    return max(float((means - mean).abs().max()) + 1.5 * std, 1e-6)


def _draw_axes(image: Image.Image, font: ImageFont.FreeTypeFont, centre: list, half: float) -> None:
    """Draw a grid with numbers, on a chart of [centre - half, centre + half]^2."""
    draw, size = ImageDraw.Draw(image), image.width
    for i in range(1, TICKS):
        at, step = size * i / TICKS, half * (2 * i / TICKS - 1)
        draw.line((at, 0, at, size), GRID)
        draw.line((0, at, size, at), GRID)
        draw.text((at + 2, size - 2), _number(centre[0] + step), INK, font, anchor="lb")
        draw.text((2, at - 2), _number(centre[1] - step), INK, font, anchor="lb")
    draw.rectangle((0, 0, size - 1, size - 1), outline=GRID)


def _number(value: float) -> str:
    """Return a number at an axis; what rounding left of 0 is 0."""
    return f"{round(value, 4) + 0.0:.2g}"


def _font(size: float) -> ImageFont.FreeTypeFont:
    """Return a font that suits a chart of that many pixels."""
    return ImageFont.load_default(max(10.0, size / 18))
