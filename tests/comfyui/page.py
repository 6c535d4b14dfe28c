"""Use ComfyUI's page in headless Chromium as a person does: drop a workflow, press Run, look."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from .client import Comfy, PromptError, Result, prompt_errors

try:
    from playwright.sync_api import BrowserContext, Page, Route, sync_playwright
    from playwright.sync_api import TimeoutError as PlaywrightTimeoutError
except ImportError:
    sync_playwright = None
    PlaywrightTimeoutError = TimeoutError

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = [
    "--no-sandbox",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # nothing but this machine
]
SIZE = {"width": 1280, "height": 800}
# changed while the page is open, and at their defaults in `ComfyPage.clear`
DESIGN, PALETTE = "Comfy.VueNodes.Enabled", "Comfy.ColorPalette"
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
CHOOSE = """async (chosen) => {
  const { setting } = window.app.extensionManager;
  for (const [name, value] of Object.entries(chosen)) {
    if (setting.get(name) !== value) await setting.set(name, value);
  }
}"""
CLEAR = """async () => {
  const { command, workflow } = window.app.extensionManager;
  await command.execute('Comfy.NewBlankWorkflow');
  for (const each of [...workflow.openWorkflows]) {
    if (each.path !== workflow.activeWorkflow.path) await workflow.closeWorkflow(each);
  }
}"""
BROWSE = "() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates')"
# types of the nodes in the graph, but for those in subgraphs
KINDS = "window.app.canvas.graph.nodes.map((node) => node.type).sort()"
BRIGHTNESS = """
const context = document.createElement('canvas').getContext('2d');
const brightness = (colour) => {
  context.clearRect(0, 0, 1, 1);
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  const linear = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3)
    .map((each) => (each / 255) ** 2.2);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
};
const named = (name) => brightness(getComputedStyle(document.body).getPropertyValue(name));
"""
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
        self.page.goto(f"{self.comfy.url}/system_stats")  # the page itself would open what was open
        self.page.evaluate("() => { localStorage.clear(); sessionStorage.clear() }")
        self.page.goto(self.comfy.url, wait_until="domcontentloaded")
        self.page.wait_for_function(READY, timeout=60_000)
        self.page.locator(RUN_BUTTON).first.wait_for(timeout=30_000)

    def clear(self) -> None:
        """Leave an empty graph, in the default size, design and colours, and nothing else open."""
        self.page.set_viewport_size(SIZE)
        for _ in range(2):  # a menu in a dialog, and the dialog
            self.page.keyboard.press("Escape")
        self.show(nodes_2=False, light=False)
        self.page.evaluate(CLEAR)

    def show(self, *, nodes_2: bool, light: bool) -> None:
        """Choose the node design and the colours."""
        chosen = {DESIGN: nodes_2, PALETTE: "light" if light else "dark"}
        self.page.evaluate(CHOOSE, chosen)

    def is_light(self) -> bool:
        """Return whether menus and nodes are brighter than their text."""
        return self.page.evaluate(
            f"() => {{ {BRIGHTNESS} return named('--comfy-menu-bg') > named('--fg-color') }}"
        )

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

    def open_template(self, path: Path, timeout: float = 30) -> None:
        """Choose a template in the page's own list of them, and wait until it is loaded."""
        self.page.evaluate(BROWSE)
        dialog = self.page.locator("[role=dialog]")
        dialog.locator("input").first.fill(path.stem[:28])  # it finds nothing for more than 32
        dialog.get_by_text(path.stem, exact=False).first.click()
        nodes = json.loads(path.read_text("utf-8"))["nodes"]
        kinds = json.dumps(sorted(node["type"] for node in nodes), separators=(",", ":"))
        self._wait(f"() => JSON.stringify({KINDS}) === {json.dumps(kinds)}", timeout, path.stem)

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
        deadline = time.monotonic() + timeout
        while not field.is_visible():  # a page that is busy takes a double click for two clicks
            box = self.page.locator("#graph-canvas").bounding_box()
            assert box is not None
            self.page.mouse.dblclick(box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.9)
            with suppress(PlaywrightTimeoutError):
                field.wait_for(timeout=1000 * min(5, timeout))
            if time.monotonic() > deadline:
                raise TimeoutError(f"no search in {timeout:g} s; the page shows {self.notices()}")
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
def open_browser() -> Iterator[BrowserContext]:
    """Start Chromium; skip the test without Playwright or a browser.

    Only this machine can be reached from it, and transitions take no time.
    """
    if sync_playwright is None:
        pytest.skip("no Playwright: pip install playwright")
    with sync_playwright() as playwright:
        path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
        path = path or playwright.chromium.executable_path
        if not Path(path).is_file():
            pytest.skip(
                "no Chromium: install it, run `playwright install chromium`, "
                "or set CHROMIUM to its executable"
            )
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        try:
            yield browser.new_context(viewport=SIZE, reduced_motion="reduce")
        finally:
            browser.close()


@contextmanager
def open_page(
    comfy: Comfy, browser: BrowserContext | None = None, answers: Mapping[str, Any] | None = None
) -> Iterator[ComfyPage]:
    """Open the page of a server in a tab of a browser, or in a new browser.

    Args:
        answers: JSON that the page gets from addresses of some patterns, in place of the server's.
    """
    if browser is None:
        with open_browser() as browser, open_page(comfy, browser, answers) as page:
            yield page
        return
    comfy.post("/settings", SETTINGS)
    tab = browser.new_page()
    for pattern, data in (answers or {}).items():
        tab.route(pattern, partial(Route.fulfill, json=data))
    try:
        page = ComfyPage(comfy, tab)
        page.load()
        yield page
    finally:
        tab.close()
