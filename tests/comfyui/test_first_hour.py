"""Walk a newcomer's first hour in ComfyUI's page: search, open a template, run it, drop it back."""

from __future__ import annotations

import urllib.parse
from pathlib import Path

import pytest

from .client import Comfy
from .page import KINDS, ComfyPage
from .stand_in_files import WORKFLOWS, workflow_named

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
VALUES = """() => window.app.canvas.graph.serialize().nodes
    .map((node) => [node.type, node.widgets_values ?? []]).sort()"""


def test_search_finds_nodes_by_the_words_of_people(comfy: Comfy, page: ComfyPage) -> None:
    """Type each word into the page's own search: a node of this extension is among the results."""
    if "search_aliases" not in comfy.object_info("GMFlowSampler")["GMFlowSampler"]:
        pytest.skip("this ComfyUI knows no words for its search but the names of nodes")
    missed = [word for word in WORDS if not any("GM " in name for name in page.search(word))]
    assert missed == []


def test_an_output_picture_brings_its_workflow_back(
    comfy: Comfy, page: ComfyPage, tmp_path: Path
) -> None:
    """Run a template, save its picture, drop it on another workflow."""
    page.open_template(WORKFLOWS / f"{workflow_named('Coloured digits')}.json")
    kinds, values = page.page.evaluate(f"() => {KINDS}"), page.page.evaluate(VALUES)
    prompt_id = page.run()
    page.wait_for_images(timeout=240)
    (shown,) = comfy.result(prompt_id).outputs.values()
    picture = tmp_path / "picture.png"
    picture.write_bytes(comfy.read(f"/view?{urllib.parse.urlencode(shown['images'][0])}"))
    page.open_template(WORKFLOWS / f"{workflow_named('Autoguidance')}.json")
    page.drop_workflow(picture)
    assert page.page.evaluate(f"() => {KINDS}") == kinds
    assert page.page.evaluate(VALUES) == values
