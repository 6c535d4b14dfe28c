"""Walk a newcomer's first hour in ComfyUI's page: search, open a template, run it, drop it back."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from .client import Comfy
from .page import ComfyPage, open_page
from .stand_in_files import WORKFLOWS, workflow_named, write_workflow_files

WORDS = (
    "few step",
    "4 steps",
    "turbo",
    "lightning",
    "distilled",
    "pi-flow",
    "piflow",
    "flux",
    "qwen",
    "int8",
    "quantize",
    "lora",
    "cfg",
    "guidance",
    "scheduler",
    "sampler",
    "gaussian",
    "checkerboard",
    "digits",
    "imagenet",
    "class",
)
BROWSE = "() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates')"
# types of the nodes in the graph, but for those in subgraphs
KINDS = "window.app.canvas.graph.nodes.map((node) => node.type).sort()"
VALUES = """() => window.app.canvas.graph.serialize().nodes
    .map((node) => [node.type, node.widgets_values ?? []]).sort()"""


@pytest.fixture(scope="module")
def page(comfy: Comfy) -> Iterator[ComfyPage]:
    for path in WORKFLOWS.glob("*.json"):
        write_workflow_files(comfy.base, path.stem)  # or the page would ask for them
    comfy.object_info()
    with open_page(comfy) as page:
        yield page


def open_template(page: ComfyPage, name: str) -> None:
    """Open a template from the page's own list, and wait until its nodes are there."""
    nodes = json.loads((WORKFLOWS / f"{name}.json").read_text("utf-8"))["nodes"]
    page.page.keyboard.press("Escape")  # the search for nodes may be open
    page.page.evaluate("() => window.app.canvas.graph.clear()")
    page.page.evaluate(BROWSE)
    dialog = page.page.locator("[role=dialog]")
    dialog.locator("input").first.fill(name[:28])  # it finds nothing for more than 32 characters
    dialog.get_by_text(name, exact=False).first.click()
    kinds = json.dumps(sorted(node["type"] for node in nodes))
    page.page.wait_for_function(f"() => JSON.stringify({KINDS}) === '{kinds}'".replace(", ", ","))


def test_search_finds_nodes_by_the_words_of_people(comfy: Comfy, page: ComfyPage) -> None:
    """Type each word into the page's own search: a node of this extension is among the results."""
    if "search_aliases" not in comfy.object_info()["GMFlowSampler"]:
        pytest.skip("this ComfyUI knows no words for its search but the names of nodes")
    missed = [word for word in WORDS if not any("GM " in name for name in page.search(word))]
    assert missed == []


def test_templates_open_from_the_dialog(page: ComfyPage) -> None:
    """No node is missing, and the page says nothing against it; test_page drops all files."""
    for name in ("Coloured digits", "FLUX.1 in 4 steps (8-bit)", "Compare samplers"):
        name = workflow_named(name)
        open_template(page, name)
        assert page.missing_nodes() == [], name
        assert page.notices() == [], name


def test_an_output_picture_brings_its_workflow_back(
    comfy: Comfy, page: ComfyPage, tmp_path: Path
) -> None:
    """Run a template, save its picture, drop it on another workflow."""
    open_template(page, workflow_named("Coloured digits"))
    kinds, values = page.page.evaluate(f"() => {KINDS}"), page.page.evaluate(VALUES)
    prompt_id = page.run()
    page.wait_for_images(timeout=240)
    (shown,) = comfy.result(prompt_id).outputs.values()
    picture = tmp_path / "picture.png"
    picture.write_bytes(comfy.read(f"/view?{urllib.parse.urlencode(shown['images'][0])}"))
    open_template(page, workflow_named("Autoguidance"))
    page.drop_workflow(picture)
    assert page.page.evaluate(f"() => {KINDS}") == kinds
    assert page.page.evaluate(VALUES) == values
