"""Use ComfyUI's page in headless Chromium as a person does: drop a workflow, press Run, look."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from .client import Comfy, PromptError, Result, prompt_errors

try:
    from playwright.sync_api import Page, Route, sync_playwright
except ImportError:
    sync_playwright = None

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = [
    "--no-sandbox",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
]
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # no templates at the first visit
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.Workflow.ShowMissingNodesWarning": True,
    "Comfy.Workflow.ShowMissingModelsWarning": False,  # the default workflow's model is missing
    "Comfy.Minimap.Visible": False,  # it covers nodes
}
# true as soon as the default workflow is loaded
READY = "window.app?.vueAppReady && window.app.canvas?.graph?.nodes.length > 0"
# the first selector fits pages since 2026, the second fits older ones
RUN_BUTTON = 'button[data-testid="queue-button"], [data-testid="queue-button"] button'
SEARCH_FIELD = 'input[role="combobox"][aria-controls="results-list"]'
SEARCH_RESULTS = '[data-testid="result-item"]'
NOTICES = """
const kinds = '[role="dialog"], [role="alert"], [data-testid="error-overlay"]';
const places = [...document.querySelectorAll(kinds)].filter((place) => place.checkVisibility());
const notices = places.map((place) => place.innerText.trim());
"""
NODES = """
const root = window.app.canvas.graph.rootGraph ?? window.app.canvas.graph;
const nodes = [root, ...(root.subgraphs?.values() ?? [])].flatMap((graph) => graph.nodes);
"""
PICTURES = """
const pictures = [...nodes.flatMap((node) => node.imgs ?? []), ...document.images];
const nameOf = (picture) => new URL(picture.src).searchParams.get('filename');
const shows = (name) => pictures.some((each) => each.naturalWidth > 0 && nameOf(each) === name);
"""


class ComfyPage:
    """An open page of a server. ``page`` is the Playwright page, for all other operations."""

    def __init__(self, comfy: Comfy, page: Page):
        self.comfy, self.page = comfy, page
        self._prompt_id = ""

    def load(self) -> None:
        """Load the page, or load it anew, with the default workflow."""
        if self.page.url.startswith(self.comfy.url):  # it keeps what was open
            self.page.evaluate("() => { localStorage.clear(); sessionStorage.clear() }")
        self.page.goto(self.comfy.url, wait_until="domcontentloaded")
        self.page.wait_for_function(READY, timeout=60_000)
        self.page.locator(RUN_BUTTON).first.wait_for(timeout=30_000)

    def drop_workflow(self, path: Path, timeout: float = 30) -> None:
        """Drag a workflow file from the desktop onto the graph and wait until it is loaded."""
        self.page.evaluate(f"() => {{ {NODES} for (const node of nodes) node.beforeDrop = true }}")
        box = self.page.locator("#graph-canvas").bounding_box()
        assert box is not None
        data = {"items": [], "files": [str(Path(path).resolve())], "dragOperationsMask": 1}
        where = {"x": box["x"] + box["width"] / 4, "y": box["y"] + box["height"] * 0.9}
        chrome = self.page.context.new_cdp_session(self.page)
        loaded = (
            f"() => {{ {NODES} return nodes.length && !nodes.some((node) => node.beforeDrop) }}"
        )
        deadline = time.monotonic() + timeout
        while True:  # a page that is still starting up ignores a drop
            for kind in ("dragEnter", "dragOver", "drop"):
                chrome.send("Input.dispatchDragEvent", {"type": kind, **where, "data": data})
            try:
                return self._wait(loaded, min(8, timeout), "workflow")
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise

    def node_types(self) -> list[str]:
        """Return the types of the nodes in the graph and its subgraphs."""
        return self.page.evaluate(f"() => {{ {NODES} return nodes.map((node) => node.type) }}")

    def missing_nodes(self) -> list[str]:
        """Return the node types of the graph that this ComfyUI does not know."""
        known = "Object.keys(window.LiteGraph.registered_node_types)"
        return sorted(set(self.node_types()) - set(self.page.evaluate(known)))

    def notices(self) -> list[str]:
        """Return the texts of the dialogs, alerts and toasts that are open."""
        return self.page.evaluate(f"() => {{ {NOTICES} return notices.filter(Boolean) }}")

    def wait_for_notice(self, text: str, timeout: float = 10) -> None:
        """Wait until a dialog, alert or toast contains ``text``."""
        found = f"notices.some((notice) => notice.includes({json.dumps(text)}))"
        self._wait(f"() => {{ {NOTICES} return {found} }}", timeout, text)

    def search(self, words: str, timeout: float = 60) -> list[str]:
        """Return what the search for nodes lists for some words, best first."""
        field = self.page.locator(SEARCH_FIELD)
        if not field.count():
            box = self.page.locator("#graph-canvas").bounding_box()
            assert box is not None
            self.page.mouse.dblclick(box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.9)
            field.wait_for(timeout=1000 * timeout)
        field.fill(words)
        self.page.wait_for_timeout(300)  # the page waits for the end of the typing
        self.page.locator(SEARCH_RESULTS).first.wait_for(timeout=1000 * timeout)
        return self.page.locator(SEARCH_RESULTS).all_inner_texts()

    def run(self, timeout: float = 30) -> str:
        """Press Run and return the prompt's id.

        Raises:
            PromptError: the server rejects the prompt.
        """
        with self.page.expect_response(
            lambda answer: answer.request.method == "POST" and answer.url.endswith("/prompt"),
            timeout=1000 * timeout,
        ) as info:
            self.page.locator(RUN_BUTTON).first.click(timeout=1000 * timeout)
        answer = info.value.json()
        if not info.value.ok or answer.get("node_errors"):
            raise PromptError(Result("", "rejected", errors=prompt_errors(answer)))
        self._prompt_id = answer["prompt_id"]
        return self._prompt_id

    def wait_for_images(self, timeout: float = 120) -> list[Image.Image]:
        """Return the pictures of the last Run's prompt, once its nodes show them on the page.

        Raises:
            PromptError: a node failed.
            TimeoutError: the prompt has not ended, or its pictures do not appear.
        """
        deadline = time.monotonic() + timeout
        while not self.comfy.get(f"/history/{self._prompt_id}"):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"the prompt did not end in {timeout:g} s; the page shows {self.notices()}"
                )
            self.page.wait_for_timeout(200)
        result = self.comfy.result(self._prompt_id)
        if result.errors:
            raise PromptError(result)
        names = [
            image["filename"]
            for output in result.outputs.values()
            for image in output.get("images", [])
        ]
        assert names, "the prompt made no picture"
        shown = f"() => {{ {NODES} {PICTURES} return {json.dumps(names)}.every(shows) }}"
        self._wait(shown, max(deadline - time.monotonic(), 5), "picture")
        self.page.wait_for_timeout(500)  # the canvas draws them meanwhile
        return [image for images in result.images.values() for image in images]

    def screenshot(self, path: Path) -> None:
        """Save a picture of the page."""
        self.page.screenshot(path=path)

    def templates(self) -> dict[str, Any]:
        """Return the example workflows of the extensions, by extension."""
        return self.comfy.get("/api/workflow_templates")

    def _wait(self, expression: str, timeout: float, what: str) -> None:
        try:
            self.page.wait_for_function(expression, timeout=1000 * timeout)
        except Exception as error:
            raise TimeoutError(
                f"no {what} in the page after {timeout:g} s; it shows {self.notices()}"
            ) from error


@contextmanager
def open_page(comfy: Comfy) -> Iterator[ComfyPage]:
    """Open the page of a server in a new browser; skip the test without Playwright or a browser."""
    browser_path = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, BROWSERS)), None
    )
    if sync_playwright is None:
        pytest.skip("no Playwright: pip install playwright")
    if browser_path is None:
        with sync_playwright() as playwright:
            browser_path = playwright.chromium.executable_path
        if not Path(browser_path).is_file():
            pytest.skip(
                "no Chromium: install it, run `playwright install chromium`, "
                "or set CHROMIUM to its executable"
            )
    comfy.post("/settings", SETTINGS)

    def only_local(route: Route) -> None:
        if route.request.url.startswith(comfy.url):
            route.continue_()
        else:
            route.abort()

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=OPTIONS)
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.route("**/*", only_local)
            opened = ComfyPage(comfy, page)
            opened.load()
            yield opened
        finally:
            browser.close()
