"""Sheets of pictures, charts, and how much pictures differ."""

import math

import pytest
import torch

from gmflow_core.charts import bar_chart, heat_map, histogram_chart, mixture_chart, weight_table
from gmflow_core.pictures import (
    colours,
    contact_sheet,
    layout_of,
    mean_pairwise_distance,
    stacked,
    to_picture,
)


def plain(value, height=4, width=4):
    return torch.full((height, width, 3), float(value))


def test_mean_pairwise_distance_of_plain_pictures():
    """Black, white and grey: distances 1, 0.5 and 0.5."""
    pictures = torch.stack([plain(0), plain(1), plain(0.5)])
    assert mean_pairwise_distance(pictures) == pytest.approx(2 / 3)
    assert mean_pairwise_distance(plain(0.3).expand(5, -1, -1, -1)) == 0
    half = torch.stack([plain(0), plain(0)])
    half[1, :2] = 1  # half of the pixels differ by 1
    assert mean_pairwise_distance(half) == pytest.approx(math.sqrt(0.5))
    with pytest.raises(ValueError, match="give two"):
        mean_pairwise_distance(half[:1])


@pytest.mark.parametrize("named", [False, True])
def test_pictures_lie_where_the_layout_says(named):
    """Without a reference picture, pictures keep their own shape."""
    wide = [[plain(i / 8 + j / 16, 10, 20) for j in range(3)] for i in range(2)]
    rows = [("row" if named else "", [("caption", p) for p in row]) for row in wide]
    sheet = to_picture(contact_sheet(rows, None, "two\nlines", 64))
    layout = layout_of(rows, False, "two\nlines", 64)
    assert (layout.tile, layout.height) == (64, 32)
    for i, row in enumerate(wide):
        for j, picture in enumerate(row):
            x, y = layout.place(i, j)
            drawn = sheet[y : y + 32, x : x + 64]
            assert torch.allclose(drawn, picture[:1, :1].expand(32, 64, 3), atol=1 / 255)


def test_a_heat_map_is_dark_where_low_and_bright_where_high():
    values = torch.tensor([[1.0, 2.0], [3.0, math.nan]])
    picture = heat_map(values, 1.0, 3.0, size=64)
    assert picture.shape == (64 + 4, 64, 3)
    for corner, level in (((0, 0), 0.0), ((0, 63), 0.5), ((63, 0), 1.0), ((63, 63), math.nan)):
        expected = colours(torch.tensor(level))
        assert torch.allclose(picture[corner], expected, atol=1 / 255)


def ink(picture, box):
    """Return the share of a box (left, top, right, bottom) that is not white."""
    left, top, right, bottom = box
    return (picture[top:bottom, left:right] < 0.99).any(-1).float().mean()


def test_bars_are_as_high_as_their_values():
    picture = bar_chart([1.0, 0.5, 0.0], ["a", "b", "c"], (240, 240))
    purple = (picture - torch.tensor([125, 30, 125]) / 255).abs().sum(-1) < 0.02
    heights = [int(purple[:, x].sum()) for x in range(240)]
    tall, short = max(heights), sorted({h for h in heights if h})[0]
    assert short / tall == pytest.approx(0.5, abs=0.02)


def test_the_histogram_counts_shares():
    values = torch.tensor([0.05] * 3 + [0.95])
    both = (
        histogram_chart(values, 10, (300, 200)),
        bar_chart([0.75, *[0.0] * 8, 0.25], [f"{i / 10:.2g}" for i in range(10)], (300, 200)),
    )
    assert torch.equal(*both)


def test_components_are_drawn_at_their_means():
    means = torch.tensor([[-2.0, 2.0], [2.0, -2.0]])
    picture = mixture_chart(means, [0.5, 0.5], std=0.3, size=200, bounds=4.0)
    assert ink(picture, (46, 46, 54, 54)) == 1  # a quarter from the left and from the top
    assert ink(picture, (146, 146, 154, 154)) == 1
    assert ink(picture, (130, 60, 145, 90)) == 0


def test_a_table_of_weights_has_a_bar_for_each():
    rows = [("0", 0.75, torch.tensor([1.0, 0.0, 0.0]), "+1.00"), ("1", 0.25, None, "-1.00")]
    picture = weight_table(rows, 200)
    assert picture.shape == (200, 200, 3)
    assert ((picture - torch.tensor([1.0, 0.0, 0.0])).abs().sum(-1) < 0.02).any()  # the swatch


def test_stacked_pictures_keep_their_own_width():
    together = stacked([plain(0, 2, 3), plain(0.5, 1, 5)])
    assert together.shape == (3, 5, 3)
    assert (together[:2, :3] == 0).all()
    assert (together[:2, 3:] == 1).all()
    assert (together[2] == 0.5).all()
