"""Click on a map of GM Mixture Inspector in ComfyUI's page, in both node designs."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from .page import ComfyPage
from .test_page_messages import numbered
from .test_views import digits, inspector

NODE = "window.app.graph.nodes.find((node) => node.type === 'GMFlowInspector')"
OPEN = f"""async (prompt) => {{
    await window.app.loadApiJson(prompt, 'inspector');
    const node = {NODE};
    node.setSize([1460, 2200]);
    const {{ ds }} = window.app.canvas;
    [ds.scale, ds.offset[0], ds.offset[1]] = [1, 80 - node.pos[0], 90 - node.pos[1]];
    window.app.canvas.setDirty(true, true);
}}"""
CHOSEN = f"""() => {{
    const valueOf = (name) => {NODE}.widgets.find((widget) => widget.name === name).value;
    return [valueOf('place'), Math.floor(valueOf('x')), Math.floor(valueOf('y'))];
}}"""
MARK = 0.3, 0.95, 0.9  # colour of the frame around the chosen pixel
SIDE, APART = 40, 340  # of a pixel of the digits on the sheet, and of the maps from each other


def middle_of_mark(page: ComfyPage) -> tuple[float, float, float]:
    """Return the middle of the leftmost frame in the page, and the scale of the picture."""
    shot = np.asarray(Image.open(io.BytesIO(page.page.screenshot())).convert("RGB")) / 255
    ys, xs = np.nonzero((np.abs(shot - MARK) < 0.06).all(-1))
    assert len(xs), "there is no frame"
    ends = np.nonzero(np.diff(np.unique(xs)) > 60)[0]  # between the frames of two maps
    columns = np.split(np.unique(xs), ends + 1)
    middles = [(column[0] + column[-1]) / 2 for column in columns]
    assert len(middles) == 3
    return middles[0], (ys.min() + ys.max()) / 2, (middles[1] - middles[0]) / APART


def chosen(page: ComfyPage) -> list[Any]:
    """Return what the node's widgets say, the column and the row as whole numbers."""
    page.page.wait_for_timeout(300)
    return page.page.evaluate(CHOSEN)


@pytest.mark.parametrize("newer", [False, True], ids=["classic", "Nodes 2.0"])
def test_a_click_chooses_the_pixel_under_it(page: ComfyPage, newer: bool) -> None:
    """The frame is at x 2, y 5: a click 4 pixels right of and above it means x 6, y 1."""
    page.show(nodes_2=newer, light=False)
    page.page.set_viewport_size({"width": 1700, "height": 2400})
    page.page.evaluate(OPEN, numbered(digits("GMFlowInspector", **inspector())))
    page.run(timeout=60)
    page.wait_for_images(timeout=240)
    page.page.wait_for_timeout(1000)
    x, y, scale = middle_of_mark(page)
    assert scale > 0.9  # messages leave the room to the picture
    there = x + 4 * SIDE * scale, y - 4 * SIDE * scale
    assert chosen(page) == ["x, y", 2, 5]
    page.page.mouse.click(*there)
    assert chosen(page) == ["x, y", 6, 1]
    page.page.mouse.move(x, y)  # a drag moves the node, or the view, and chooses nothing
    page.page.mouse.down()
    page.page.mouse.move(x + 20, y + 20, steps=4)
    page.page.mouse.up()
    assert chosen(page) == ["x, y", 6, 1]
