"""Settings of the nodes: GM Sampler's own choices, what has no effect, tooltips that agree."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from .adapter_prompts import graph as adapter_graph
from .adapter_prompts import serve
from .client import Comfy
from .graphs import latent_of, node
from .test_images import graph, pixels  # noqa: F401  (a fixture)

# numbers in a tooltip that are values of the input itself: "0 is off", "0.05 to 0.2 suit"
NUMBER = r"(?<![\w.:-])(\d+(?:\.\d+)?)(?![\w.]*\d)"
VERBS = "is|are|uses|takes|makes|corrects|starts|keeps|removes|draws|spends|sharpens|suits?"
VALUES = re.compile(rf"{NUMBER}(?:,[^.;:]*,)? (?:{VERBS})\b|{NUMBER} to {NUMBER} (?:{VERBS})\b")
RANGES = re.compile(rf"(?i)(?:above|below|at most|at least|set it to|default:?) {NUMBER}")


@pytest.fixture(scope="module")
def adapted(comfy: Comfy) -> Iterator[Comfy]:
    yield from serve(comfy)


@pytest.mark.usefixtures("pixels")
def test_auto_is_gm_ode_in_four_steps(comfy: Comfy) -> None:
    chosen = graph(solver="gm-ode", steps=4, substeps=0)
    prompt = graph(solver="auto", steps=0, substeps=0)
    result = comfy.run(prompt)
    assert result.texts["sample"] == "gm-ode: 4 steps, shift 1, order 2, 8 substeps"
    assert latent_of(comfy, prompt).equal(latent_of(comfy, chosen))


def test_auto_is_the_adapter_s_policy_and_steps(adapted: Comfy) -> None:
    prompt = adapter_graph(solver="auto", steps=0, seed=3)
    said = "gm-policy: 4 steps, shift 3.2, temperature 0.3, 32 substeps"
    assert adapted.run(prompt).texts["sample"] == said
    assert latent_of(adapted, prompt).equal(latent_of(adapted, adapter_graph(seed=3)))
    prompt["model"]["inputs"]["adapter_name"] = "gmflux_k8_piid_8step.safetensors"
    assert adapted.run(prompt).texts["sample"].startswith("gm-policy: 8 steps")


@pytest.mark.usefixtures("pixels")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": 0.5}, "temperature, as gm-ode does not use it"),
        ({"solver": "gm-sde", "substeps": 7, "stochasticity": 1.0}, "substeps and stochasticity"),
        ({"solver": "euler", "order": 1}, "order, as euler does not use it"),
        ({"denoise": 0.0}, "sampling, as denoise is 0"),
        ({"negative": ["labels", 1]}, "negative, as the weight of the guidance is 0"),
    ],
)
def test_settings_without_effect_are_said(comfy: Comfy, settings: dict, said: str) -> None:
    text = comfy.run(graph(**{"substeps": 0, **settings})).texts["sample"]
    assert f"no effect: {said}" in text
    assert "no effect" not in comfy.run(graph(seed=1)).texts["sample"]


@pytest.mark.usefixtures("pixels")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"denoise": 0.6}, "gm-ode: 4 steps, shift 1, the last 0.6 of the way, order 2"),
        ({"shift": 2.5, "final_step_size": 0.7}, "shift 2.5, final step size 0.7, order 2"),
        ({"steps": 1, "final_step_size": 0.7}, "gm-ode: 1 step, shift 1, order 2"),  # the only step
        ({"solver": "gm-policy", "denoise": 0.3}, "shift 1, the last 0.3 of the way, temperature"),
        (
            {"solver": "gm-policy", "shift": 3.2, "final_step_size": 1.0},
            "shift 3.2, final step size 1, temperature 0.3",
        ),
    ],
)
def test_unusual_times_are_among_what_a_solver_runs_with(
    comfy: Comfy, settings: dict, said: str
) -> None:
    assert said in comfy.run(graph(**settings)).texts["sample"]


def test_guidance_of_a_model_without_classes_is_said(comfy: Comfy) -> None:
    prompt = graph(model="checkerboard_k64.safetensors", guidance=0.3)
    latent = node("EmptyLatentImage", width=64, height=64, batch_size=1)
    sampler = prompt["sample"]["inputs"]
    sampler.update(latent_image=["labels", 0])
    del sampler["positive"]
    text = comfy.run({**prompt, "labels": latent}).texts["sample"]
    assert "no effect: guidance 0.3, as this model takes no conditioning" in text
    assert text.count("guidance 0.3") == 1  # and not among what it runs with


@pytest.mark.usefixtures("pixels")
def test_a_model_s_name_beside_a_path_is_said(comfy: Comfy) -> None:
    prompt = graph(seed=2)
    assert not comfy.run(prompt).texts.get("model", "").strip()
    path = str(comfy.base / "models" / "gmflow" / "pixels.safetensors")
    prompt["model"]["inputs"] = {"model_name": "checkerboard_k64.safetensors"}
    prompt["model"]["inputs"]["hub_id_or_path"] = path
    said = "no effect: model_name (checkerboard_k64.safetensors), as hub_id_or_path is used"
    assert comfy.run(prompt).texts["model"] == said


def test_a_part_of_an_empty_latent_is_said(comfy: Comfy) -> None:
    text = comfy.run(graph(denoise=0.5)).texts["sample"]
    assert "denoise 0.5 keeps a part of an empty latent" in text


def test_few_points_for_the_cells_are_said(comfy: Comfy) -> None:
    prompt = graph(model="checkerboard_k64.safetensors")
    prompt["labels"] = node("EmptyLatentImage", width=64, height=64, batch_size=1)
    prompt["sample"]["inputs"]["latent_image"] = ["labels", 0]
    del prompt["sample"]["inputs"]["positive"]
    picture = {"size": 64, "extent": 4.4, "outline": False, "merge_batch": True}
    prompt["few"] = node("GMFlowDensity", samples=["sample", 0], bins=32, **picture)
    prompt["enough"] = node("GMFlowDensity", samples=["sample", 0], bins=8, **picture)
    for name in ("few", "enough"):
        prompt[f"show {name}"] = node("PreviewImage", images=[name, 0])
    texts = comfy.run(prompt).texts
    assert "64 points are few for 32 x 32 cells" in texts["few"]
    assert "enough" not in texts


@pytest.mark.usefixtures("pixels")
def test_guides_without_effect_are_said(comfy: Comfy) -> None:
    guider = node(
        "GMFlowAutoguidance",
        **{"model": ["model", 0], "guide": ["model", 0], "positive": ["labels", 0]},
        **{"scale": 1.0, "start_percent": 0.0, "end_percent": 1.0},
    )
    prompt = graph()
    prompt["sample"] = node(
        "SamplerCustomAdvanced",
        noise=["noise", 0],
        guider=["guider", 0],
        sampler=["sampler", 0],
        sigmas=["sigmas", 0],
        latent_image=["labels", 2],
    )
    nodes = {
        "noise": node("RandomNoise", noise_seed=0),
        "sigmas": node("GMFlowSigmas", steps=2, shift=1.0, denoise=1.0),
        "sampler": node("GMFlowODESampler", order=2, substeps=4, spacing="sigma"),
        "guider": guider,
    }
    texts = comfy.run({**prompt, **nodes}).texts
    assert texts["guider"] == "no effect: guide, as scale is 1"
    assert "no effect: spacing, as the time shift is 1" in texts["sample"]
    assert "gm-ode: 2 steps, shift 1, order 2, 4 substeps" in texts["sample"]


def test_numbers_in_tooltips_are_values_of_the_input(comfy: Comfy) -> None:
    """Compare each number that a tooltip calls a value with what the schema accepts."""
    wrong, compared = [], 0
    for name, about in comfy.object_info().items():
        if not name.startswith("GMFlow"):
            continue
        for inputs in about["input"].values():
            for key, (kind, *options) in inputs.items():
                if kind not in ("INT", "FLOAT"):
                    continue
                low, high = options[0]["min"], options[0]["max"]
                tooltip = options[0]["tooltip"]
                found = [*VALUES.findall(tooltip), *((n,) for n in RANGES.findall(tooltip))]
                numbers = [float(number) for group in found for number in group if number]
                compared += len(numbers)
                wrong += [(name, key, n) for n in numbers if not low <= n <= high]
    assert wrong == []
    assert compared > 30
