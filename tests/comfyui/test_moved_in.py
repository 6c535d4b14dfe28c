"""Workflows that were made for ComfyUI-piFlow, without that extension."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from .adapter_prompts import ADAPTERS, FILES, graph, near, serve
from .client import Comfy
from .graphs import latent_of, node
from .page import ComfyPage

LOADER, SAMPLING, SAMPLER = "Load pi-Flow Model", "ModelSamplingPiFlow", "pi-Flow Sampler"
SOURCES = ["shifted", 0], ["positive", 0], ["latent", 0]  # of the sampler's inputs
SETTINGS = {
    "seed": 11,
    "steps": 4,
    "substeps": 32,
    "final_step_size_scale": 0.5,
    "diffusion_coefficient": 0.0,
    "gm_temperature": "auto",
    "manual_gm_temperature": 1.0,
    "denoise": 1.0,
}


@pytest.fixture(scope="module")
def server(comfy: Comfy) -> Iterator[Comfy]:
    if not comfy.get("/object_info/GMFlowPiFlowSampler") or not has_replacements(comfy):
        pytest.skip("this ComfyUI replaces no nodes")
    yield from serve(comfy)


def has_replacements(comfy: Comfy) -> bool:
    """Return whether this version of ComfyUI knows node replacements."""
    try:
        return bool(comfy.get("/node_replacements"))
    except OSError:
        return False


def piflow_prompt(base: str, shift: float, adapter_strength: float = 1.0, **sampler: Any) -> dict:
    """Return a prompt of `graph` with ComfyUI-piFlow's nodes, as the page would send it."""
    prompt = graph(base)
    wires = {
        "model": ["shifted", 0],
        "conditioning": ["positive", 0],
        "latent_image": ["latent", 0],
    }
    prompt["model"] = node(
        LOADER,
        model_name=FILES[base],
        weight_dtype="default",
        adapter_name=ADAPTERS[base],
        adapter_strength=adapter_strength,
    )
    prompt["shifted"] = node(SAMPLING, model=["model", 0], shift=shift)
    prompt["sample"] = node(SAMPLER, **wires, **{**SETTINGS, **sampler})
    del prompt["base"]
    return {key: {**about, "_meta": {"title": key}} for key, about in prompt.items()}


@pytest.mark.parametrize("base", ["flux", "qwen", "flux2"])
def test_a_prompt_gives_the_latent_of_our_own_nodes(server: Comfy, base: str) -> None:
    ours = graph(base, seed=11)
    assert near(latent_of(server, piflow_prompt(base, 3.2)), latent_of(server, ours))


def test_every_setting_arrives(server: Comfy) -> None:
    """Change all settings at once: the result is that of GM Sampler with the same ones."""
    theirs = piflow_prompt(
        "flux",
        2.0,
        adapter_strength=0.8,
        steps=5,
        substeps=40,
        final_step_size_scale=0.7,
        diffusion_coefficient=0.6,
        gm_temperature="manual",
        manual_gm_temperature=0.6,
        denoise=0.9,
    )
    ours = graph(
        seed=11,
        steps=5,
        substeps=40,
        shift=2.0,
        final_step_size=0.7,
        stochasticity=0.6,
        temperature=0.6,
        denoise=0.9,
    )
    ours["model"]["inputs"]["strength"] = 0.8
    expected = latent_of(server, ours)
    assert near(latent_of(server, theirs), expected)
    for key, value in {"gm_temperature": "auto", "substeps": 8, "denoise": 1.0}.items():
        theirs["sample"]["inputs"][key] = value  # each of them matters
        assert not near(latent_of(server, theirs), expected), key


def saved_workflow(**widgets: list) -> dict:
    """Return a workflow of ComfyUI-piFlow's nodes as the page saves it."""
    kinds = {  # node: type, links in, output
        "model": (LOADER, {}, "MODEL"),
        "shifted": (SAMPLING, {"model": ("model", "MODEL")}, "MODEL"),
        "clip": ("DualCLIPLoader", {}, "CLIP"),
        "positive": ("CLIPTextEncode", {"clip": ("clip", "CLIP")}, "CONDITIONING"),
        "latent": ("EmptySD3LatentImage", {}, "LATENT"),
        "sample": (
            SAMPLER,
            {
                "model": ("shifted", "MODEL"),
                "conditioning": ("positive", "CONDITIONING"),
                "latent_image": ("latent", "LATENT"),
            },
            "LATENT",
        ),
        "save": ("SaveLatent", {"samples": ("sample", "LATENT")}, None),
    }
    ids = {name: number for number, name in enumerate(kinds, 1)}
    links = [
        [0, ids[source], 0, ids[name], slot, kind]
        for name, (_, inputs, _) in kinds.items()
        for slot, (source, kind) in enumerate(inputs.values())
    ]
    for number, link in enumerate(links, 1):
        link[0] = number
    into = {(link[3], link[4]): link[0] for link in links}
    nodes = [
        {
            "id": ids[name],
            "type": kind,
            "pos": [40 + 260 * (ids[name] % 4), 60 + 280 * (ids[name] // 4)],
            "size": [240, 200],
            "flags": {},
            "order": ids[name] - 1,
            "mode": 0,
            "inputs": [
                {"name": key, "type": source[1], "link": into[ids[name], slot]}
                for slot, (key, source) in enumerate(inputs.items())
            ],
            "outputs": [
                {"name": out, "type": out, "links": [x[0] for x in links if x[1] == ids[name]]}
            ]
            if out
            else [],
            "properties": {"Node name for S&R": kind},
            "widgets_values": widgets[name],
        }
        for name, (kind, inputs, out) in kinds.items()
    ]
    last = {"last_node_id": len(nodes), "last_link_id": len(links)}
    return {**last, "nodes": nodes, "links": links, "groups": [], "config": {}, "version": 0.4}


def test_widgets_of_the_gguf_loader_arrive_by_their_place(server: Comfy) -> None:
    """A saved workflow has values without names, in the order of that node's widgets."""
    (found,) = server.get("/node_replacements")["Load pi-Flow Model (GGUF)"]
    saved = ["flux1-dev-Q8_0.gguf", "target", "float16", True, ADAPTERS["flux"], 0.8]
    values = dict(zip(found["old_widget_ids"], saved, strict=True))
    arrived = {
        each["new_id"]: each["set_value"] if "set_value" in each else values[each["old_id"]]
        for each in found["input_mapping"]
    }
    assert found["new_node_id"] == "GMFlowAdaptedModel"
    assert arrived == {
        "model_name": "flux1-dev-Q8_0.gguf",
        "weight_dtype": "default",
        "adapter_name": ADAPTERS["flux"],
        "strength": 0.8,
    }


def run_to_its_end(server: Comfy, page: ComfyPage) -> None:
    """Press Run, and wait until the prompt has succeeded."""
    prompt_id = page.run()
    while not server.get(f"/history/{prompt_id}"):
        page.page.wait_for_timeout(500)
    assert not server.result(prompt_id).errors


def check_info(server: Comfy, page: ComfyPage) -> None:
    """Add GM Adapter Info behind the adapted model: its text is on the node, and is not saved."""
    page.page.evaluate(
        """() => {
          const { graph } = window.app;
          const info = window.LiteGraph.createNode('GMFlowAdapterInfo');
          graph.add(info);
          graph.nodes.find((node) => node.type === 'GMFlowAdaptedModel').connect(0, info, 'model');
        }"""
    )
    run_to_its_end(server, page)
    info = "window.app.graph.nodes.find((node) => node.type === 'GMFlowAdapterInfo')"
    shown = f"{info}.widgets.find((each) => each.name === 'shown_info')?.value"
    page.page.wait_for_function(f"() => ({shown})?.startsWith('adapter: {ADAPTERS['flux']}')")
    values = page.page.evaluate(f"() => {info}.serialize().widgets_values")
    assert values == ["(on the connected model)"]


def test_the_page_offers_the_replacement_and_runs_it(
    server: Comfy, page: ComfyPage, tmp_path: Path
) -> None:
    """Drop a workflow, press Replace All, run: the same latent as without the page."""
    latents = server.base / "output" / "latents"
    sampler = [SETTINGS["seed"], "fixed", *list(SETTINGS.values())[1:]]
    workflow = saved_workflow(
        model=[FILES["flux"], "default", ADAPTERS["flux"], 1.0],
        shifted=[3.2],
        clip=["clip_l.safetensors", "t5xxl.safetensors", "flux", "default"],
        positive=["a lighthouse at dusk"],
        latent=[64, 64, 1],
        sample=sampler,
        save=["latents/page"],
    )
    path = tmp_path / "piflow.json"
    path.write_text(json.dumps(workflow))
    page.drop_workflow(path)
    assert page.missing_nodes() == sorted([LOADER, SAMPLING, SAMPLER])
    page.page.get_by_role("button", name="View details").click()
    page.page.get_by_role("button", name="Replace All").click()
    page.wait_for_notice("Replaced 3 node type(s)")
    assert page.missing_nodes() == []
    run_to_its_end(server, page)
    check_info(server, page)
    new = min(latents.glob("page_*.latent"))  # that of the first run
    assert near(load_file(new)["latent_tensor"], latent_of(server, piflow_prompt("flux", 3.2)))
