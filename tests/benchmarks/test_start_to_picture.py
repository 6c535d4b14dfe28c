"""Whole prompts of ComfyUI, timed: what the probe's notes add up to, and the products counted."""

from __future__ import annotations

import re
from math import prod

import pytest

from tests.benchmarks.start_to_picture import summary, times_of
from tests.benchmarks.start_to_picture_parts import products
from tests.comfyui.bases import flux_shapes


def test_times_of_a_prompt() -> None:
    """Two network calls of 3 s, the last layer half a second of each, in a node of 8 s."""
    events = [("node", "base", 0), ("node", "model", 1), ("node", "sample", 1.5)]
    for begin in (2, 6):
        events += [("network begins", "", begin), ("last layer begins", "", begin + 2.5)]
        events += [("network ends", "", begin + 3)]
    events += [("node", "decode", 9.5), ("node", "", 10)]
    row = times_of([(what, name, 100 + 2 * at, at) for what, name, at in events])
    assert row == {
        "seconds": 20,
        "processor_seconds": 10,
        "load_seconds": 1.5,
        "sampling_seconds": 8,
        "outside_ms": 2000,
        "outside_percent": 25,
        "last_layer_ms": 1000,
        "last_and_outside_percent": 37.5,
    }


def test_ratios_are_of_the_same_turn() -> None:
    """The machine is slower in the second turn: the ratio stays."""
    names = ("seconds", "processor_seconds", "peak_gb")
    stock, ours = ([dict.fromkeys(names, size * k) for k in (1, 10, 2)] for size in (2.0, 3.0))
    row = summary(ours, stock)
    assert (row["seconds"], row["to_stock"], row["peak_to_stock"]) == (6, 1.5, 1.5)


def test_products_are_those_of_the_layout() -> None:
    """One image token and no attention to speak of: two operations for each weight in blocks."""
    width, double, single = 3072, 2, 3
    weights = sum(
        prod(shape)
        for name, shape in flux_shapes(width, double, single).items()
        if re.search(r"\.(img_attn|img_mlp|linear)", name) and len(shape) == 2
        if not name.startswith("final")
    )
    attention = 4 * width * (double + single)
    assert products(width, double, single, 1, 0) == pytest.approx(2 * weights + attention)
