"""Read a node's help in ComfyUI's page, in both languages."""

from __future__ import annotations

import pytest

from .client import Comfy
from .locale_files import names
from .page import ComfyPage, open_page

INFO_BUTTON = '[data-testid="info-button"]'  # above a selected node
ADD = """
(kind) => {
    const {app, LiteGraph} = window;
    app.graph.clear();
    const node = LiteGraph.createNode(kind);
    app.graph.add(node);
    node.pos = [300, 250];
    [app.canvas.ds.scale, app.canvas.ds.offset] = [1, [0, 0]];
    app.canvas.setDirty(true, true);
}
"""
TITLE = 120, -15  # of a node, from its position
PICTURES = """
() => {
    const shown = [...document.images].filter((each) => each.src.includes('/gmflow/docs/images/'));
    return shown.length > 0 && shown.every((each) => each.naturalWidth > 0);
}
"""


def read_help(page: ComfyPage, kind: str) -> None:
    """Add a node to an empty graph, click it, and press its info button."""
    page.page.evaluate(ADD, kind)
    box = page.page.locator("#graph-canvas").bounding_box()
    assert box is not None
    page.page.wait_for_timeout(500)  # the canvas draws it meanwhile
    page.page.mouse.click(box["x"] + 300 + TITLE[0], box["y"] + 250 + TITLE[1])
    page.page.locator(INFO_BUTTON).first.click(timeout=30_000)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_help_opens_in_the_language_of_the_page(comfy: Comfy, language: str) -> None:
    """Title, an input's name and the pictures appear."""
    comfy.post("/settings", {"Comfy.Locale": language})
    try:
        with open_page(comfy) as page:
            for kind in ("GMFlowSampler", "GMFlowGuider"):
                about = names(language)[kind]
                read_help(page, kind)
                heading = page.page.get_by_role("heading", name=about["display_name"], level=1)
                heading.first.wait_for(timeout=30_000)
                bold = page.page.locator("strong", has_text=about["inputs"]["negative"]["name"])
                bold.first.wait_for(timeout=30_000)
                page.page.wait_for_function(PICTURES, timeout=30_000)
    finally:
        comfy.post("/settings", {"Comfy.Locale": "en"})
