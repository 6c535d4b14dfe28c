"""Use the blueprints as the page offers them: found by its search, placed as one node, run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest

try:
    from playwright.sync_api import TimeoutError as PlaywrightTimeoutError
except ImportError:
    PlaywrightTimeoutError = TimeoutError

from .client import Comfy
from .installation import REPOSITORY
from .page import SEARCH_RESULTS, ComfyPage
from .stand_in_files import write_stand_ins

BLUEPRINTS = sorted((REPOSITORY / "subgraphs").glob("*.json"))
SMALL = {"width": 256, "height": 256}
PLACED = "() => window.app.canvas.graph.nodes.filter((node) => node.isSubgraphNode?.()).length"
# Links the sockets {name: source} of the node that was placed, and shows its picture. A source is a
# kind of node, its widgets, and the sources of its own sockets.
LINK = """(sockets) => {
  const graph = window.app.canvas.graph;
  const make = ([kind, widgets, inner]) => {
    const node = LiteGraph.createNode(kind);
    graph.add(node);
    for (const [name, value] of Object.entries(widgets)) {
      node.widgets.find((widget) => widget.name == name).value = value;
    }
    return feed(node, inner);
  };
  const feed = (node, sources) => {
    for (const [name, source] of Object.entries(sources)) {
      make(source).connect(0, node, node.inputs.findIndex((input) => input.name == name));
    }
    return node;
  };
  const [placed] = graph.nodes.filter((node) => node.isSubgraphNode?.());
  feed(placed, sockets).connect(0, make(['PreviewImage', {}, {}]), 0);
}"""
FLUX = {
    "UNETLoader": {"unet_name": "flux1-dev.safetensors"},
    "VAELoader": {"vae_name": "ae.safetensors"},
    "DualCLIPLoader": {
        "clip_name1": "clip_l.safetensors",
        "clip_name2": "t5xxl_fp8_e4m3fn_scaled.safetensors",
        "type": "flux",
    },
}
CLIP = ("DualCLIPLoader", FLUX["DualCLIPLoader"], {})
SOURCES = {  # what a blueprint's open socket is fed with, by its type
    "MODEL": ("UNETLoader", FLUX["UNETLoader"], {}),
    "VAE": ("VAELoader", FLUX["VAELoader"], {}),
    "CONDITIONING": ("CLIPTextEncode", {"text": "a cat"}, {"clip": CLIP}),
}
PROMPT = "async () => (await window.app.graphToPrompt()).output"
each_path = pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)


def graph_of(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a blueprint's node, as it is placed, and the graph behind it."""
    blueprint = json.loads(path.read_text(encoding="utf-8"))
    return blueprint["nodes"][0], blueprint["definitions"]["subgraphs"][0]


def sockets(node: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the inputs of a node that have no widget."""
    return [each for each in node["inputs"] if "widget" not in each]


def prompt_of(path: Path) -> dict[str, Any]:
    """Return the inner nodes with their files, as far as stand-ins need them."""
    _, graph = graph_of(path)
    prompt = {}
    for node in graph["nodes"]:
        names = [each["name"] for each in node.get("inputs", []) if "widget" in each]
        values = dict(zip(names, node.get("widgets_values", []), strict=False))
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": values}
    return prompt


@pytest.fixture(scope="module", autouse=True)
def files(comfy: Comfy) -> None:
    try:
        comfy.get("/api/global_subgraphs")
    except HTTPError as error:
        if error.code != 404:
            raise
        pytest.skip("this version of ComfyUI offers no blueprints")
    for path in BLUEPRINTS:
        write_stand_ins(comfy.base, prompt_of(path))
    loaders = {kind: {"class_type": kind, "inputs": values} for kind, values in FLUX.items()}
    write_stand_ins(comfy.base, loaders)
    comfy.object_info()


def search_for(page: ComfyPage, name: str, timeout: float = 60) -> None:
    """Search for a blueprint until it is the first result: the page loads them after its start.

    The page's search finds nothing for more than 32 characters.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            found = page.search(name[:28], timeout=5)
        except PlaywrightTimeoutError:
            found = []
        if found and name in found[0]:
            return
        assert time.monotonic() < deadline, found
        page.page.keyboard.press("Escape")
        page.page.wait_for_timeout(1000)


def test_there_are_blueprints() -> None:
    assert len(BLUEPRINTS) >= 3


@each_path
def test_blueprint_is_listed(comfy: Comfy, path: Path) -> None:
    listed = comfy.get("/api/global_subgraphs").values()
    assert path.stem in [each["name"] for each in listed if each["source"] == "custom_node"]
    node, graph = graph_of(path)
    assert (graph["name"], node["title"], node["type"]) == (path.stem, path.stem, graph["id"])
    assert all(each["properties"].get("cnr_id") for each in graph["nodes"])


@each_path
def test_blueprint_is_found_placed_and_run(comfy: Comfy, page: ComfyPage, path: Path) -> None:
    """Search for its name, take the first result, link it, run it in small."""
    search_for(page, path.stem)
    page.page.locator(SEARCH_RESULTS).first.click()
    page.page.mouse.click(300, 300)  # the node hangs on the pointer until a click
    page.page.wait_for_function(PLACED)
    node, _ = graph_of(path)
    page.page.evaluate(LINK, {each["name"]: SOURCES[each["type"]] for each in sockets(node)})
    prompt = page.page.evaluate(PROMPT)
    for about in prompt.values():
        known = SMALL.keys() & about["inputs"].keys()
        about["inputs"] |= {name: SMALL[name] for name in known}
    (pictures,) = comfy.run(prompt).images.values()
    assert np.asarray(pictures[0]).std() > 1
