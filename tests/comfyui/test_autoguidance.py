"""Autoguidance in a running ComfyUI: its formula, models that share weights, what does not fit."""

from __future__ import annotations

import pytest
import torch

from gmflow_core import flow_sigmas
from gmflow_core.sampling.denoisers import autoguided, class_denoiser
from gmflow_core.sampling.solvers import solve

from .adapters import write_lora
from .bases import write_flux
from .client import Comfy, PromptError
from .graphs import latent_of, node
from .source_prompts import (
    BY_LIST,
    ODE,
    close,
    drawn,
    graph,
    in_frame,
    networks,
    serve,
    spherical,
)
from .stand_in_files import write_text_encoder

STYLE = "flux_style.safetensors"
LOADERS = {
    "UNETLoader": {"weight_dtype": "default"},
    "GMFlowLoadDiffusionModel8bit": {"compute": "16 bit"},
}


@pytest.fixture(scope="module")
def server(comfy: Comfy) -> Comfy:
    return serve(comfy)


@pytest.fixture(scope="module")
def flux(server: Comfy) -> Comfy:
    """Return the server with two FLUX models, a copy of the first, and a LoRA."""
    models = server.base / "models"
    for name, seed in (("flux1-dev", 0), ("flux1-copy", 0), ("flux1-small", 4)):
        write_flux(
            models / "diffusion_models" / f"{name}.safetensors", seed=seed, dtype=torch.float32
        )
    write_lora(models / "loras" / STYLE, "flux")
    for name in ("clip_l", "t5xxl"):
        write_text_encoder(models / "text_encoders" / f"{name}.safetensors")
    server.object_info()
    return server


def auto(prompt: dict, guide: str = "guide", scale: float = 1.5, **settings) -> dict:
    """Return the prompt with Autoguidance."""
    about = {"scale": scale, "start_percent": 0.0, "end_percent": 1.0, **settings}
    wires = {
        "model": ["model", 0],
        "guide": [guide, 0],
        "positive": prompt["guider"]["inputs"]["conditioning"],
    }
    return {**prompt, "guider": node("GMFlowAutoguidance", **wires, **about)}


def with_hook(hook: str) -> dict:
    """Return a node that puts hooks on the conditioning."""
    wires = {"cond_NEW": ["text", 0], "hooks": [hook, 0]}
    return node("ConditioningSetProperties", **wires, strength=1.0, set_cond_area="default")


def with_copy(prompt: dict) -> dict:
    """Return a prompt with a second `weak`, of a copy of the model's file."""
    loader = node("UNETLoader", unet_name="flux1-copy.safetensors", weight_dtype="default")
    weak = node("LoraLoaderModelOnly", **(prompt["weak"]["inputs"] | {"model": ["copy", 0]}))
    return {**prompt, "copy": loader, "weak copy": weak}


def flux_graph(steps: int = 3) -> dict:
    """Return two FLUX models, the first also weakened by a LoRA, and SamplerCustomAdvanced."""
    wires = {name: [name, 0] for name in ("noise", "guider", "sampler", "sigmas")}
    return {
        "model": node("UNETLoader", unet_name="flux1-dev.safetensors", weight_dtype="default"),
        "guide": node("UNETLoader", unet_name="flux1-small.safetensors", weight_dtype="default"),
        "weak": node(
            "LoraLoaderModelOnly",
            model=["model", 0],
            lora_name=STYLE,
            strength_model=-1.0,
        ),
        "clip": node(
            "DualCLIPLoader",
            clip_name1="clip_l.safetensors",
            clip_name2="t5xxl.safetensors",
            type="flux",
        ),
        "text": node("CLIPTextEncode", clip=["clip", 0], text="a lighthouse at dusk"),
        "other": node("CLIPTextEncode", clip=["clip", 0], text="a fox"),
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=2),
        "noise": node("RandomNoise", noise_seed=0),
        "guider": node("BasicGuider", model=["model", 0], conditioning=["text", 0]),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("GMFlowSigmas", steps=steps, shift=1.0, denoise=1.0),
        "sample": node("SamplerCustomAdvanced", latent_image=["latent", 0], **wires),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="latents/test"),
    }


@pytest.mark.parametrize(
    ("solver", "sampler"),
    [("euler", node("KSamplerSelect", sampler_name="euler")), ("gm-ode", ODE)],
)
def test_autoguidance_is_the_formula(server: Comfy, solver: str, sampler: dict) -> None:
    """Model and guide get the same modes; GM-ODE's mixture is shifted as a whole."""
    modes = [3, 0, 1]
    prompt = auto(
        {
            **graph(sampler=sampler, **BY_LIST),
            "guide": node("GMFlowLoader", model_name="weak.safetensors"),
        }
    )
    main, weak = networks(server, "known", "weak")
    frame = spherical().frame(modes)
    denoiser = autoguided(in_frame(main, modes), in_frame(weak, modes), 1.5)
    y = solve(solver, denoiser, frame.enter(drawn(modes), 1.0), flow_sigmas(4), substeps=4)
    assert close(latent_of(server, prompt), frame.leave(y, 0.0))


def test_interval_and_scale_one(server: Comfy) -> None:
    """Check that of the sigmas 1, .75, .5, .25 only the middle two are guided.

    At scale 1, or if no step is in the interval, the guide is not even loaded.
    """
    modes = [3, 0, 1]
    prompt = {**graph(**BY_LIST), "guide": node("GMFlowLoader", model_name="weak.safetensors")}
    main, weak = (
        class_denoiser(network, torch.tensor(modes))
        for network in networks(server, "known", "weak")
    )
    both = autoguided(main, weak, 3.0)
    expected = solve(
        "euler",
        lambda x, sigma: (both if 0.4 < sigma[0] < 0.8 else main)(x, sigma),
        drawn(modes),
        flow_sigmas(4),
    )
    assert close(
        latent_of(server, auto(prompt, scale=3.0, start_percent=0.2, end_percent=0.6)), expected
    )
    prompt["guide"]["inputs"]["weight_dtype"] = "bf16"  # one that is not loaded yet
    plain = latent_of(server, prompt)
    for count, settings in (
        (1, {"scale": 1.0}),
        (1, {"start_percent": 0.1, "end_percent": 0.2}),
        (2, {"scale": 2.0}),
    ):
        before = server.log().count("Requested to load")
        assert torch.equal(latent_of(server, auto(prompt, **settings)), plain) == (count == 1)
        assert server.log().count("Requested to load") == before + count


@pytest.mark.parametrize("guide", ["guide", "weak"])
def test_autoguidance_of_flux(flux: Comfy, guide: str) -> None:
    """One step is linear in the steps of the two models.

    The guide is another FLUX, or the same one weakened by a LoRA.
    """
    prompt = flux_graph(steps=1)
    main = latent_of(flux, prompt)
    prompt["guider"]["inputs"]["model"] = [guide, 0]
    weak = latent_of(flux, prompt)
    assert not close(main, weak, atol=0.02)
    assert close(latent_of(flux, auto(flux_graph(steps=1), guide)), weak + 1.5 * (main - weak))
    assert close(
        latent_of(flux, auto(flux_graph(steps=1), guide, scale=2.0)), weak + 2.0 * (main - weak)
    )
    shifted = {"sigmas": node("GMFlowSigmas", steps=1, shift=2.0, denoise=1.0)}
    assert close(latent_of(flux, flux_graph(steps=1) | shifted), main)


@pytest.mark.parametrize("loader", LOADERS)
def test_models_in_turn_are_what_they_are_apart(flux: Comfy, loader: str) -> None:
    """A guide that is the model with a LoRA equals one from a copy of the file with the LoRA.

    Afterwards the model is what it was. The model as its own guide changes nothing.
    """
    base = {
        **flux_graph(),
        "model": node(loader, unet_name="flux1-dev.safetensors", **LOADERS[loader]),
    }
    plain = latent_of(flux, base)
    before = flux.log().count("loaded in turn")
    in_turn = latent_of(flux, auto(base, "weak", start_percent=0.2))
    assert flux.log().count("loaded in turn") == before + 1
    prompt = with_copy(auto(base, "weak copy", start_percent=0.2))
    prompt["copy"] = node(loader, unet_name="flux1-copy.safetensors", **LOADERS[loader])
    assert close(in_turn, latent_of(flux, prompt))
    assert flux.log().count("loaded in turn") == before + 1
    assert not close(in_turn, plain, atol=0.02)
    assert close(latent_of(flux, auto(base, "model")), plain)
    ddim = node("KSamplerSelect", sampler_name="ddim")  # Euler, without the cache
    assert close(latent_of(flux, {**base, "sampler": ddim}), plain)


def test_a_lora_hook_of_the_guide_is_the_lora(flux: Comfy) -> None:
    """It changes the guide only, whose model is the same, and leaves the model as it was."""
    plain, lora = latent_of(flux, flux_graph()), latent_of(flux, auto(flux_graph(), "weak"))
    hooked = auto(flux_graph(), "model")
    hooked["hook"] = node("CreateHookLoraModelOnly", lora_name=STYLE, strength_model=-1.0)
    hooked["hooked"] = with_hook("hook")
    hooked["guider"]["inputs"]["guide_positive"] = ["hooked", 0]
    assert close(latent_of(flux, hooked), lora)
    assert not close(lora, plain, atol=0.02)
    ddim = node("KSamplerSelect", sampler_name="ddim")  # Euler, without the cache
    assert close(latent_of(flux, {**flux_graph(), "sampler": ddim}), plain)


def test_hooks_with_keyframes_are_the_same_for_one_model_and_two(flux: Comfy) -> None:
    """Model and guide have the same hook, and both are told when its strength changes."""

    def hooked(guide: str) -> torch.Tensor:
        prompt = with_copy(auto(flux_graph(steps=4), guide))
        prompt["hook"] = node("CreateHookLoraModelOnly", lora_name=STYLE, strength_model=0.7)
        prompt["first"] = node("CreateHookKeyframe", strength_mult=0.0, start_percent=0.0)
        later = {"strength_mult": 1.0, "start_percent": 0.4, "prev_hook_kf": ["first", 0]}
        prompt["later"] = node("CreateHookKeyframe", **later)
        prompt["hooks"] = node("SetHookKeyframes", hooks=["hook", 0], hook_kf=["later", 0])
        prompt["hooked"] = with_hook("hooks")
        prompt["guider"]["inputs"]["positive"] = ["hooked", 0]
        return latent_of(flux, prompt)

    assert close(hooked("weak"), hooked("weak copy"))


def test_nodes_that_call_the_model_after_guidance_find_the_model(flux: Comfy) -> None:
    """Not the guide, whose LoRA is on the same weights in turn."""

    def perturbed(guide: str) -> torch.Tensor:
        prompt = with_copy(auto(flux_graph(), guide))
        prompt["pag"] = node("PerturbedAttentionGuidance", model=["model", 0], scale=3.0)
        prompt["guider"]["inputs"]["model"] = ["pag", 0]
        return latent_of(flux, prompt)

    assert close(perturbed("weak"), perturbed("weak copy"))


def test_where_no_conditioning_of_the_guide_counts_nothing_is_guided(flux: Comfy) -> None:
    prompt = auto(flux_graph(steps=4))
    prompt["early"] = node(
        "ConditioningSetTimestepRange", conditioning=["text", 0], start=0.0, end=0.4
    )
    prompt["guider"]["inputs"]["guide_positive"] = ["early", 0]
    assert close(latent_of(flux, prompt), latent_of(flux, auto(flux_graph(4), end_percent=0.4)))


def test_a_node_that_needs_a_negative_has_no_effect(flux: Comfy) -> None:
    if "NAGuidance" not in flux.object_info():
        pytest.skip("this ComfyUI has no Normalized Attention Guidance")
    prompt = auto(flux_graph())
    prompt["nag"] = node("NAGuidance", model=["model", 0], nag_scale=5, nag_alpha=0.5, nag_tau=1.5)
    prompt["guider"]["inputs"]["model"] = ["nag", 0]
    assert (
        "no effect: a node on the model that needs a negative" in flux.run(prompt).texts["guider"]
    )


def test_a_spread_of_the_guide_is_said_to_have_no_effect(flux: Comfy) -> None:
    """Unless it is the model's own, as one node may be before both."""
    prompt = auto(flux_graph(), "spread")
    prompt["sampler"] = node("KSamplerSelect", sampler_name="gm_ode")
    prompt["spread"] = node("GMFlowSpread", model=["guide", 0], spread=0.4)
    said = flux.run(prompt).texts
    assert said["guider"] == "no effect: GM Spread on the guide, as only that of the model counts"
    assert "GM Spread" not in said["sample"]
    prompt["both"] = node("GMFlowSpread", model=["model", 0], spread=0.4)
    prompt["guider"]["inputs"] |= {"model": ["both", 0]}
    said = flux.run(prompt).texts
    assert not said["guider"].strip()
    assert "no effect" not in said["sample"]
    assert "of spread 0.4" in said["sample"]


def test_the_guide_can_have_a_conditioning_of_its_own(flux: Comfy) -> None:
    prompt = flux_graph(steps=1)
    main = latent_of(flux, prompt)
    prompt["guider"]["inputs"] |= {"model": ["guide", 0], "conditioning": ["other", 0]}
    weak = latent_of(flux, prompt)
    other = auto(flux_graph(steps=1))
    other["guider"]["inputs"]["guide_positive"] = ["other", 0]
    assert close(latent_of(flux, other), weak + 1.5 * (main - weak))


def test_what_is_patched_before_guidance_applies(flux: Comfy) -> None:
    """Adaptive Projected Guidance keeps the part of the difference orthogonal to the main model."""
    prompt = flux_graph(steps=1)
    main = latent_of(flux, prompt)
    prompt["guider"]["inputs"]["model"] = ["guide", 0]
    difference = main - latent_of(flux, prompt)
    inside = main - 0.1159  # the latent as FLUX sees it, up to a factor
    direction = torch.nn.functional.normalize(inside, dim=(1, 2, 3))
    parallel = (difference * direction).sum((1, 2, 3), keepdim=True) * direction
    prompt = auto(flux_graph(steps=1))
    prompt["apg"] = node("APG", model=["model", 0], eta=0.0, norm_threshold=0.0, momentum=0.0)
    prompt["guider"]["inputs"]["model"] = ["apg", 0]
    assert close(latent_of(flux, prompt), main + 1.5 * (difference - parallel), atol=1e-3)


def test_models_that_do_not_go_together(flux: Comfy) -> None:
    prompt = flux_graph()
    prompt["guide"] = node("GMFlowLoader", model_name="known.safetensors")
    with pytest.raises(
        PromptError,
        match="latents have 3 channels and 2 dimensions, the model's 16 and 2",
    ):
        flux.run(auto(prompt))
    prompt["guide"] = node("ModelSamplingDiscrete", model=["model", 0], sampling="eps", zsnr=False)
    with pytest.raises(PromptError, match=r"\(flow matching\) and the guide \(diffusion"):
        flux.run(auto(prompt))
    prompt = auto(
        {**graph(), "guide": node("GMFlowLoader", model_name="weak.safetensors")},
        start_percent=0.6,
        end_percent=0.4,
    )
    with pytest.raises(PromptError, match=r"start_percent 0\.6 comes after"):
        flux.run(prompt)
