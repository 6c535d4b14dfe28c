"""What nodes say: kept with their results, and with advice that names nodes of the prompt."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest

from .adapter_prompts import custom, graph, serve, stock
from .client import Comfy
from .graphs import node


@pytest.fixture(scope="module")
def server(comfy: Comfy) -> Iterator[Comfy]:
    yield from serve(comfy)


def asked(comfy: Comfy, **query: str) -> dict[str, Any]:
    """Return what the page is told about a prompt or a workflow."""
    return comfy.get(f"/gmflow/messages?{urllib.parse.urlencode(query)}")


def run(comfy: Comfy, prompt: dict, workflow: str) -> tuple[str, list[str]]:
    """Run a prompt as the page queues it; return its id, and the nodes that did not run again."""
    prompt_id = comfy.submit(prompt, extra_pnginfo={"workflow": {"id": workflow}})
    return prompt_id, comfy.wait(prompt_id).cached


def guided(guidance: float, seed: int = 11) -> dict:
    """Return a prompt whose stock sampler node warns about another guidance than 3.5."""
    prompt = custom(graph(seed=seed))
    prompt["noise"]["inputs"]["noise_seed"] = seed
    prompt["distilled"] = node("FluxGuidance", conditioning=["positive", 0], guidance=guidance)
    prompt["guider"]["inputs"]["conditioning"] = ["distilled", 0]
    return prompt


def test_messages_stay_with_a_cached_result(server: Comfy) -> None:
    """The page finds them by prompt and by workflow, as long as the result is the same."""
    prompt_id, _ = run(server, guided(7.0), "first")
    said = asked(server, prompt_id=prompt_id)
    assert said["workflow"] == "first"
    assert said["messages"]["sample"]["type"] == "SamplerCustomAdvanced"  # no node of ours
    ((text, level), *others) = said["messages"]["sample"]["messages"]
    assert text.startswith("guidance 7 does not fit: ")
    assert text.endswith("set guidance of 'FluxGuidance' to 3.5")
    assert level == "warning"
    assert [level for _, level in others] == ["info"]  # the sampler's line of settings

    again, cached = run(server, guided(7.0), "second")
    assert "sample" in cached
    assert asked(server, prompt_id=again)["messages"] == said["messages"]
    assert asked(server, workflow_id="second")["messages"] == said["messages"]

    fitting, _ = run(server, guided(3.5), "second")
    now = asked(server, workflow_id="second")["messages"]
    assert now == asked(server, prompt_id=fitting)["messages"]
    assert [level for _, level in now["sample"]["messages"]] == ["info"]
    assert asked(server, prompt_id=again)["messages"] == said["messages"]  # its own, as before
    assert asked(server, workflow_id="no such")["messages"] == {}


def test_a_page_with_the_script_gets_no_progress_text(server: Comfy) -> None:
    """Any other page does, so that it shows the messages too."""
    assert "guidance 7" in server.run(guided(7.0, seed=12)).texts["sample"]
    asked(server, client_id=server.client_id)
    try:
        assert "sample" not in server.run(guided(7.0, seed=13)).texts
    finally:
        for other in range(1000):  # the server forgets the page
            asked(server, client_id=f"other {other}")


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (stock(graph(), cfg=4.0), ["cfg 4 does not fit", "set cfg of 'KSampler' to 1"]),
        (graph(steps=2), ["too few steps (2)", "set steps of 'GM Sampler' to 4 or more"]),
        (
            custom(graph(), guider=node("CFGGuider", cfg=4.0), steps=2),
            ["set cfg of 'my guider' to 1", "set steps of 'GM Policy Sigmas' to 4 or more"],
        ),
    ],
    ids=["KSampler", "GM Sampler", "custom"],
)
def test_advice_names_the_nodes_of_the_prompt(server: Comfy, prompt: dict, said: list[str]) -> None:
    if "guider" in prompt:  # a node with a title of the user's
        wires = {"model": ["model", 0], "positive": ["positive", 0], "negative": ["negative", 0]}
        prompt["guider"]["inputs"].update(wires)
        prompt["guider"]["_meta"] = {"title": "my guider"}
    text = server.run(prompt).texts["sample"]
    for each in said:
        assert each in text


def test_advice_names_a_node_to_add_where_none_is(server: Comfy) -> None:
    prompt = custom(graph())
    prompt["sigmas"] = node(
        "BasicScheduler", model=["model", 0], scheduler="karras", steps=4, denoise=1.0
    )
    prompt["disabled"] = node("FluxDisableGuidance", conditioning=["positive", 0])
    prompt["guider"]["inputs"]["conditioning"] = ["disabled", 0]
    text = server.run(prompt).texts["sample"]
    assert "replace 'FluxDisableGuidance' by FluxGuidance with 3.5" in text
    assert "use GM Policy Sigmas with 4 steps or more in the place of 'Basic" in text
