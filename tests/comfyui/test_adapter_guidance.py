"""Guidance on a model with a GM adapter, and settings that do not fit the adapter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .adapter_prompts import (
    custom,
    graph,
    inserted,
    near,
    serve,
    skip_unknown_base,
    stock,
)
from .client import Comfy, PromptError
from .graphs import latent_of, node


@pytest.fixture(scope="module")
def server(comfy: Comfy) -> Iterator[Comfy]:
    yield from serve(comfy)


@pytest.fixture(autouse=True)
def known_to_this_comfyui(request: pytest.FixtureRequest, server: Comfy) -> None:
    skip_unknown_base(request, server)


@pytest.mark.parametrize("base", ["flux", "qwen"])
def test_guiders_find_the_positive_conditioning(server: Comfy, base: str) -> None:
    """Classifier-free guidance with scale 1, or with the same prompt twice, changes nothing.

    Another scale with a negative prompt does, by the same in every guider.
    """
    plain = latent_of(server, custom(graph(base)))
    both = {"positive": ["positive", 0], "negative": ["negative", 0]}
    assert near(
        latent_of(
            server,
            custom(graph(base), guider=node("CFGGuider", model=["model", 0], cfg=1.0, **both)),
        ),
        plain,
    )
    same = {"positive": ["positive", 0], "negative": ["positive", 0]}
    assert near(
        latent_of(
            server,
            custom(graph(base), guider=node("CFGGuider", model=["model", 0], cfg=3.0, **same)),
        ),
        plain,
    )
    cfg = latent_of(
        server, custom(graph(base), guider=node("CFGGuider", model=["model", 0], cfg=3.0, **both))
    )
    assert not near(cfg, plain, 0.05)
    dual = {
        "cond1": ["positive", 0],
        "cond2": ["negative", 0],
        "negative": ["negative", 0],
        "style": "regular",
    }
    guider = node(
        "DualCFGGuider", model=["model", 0], cfg_conds=3.0, cfg_cond2_negative=1.0, **dual
    )
    assert near(latent_of(server, custom(graph(base), guider=guider)), cfg, 1e-3)


@pytest.mark.parametrize("base", ["flux", "qwen"])
def test_probabilistic_guidance(server: Comfy, base: str) -> None:
    guided = graph(base, guidance=0.3)
    with pytest.raises(PromptError, match=r"no negative conditioning: guidance with weight 0\.3"):
        server.run(guided)
    guided["sample"]["inputs"]["negative"] = ["negative", 0]
    latent = latent_of(server, guided)
    assert not near(latent, latent_of(server, graph(base)), 0.02)
    settings = {"orthogonal": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    both = {"positive": ["positive", 0], "negative": ["negative", 0]}
    guider = node("GMFlowGuider", model=["model", 0], scale=0.3, **settings, **both)
    assert near(latent_of(server, custom(graph(base), guider=guider)), latent)
    patched = custom(graph(base), guider=node("CFGGuider", model=["model", 0], cfg=0.3, **both))
    patched = inserted(patched, "guided", node("GMFlowProbabilisticGuidance", **settings), "guider")
    assert near(latent_of(server, patched), latent)


def test_a_spread_has_no_effect_on_a_mixture_and_says_so(server: Comfy) -> None:
    """On the node if it comes after the adapter, on the sampler if before."""
    prompt = graph("flux")
    adapter, sample = prompt["model"]["inputs"], prompt["sample"]["inputs"]
    spread = node("GMFlowSpread", model=adapter["model"], spread=0.7)
    adapted = {**prompt["model"], "inputs": {**adapter, "model": ["spread", 0]}}
    before = server.run({**prompt, "spread": spread, "model": adapted}).texts
    why = "as this model predicts its own mixture"
    assert f"no effect: GM Spread, {why}" in before["sample"]
    prompt["spread"] = node("GMFlowSpread", model=["model", 0], spread=0.7)
    prompt["sample"] = {**prompt["sample"], "inputs": {**sample, "model": ["spread", 0]}}
    after = server.run(prompt).texts
    assert after["spread"] == f"no effect: GM Spread, {why}"
    assert "no effect" not in after["sample"]


def halves(prompt: dict, left: str, right: str, areas: bool = False) -> dict:
    """Return a prompt with one conditioning for the left half and one for the right."""
    prompt = {**prompt, "sample": {**prompt["sample"], "inputs": {**prompt["sample"]["inputs"]}}}
    for name, of, x in (("left", left, 0.0), ("right", right, 0.5)):
        if areas:
            half = {"width": 0.5, "height": 1.0, "y": 0.0, "x": x, "strength": 1.0}
            prompt[name] = node("ConditioningSetAreaPercentage", conditioning=[of, 0], **half)
            continue
        prompt[f"{name} mask"] = node("SolidMask", value=1.0, width=64, height=64)
        prompt[f"no {name}"] = node("SolidMask", value=0.0, width=128, height=64)
        prompt[f"{name} half"] = node(
            "MaskComposite",
            destination=[f"no {name}", 0],
            source=[f"{name} mask", 0],
            x=int(128 * x),
            y=0,
            operation="add",
        )
        prompt[name] = node(
            "ConditioningSetMask",
            conditioning=[of, 0],
            mask=[f"{name} half", 0],
            strength=1.0,
            set_cond_area="default",
        )
    prompt["both"] = node(
        "ConditioningCombine", conditioning_1=["left", 0], conditioning_2=["right", 0]
    )
    prompt["sample"]["inputs"]["positive"] = ["both", 0]
    return prompt


@pytest.mark.parametrize("base", ["flux", "flux2"])
def test_prompts_of_regions_blend_their_policies(server: Comfy, base: str) -> None:
    """Halves of one prompt are the whole; other halves are neither prompt, nor follow the mean."""
    whole = graph(base, width=128, height=64)
    alone = latent_of(server, whole)
    assert near(latent_of(server, halves(whole, "positive", "positive")), alone, 1e-3)
    guided = graph(base, width=128, height=64, guidance=0.3)
    guided["sample"]["inputs"]["negative"] = ["negative", 0]
    same = latent_of(server, halves(guided, "positive", "positive"))
    assert near(same, latent_of(server, guided), 1e-3)
    assert not near(same, alone, 0.02)
    mixed = halves(whole, "positive", "negative")
    result = server.run(mixed)
    assert "no mixture" not in result.texts["sample"]
    mixed_latent = latent_of(server, mixed)
    assert not near(mixed_latent, alone, 0.02)
    euler = {**mixed["sample"]["inputs"], "solver": "euler", "final_step_size": 0.5}
    mean = latent_of(server, {**mixed, "sample": node("GMFlowSampler", **euler)})
    assert not near(mixed_latent, mean, 0.02)
    in_areas = halves(whole, "positive", "negative", areas=True)
    assert "no mixture" not in server.run(in_areas).texts["sample"]
    assert latent_of(server, in_areas).isfinite().all()


def test_predictions_for_windows_fall_back_to_the_mean(server: Comfy) -> None:
    nodes = server.object_info("ContextWindowsManual")
    if not nodes:
        pytest.skip("this ComfyUI has no context windows")
    defaults = {}
    for key, (kind, *options) in nodes["ContextWindowsManual"]["input"]["required"].items():
        settings = options[0] if options else {}
        choices = kind if isinstance(kind, list) else settings.get("options")
        default = settings.get("default", choices[0] if choices else None)
        defaults |= {} if default is None else {key: default}
    windows = node(
        "ContextWindowsManual", **{**defaults, "context_length": 8, "context_overlap": 2, "dim": 2}
    )
    prompt = inserted(graph(width=64, height=128), "windows", windows, "sample")
    assert "parts of the latent (context windows" in server.run(prompt).texts["sample"]
    assert latent_of(server, prompt).isfinite().all()


def test_the_first_prediction_counts(server: Comfy) -> None:
    """Skip Layer Guidance calls the network again, without a block, after the guider's call.

    With next to no weight it changes nothing: not the mean, and not the policy around it.
    """
    if not server.object_info("SkipLayerGuidanceDiT"):
        pytest.skip("this ComfyUI has no SkipLayerGuidanceDiT")
    layers = {"double_layers": "0", "single_layers": "", "rescaling_scale": 0.0}
    about = {"start_percent": 0.0, "end_percent": 1.0, **layers}

    def skipping(scale: float) -> dict:
        skip = node("SkipLayerGuidanceDiT", scale=scale, **about)
        return inserted(graph(), "skip", skip, "sample")

    plain = latent_of(server, graph())
    assert near(latent_of(server, skipping(1e-6)), plain)
    assert not near(latent_of(server, skipping(1.0)), plain, 0.05)


def test_settings_that_do_not_fit_the_adapter_are_said(server: Comfy) -> None:
    fitting = "gm-policy: 4 steps, shift 3.2, temperature 0.3, 32 substeps"
    assert server.run(graph(seed=3)).texts["sample"] == fitting
    prompt = graph(seed=3)
    prompt["distilled"] = node("FluxGuidance", conditioning=["positive", 0], guidance=3.5)
    prompt["sample"]["inputs"]["positive"] = ["distilled", 0]
    assert server.run(prompt).texts["sample"] == fitting
    prompt["distilled"]["inputs"]["guidance"] = 2.0
    said = (
        "guidance 2 does not fit: gmflux_k8_piid_4step.safetensors was made with a guidance of 3.5"
    )
    assert said in server.run(prompt).texts["sample"]
    assert "made for 4 steps or more" in server.run(graph(steps=3)).texts["sample"]
    shorter = server.run(graph(steps=3, denoise=0.7)).texts["sample"]
    assert "gm-policy: 3 steps, " in shorter
    assert "made for" not in shorter
    prompt = graph(steps=4)
    prompt["model"]["inputs"]["adapter_name"] = "gmflux_k8_piid_8step.safetensors"
    assert "made for 8 steps or more" in server.run(prompt).texts["sample"]
    prompt["sample"]["inputs"]["steps"] = 8
    assert server.run(prompt).texts["sample"].startswith("gm-policy: 8 steps, ")
    prompt["base"]["inputs"]["unet_name"] = "flux1-schnell.safetensors"
    assert "no guidance embedding" in server.run(prompt).texts["model"]


def test_guidance_on_a_distilled_model_is_said(server: Comfy) -> None:
    both = {"model": ["model", 0], "positive": ["positive", 0], "negative": ["negative", 0]}
    said = "has its guidance built in"
    for base, cfg, complains in (("flux", 3.0, True), ("flux", 1.0, False), ("qwen", 3.0, False)):
        prompt = custom(graph(base, seed=3), guider=node("CFGGuider", cfg=cfg, **both))
        assert (said in server.run(prompt).texts["sample"]) == complains
    disabled = graph(seed=3)
    disabled["none"] = node("FluxDisableGuidance", conditioning=["positive", 0])
    disabled["sample"]["inputs"]["positive"] = ["none", 0]
    assert "guidance none at all does not fit" in server.run(disabled).texts["sample"]


def test_stock_samplers_say_it_too_and_take_it_back(server: Comfy) -> None:
    prompt = stock({**graph(), "text": graph()["positive"]})
    prompt["positive"] = node("FluxGuidance", conditioning=["text", 0], guidance=2.0)
    assert "made with a guidance of 3.5" in server.run(prompt).texts["sample"]
    prompt["positive"]["inputs"]["guidance"] = 3.5
    assert server.run(prompt).texts["sample"] == " "
    prompt["sample"]["inputs"]["seed"] = 5
    assert "sample" not in server.run(prompt).texts


@pytest.mark.parametrize("base", ["flux", "qwen"])
def test_the_conditioning_of_another_model_is_named(server: Comfy, base: str) -> None:
    labels = node("GMFlowClassLabels", model=["digits", 0], label="0", more_labels="", repeat=1)
    prompt = {
        **graph(base),
        "digits": node("GMFlowLoader", model_name="digits_k8.safetensors"),
        "positive": labels,
    }
    for each in (prompt, stock(prompt)):
        result = server.run(each, expect_error=True)
        assert "it has 1 features, and this model takes" in result.errors["sample"]


def test_times_in_another_unit_are_said(server: Comfy) -> None:
    """ModelSamplingSD3 counts time in thousandths, which FLUX.1 does not."""
    for kind, said in (("ModelSamplingSD3", True), ("ModelSamplingAuraFlow", False)):
        prompt = inserted(graph("flux"), "shift", node(kind, shift=3.2), "sample")
        assert ("times in a wrong unit" in server.run(prompt).texts["sample"]) is said, kind
