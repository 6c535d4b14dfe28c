"""Check the workflows as the page shows them: names, pictures, layout in both designs, notes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from .client import Comfy
from .layout import layout_faults, load
from .page import ComfyPage, open_page
from .stand_in_files import LOADERS, WORKFLOWS, workflow_named, workflow_prompt

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

PATHS = sorted(WORKFLOWS.glob("*.json"))
STEMS = [path.stem for path in PATHS]
NAME = re.compile(r"GMFlow (\d\d) - [A-Z][\w.,() -]+[\w)]")  # safe in Windows and, quoted, in URLs
NOTES = ("MarkdownNote", "Note")
SHIPPED = ("GMFlowLoader", "GMFlowSourceLoader")  # loaders of what comes along or is fetched
TITLE, PADDING = 30, 10  # of nodes, and around all of them when the page fits them
TALLEST = 763  # GM Sampler in classic nodes with three messages and its preview, as measured
SCROLLS = """() => [...document.querySelectorAll('.lg-node[data-node-id]')].filter((node) =>
  [...node.querySelectorAll('.comfy-markdown-content, .ProseMirror')].some((text) =>
    text.checkVisibility() && text.scrollHeight > text.parentElement.clientHeight + 8)).length"""
PROMPT = "async () => (await window.app.graphToPrompt()).output"
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def opened(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_names_sort_as_they_are_numbered() -> None:
    """Titles of a first visit in their order; what needs no download comes first."""
    matches = [NAME.fullmatch(path.stem) for path in PATHS]
    assert all(matches)
    numbers = [int(match[1]) for match in matches]
    assert numbers == sorted(set(numbers))
    free = ["no download" in path.stem for path in PATHS]
    assert free == sorted(free, reverse=True)


@each_path
def test_template_is_listed_with_its_thumbnail(comfy: Comfy, path: Path) -> None:
    assert path.stem in comfy.get("/api/workflow_templates")["gmflow"]
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.size == (400, 400)
    assert (WORKFLOWS / "api" / path.name).is_file()


@each_path
def test_files_say_where_nodes_and_models_come_from(path: Path) -> None:
    """Each node names its pack; each file that is named has a link of the same folder."""
    for node in opened(path)["nodes"]:
        kind, about = node["type"], node["properties"]
        if kind in NOTES:
            continue
        pack = {"UnetLoaderGGUF": "comfyui-gguf"}.get(kind, "comfy-core")
        assert about["cnr_id"] == ("gmflow" if kind.startswith("GMFlow") else pack), kind
        named = [value for value in node.get("widgets_values", []) if is_model(value)]
        links = about.get("models", [])
        assert [link["name"] for link in links] == ([] if kind in SHIPPED else named), kind
        folders = {folder for folder, _ in LOADERS.get(kind, {}).values()}
        assert {link["directory"] for link in links} <= folders


@each_path
def test_values_are_the_same_by_place_and_by_name(path: Path) -> None:
    """ComfyUI's page saves a node's values twice, and may read either."""
    for node in opened(path)["nodes"]:
        if "widgets_values_named" in node:
            assert list(node["widgets_values_named"].values()) == node["widgets_values"]


def is_model(value: Any) -> bool:
    return isinstance(value, str) and value.endswith((".safetensors", ".gguf"))


@each_path
def test_notes_read_well_in_both_designs(path: Path) -> None:
    """There is one note, without inline code, which Nodes 2.0 shows as blue on blue."""
    (note,) = [node for node in opened(path)["nodes"] if node["type"] in NOTES]
    assert "`" not in note["widgets_values"][0]
    assert note["pos"] == min((node["pos"] for node in opened(path)["nodes"]), key=sum)


def test_the_first_template_opens_with_its_text() -> None:
    """Classic nodes below a zoom of 60 % show no text; the page leaves a quarter of it empty."""
    nodes = opened(PATHS[0])["nodes"]
    starts = [(node["pos"][0], node["pos"][1] - TITLE) for node in nodes]
    ends = [(node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1]) for node in nodes]
    sides = [
        max(end[axis] for end in ends) - min(start[axis] for start in starts) + 2 * PADDING
        for axis in (0, 1)
    ]
    for window in ((1920, 1080), (1600, 1000)):
        zoom = min(0.75 * pixels / side for pixels, side in zip(window, sides, strict=True))
        assert zoom > 0.62, window


def test_the_first_template_has_room_for_messages() -> None:
    """GM Sampler with a wrong denoise and no guidance: three messages, and its preview."""
    workflow = opened(PATHS[0])
    (sampler,) = [node for node in workflow["nodes"] if node["type"] == "GMFlowSampler"]
    (group,) = [group for group in workflow["groups"] if "GM Sampler" in group["title"]]
    bottom = group["bounding"][1] + group["bounding"][3]
    assert sampler["pos"][1] + TALLEST < bottom


@pytest.fixture(scope="module")
def own_page(comfy: Comfy, browser: BrowserContext, workflow_files: None) -> Iterator[ComfyPage]:
    """A page that lists no templates of ComfyUI, with which the dialog takes twice as long."""
    with open_page(comfy, browser, {"**/templates/index*.json": []}) as page:
        yield page


@pytest.mark.parametrize(
    ("nodes_2", "light"), [(False, False), (True, True)], ids=["classic, dark", "Nodes 2.0, light"]
)
def test_templates_open_from_the_dialog(
    comfy: Comfy, own_page: ComfyPage, nodes_2: bool, light: bool
) -> None:
    """Each opens without a missing node or a complaint, as workflows/api has it, and lies well.

    That is: no node over another, no link behind a node, groups around whole nodes, whole notes.
    The first and the last are opened from the dialog; another test finds all of them in it.
    """
    page = own_page
    page.clear()
    page.show(nodes_2=nodes_2, light=light)
    assert page.is_light() == light
    for path in PATHS:
        if "GGUF" in path.stem and not comfy.object_info("UnetLoaderGGUF"):
            continue
        if path in (PATHS[0], PATHS[-1]) and not nodes_2:
            page.open_template(path)
        else:
            load(page, opened(path))
        assert page.missing_nodes() == [], path.stem
        assert page.notices() == [], path.stem
        prompt = page.page.evaluate(PROMPT)
        for node, about in workflow_prompt(path.stem).items():
            assert prompt[node]["class_type"] == about["class_type"], path.stem
            assert prompt[node]["inputs"] == about["inputs"], path.stem
        workflow, found = opened(path), layout_faults(page)
        assert found["faults"] == [], path.stem
        assert found["links"] >= len(workflow["links"])
        assert found["drawn"] == (len(workflow["nodes"]) if nodes_2 else 0)
        assert not (nodes_2 and page.page.evaluate(SCROLLS)), path.stem


def test_layout_faults_are_found(page: ComfyPage) -> None:
    """Check the check: push a node over its neighbour, and out of its group."""
    workflow = opened(WORKFLOWS / f"{workflow_named('Coloured digits')}.json")
    nodes = {node["type"]: node for node in workflow["nodes"]}
    nodes["GMFlowPixels"]["pos"] = list(nodes["GMFlowSampler"]["pos"])
    nodes["GMFlowClassLabels"]["pos"][1] += 40
    workflow["extra"].pop("reroutes")
    workflow["extra"].pop("linkExtensions")
    load(page, workflow)
    faults = "\n".join(layout_faults(page)["faults"])
    assert "GM Sampler: 1 step and GM Pixels overlap" in faults
    assert "Ten classes, ten images of each is only partly in the group" in faults
    assert "runs behind Ten classes" in faults


def test_templates_are_listed_in_their_order(page: ComfyPage) -> None:
    """Ours, whatever order the file system has."""
    answer = "api/workflow_templates"
    page.page.route(f"**/{answer}", lambda route: route.fulfill(json={"gmflow": STEMS[::-1]}))
    try:
        listed = page.page.evaluate("() => window.app.api.getWorkflowTemplates()")
    finally:
        page.page.unroute(f"**/{answer}")
    assert listed == {"gmflow": STEMS}
