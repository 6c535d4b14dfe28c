"""Messages on nodes in ComfyUI's page: whole, in both node designs, and no part of a workflow."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from .adapter_prompts import serve
from .client import Comfy
from .graphs import node
from .page import BRIGHTNESS, READY, ComfyPage
from .test_messages import guided

ROOT = "(window.app.rootGraph ?? window.app.graph)"
OPEN = f"""async (prompt) => {{
    await window.app.loadApiJson(prompt, 'messages');
    const graph = {ROOT}.serialize();
    graph.id = crypto.randomUUID();
    graph.nodes.find((each) => each.type === 'RandomNoise').widgets_values[1] = 'fixed';
    await window.app.loadGraphData(graph);
}}"""
LOOK = f"""() => {{
    const {{ pos }} = {ROOT}.nodes.find((each) => each.type === 'SamplerCustomAdvanced');
    const {{ ds }} = window.app.canvas;
    [ds.scale, ds.offset[0], ds.offset[1]] = [1, 500 - pos[0], 200 - pos[1]];
    window.app.canvas.setDirty(true, true);
}}"""
CORRECT = f"""() => {{
    {ROOT}.nodes.find((each) => each.type === 'FluxGuidance').widgets[0].value = 3.5;
}}"""
# of each node with messages: its type, their text, how much of it is hidden, names of its widgets
SIGNS = f"""() => {ROOT}.nodes.flatMap((node) => {{
    const {{ element }} = node.widgets?.find((each) => each.name === 'gmflow_messages') ?? {{}};
    const visible = element?.isConnected && element.checkVisibility() && element.clientHeight;
    if (!visible) return [];
    const hidden = element.firstChild.scrollHeight - element.clientHeight;
    return [[node.type, element.innerText, hidden, node.widgets.map((each) => each.name)]];
}})"""
# of text to the ground it stands on, of each message, as WCAG has it
CONTRASTS = f"""() => {{
    {BRIGHTNESS}
    const lines = [...document.querySelectorAll('[data-testid="gmflow_messages"] > div > div')];
    return lines.filter((each) => each.checkVisibility()).map((each) => {{
        const {{ color, backgroundColor }} = getComputedStyle(each);
        const [dark, bright] = [color, backgroundColor].map(brightness).sort((a, b) => a - b);
        return (bright + 0.05) / (dark + 0.05);
    }});
}}"""
READABLE = 4.5  # the least contrast


def numbered(prompt: dict[str, dict]) -> dict[str, dict]:
    """Return a prompt whose nodes have numbers, as in the page."""
    numbers = {name: str(number) for number, name in enumerate(prompt, 1)}
    return {
        numbers[name]: node(
            each["class_type"],
            **{
                key: [numbers[value[0]], value[1]] if isinstance(value, list) else value
                for key, value in each["inputs"].items()
            },
        )
        for name, each in prompt.items()
    }


def saved(page: ComfyPage) -> list[dict[str, Any]]:
    """Return the nodes as they would be saved."""
    graph = page.page.evaluate(f"() => {ROOT}.serialize()")
    # heights differ by that of the live preview, which ComfyUI saves
    return [
        {key: each[key] for key in each if key not in ("size", "order")} for each in graph["nodes"]
    ]


def run(page: ComfyPage) -> None:
    prompt_id = page.run(timeout=60)
    deadline = time.monotonic() + 240
    while not page.comfy.get(f"/history/{prompt_id}"):
        assert time.monotonic() < deadline
        page.page.wait_for_timeout(200)


def wait_for(page: ComfyPage, text: str) -> dict[str, tuple[str, int, list[str]]]:
    """Wait until a sampler node shows a text, and return the messages of all nodes by type."""
    page.page.evaluate(LOOK)  # what is outside of the picture may have no size
    found = f"(signs) => signs.some(([type, said]) => said.includes({json.dumps(text)}))"
    page.page.wait_for_function(f"() => ({found})(({SIGNS})())", timeout=60_000)
    return {kind: tuple(about) for kind, *about in page.page.evaluate(SIGNS)}


@pytest.fixture(scope="module")
def server(comfy: Comfy) -> Iterator[Comfy]:
    yield from serve(comfy)


@pytest.mark.parametrize("newer", [False, True], ids=["classic, dark", "Nodes 2.0, light"])
def test_messages_are_whole_and_stay(server: Comfy, page: ComfyPage, newer: bool) -> None:
    """On a stock node: three messages, a second run from the cache, a reload, a run without."""
    page.show(nodes_2=newer, light=newer)
    page.page.set_viewport_size({"width": 1600, "height": 1000})
    page.page.evaluate(OPEN, numbered(guided(7.0, seed=21 + newer)))
    before = saved(page)
    run(page)
    for _ in range(2):  # the second time, nothing is run again
        said = wait_for(page, "guidance 7 does not fit")
        text, hidden, widgets = said["SamplerCustomAdvanced"]
        assert "set guidance of 'FluxGuidance' to 3.5" in text
        assert "gm-policy: 4 steps" in text
        assert hidden <= 1  # a rounding
        contrasts = page.page.evaluate(CONTRASTS)
        assert contrasts
        assert min(contrasts) > READABLE
        assert "$$node-text-preview" not in widgets  # not shown twice
        assert saved(page) == before
        run(page)
    page.page.wait_for_timeout(1500)  # the page stores its workflow
    page.page.reload(wait_until="domcontentloaded")
    page.page.wait_for_function(READY, timeout=60_000)
    wait_for(page, "guidance 7 does not fit")
    page.page.evaluate(CORRECT)
    run(page)
    page.page.wait_for_function(
        f"() => !({SIGNS})().some(([type, said]) => said.includes('guidance'))",
        timeout=60_000,
    )
