"""Read a node's help in ComfyUI's page, in both languages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from .client import Comfy
from .locale_files import names
from .page import ComfyPage, open_page

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

INFO_BUTTON = '[data-testid="info-button"]'  # above a selected node
ADD = """
([kind, at]) => {
    const {app, LiteGraph} = window;
    app.graph.clear();
    const node = LiteGraph.createNode(kind);
    app.graph.add(node);
    node.pos = at;
    [app.canvas.ds.scale, app.canvas.ds.offset] = [1, [0, 0]];
    app.canvas.setDirty(true, true);
}
"""
AT, TITLE = (300, 250), (120, -15)  # of the node, and of its title from there
PICTURES = """
() => {
    const shown = [...document.images].filter((each) => each.src.includes('/gmflow/docs/images/'));
    return shown.length > 0 && shown.every((each) => each.naturalWidth > 0);
}
"""


def read_help(page: ComfyPage, kind: str) -> None:
    """Add a node to an empty graph, click it, and press its info button."""
    page.page.evaluate(ADD, [kind, AT])
    box = page.page.locator("#graph-canvas").bounding_box()
    assert box is not None
    button = page.page.locator(INFO_BUTTON).first
    for _ in range(20):  # a page that is still starting up ignores a click
        page.page.mouse.click(box["x"] + AT[0] + TITLE[0], box["y"] + AT[1] + TITLE[1])
        page.page.wait_for_timeout(1500)
        if button.is_visible():
            break
    button.click(timeout=30_000)


@pytest.fixture(params=["en", "zh"])
def page_in(
    request: pytest.FixtureRequest, comfy: Comfy, browser: BrowserContext
) -> Iterator[tuple[ComfyPage, str]]:
    """The page in a language, and that language."""
    if request.param == "en":
        yield request.getfixturevalue("page"), "en"
        return
    comfy.post("/settings", {"Comfy.Locale": request.param})
    try:
        with open_page(comfy, browser) as page:
            yield page, request.param
    finally:
        comfy.post("/settings", {"Comfy.Locale": "en"})


def test_help_opens_in_the_language_of_the_page(page_in: tuple[ComfyPage, str]) -> None:
    """Title, an input's name and the pictures appear."""
    page, language = page_in
    for kind in ("GMFlowSampler", "GMFlowGuider"):
        about = names(language)[kind]
        read_help(page, kind)
        heading = page.page.get_by_role("heading", name=about["display_name"], level=1)
        heading.first.wait_for(timeout=30_000)
        bold = page.page.locator("strong", has_text=about["inputs"]["negative"]["name"])
        bold.first.wait_for(timeout=30_000)
        page.page.wait_for_function(PICTURES, timeout=30_000)
