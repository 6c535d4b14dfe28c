"""Walk a newcomer's first hour in ComfyUI's page: search, open a template, run it, drop it back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .client import Comfy
from .page import ComfyPage, open_page

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


@pytest.fixture(scope="module")
def page(comfy: Comfy) -> Iterator[ComfyPage]:
    with open_page(comfy) as page:
        yield page


def test_search_finds_nodes_by_the_words_of_people(comfy: Comfy, page: ComfyPage) -> None:
    """Type each word into the page's own search: a node of this extension is among the results."""
    if "search_aliases" not in comfy.object_info()["GMFlowSampler"]:
        pytest.skip("this ComfyUI knows no words for its search but the names of nodes")
    missed = [word for word in WORDS if not any("GM " in name for name in page.search(word))]
    assert missed == []
