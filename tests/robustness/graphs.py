"""Prompts that use every node of the extension, on the shipped models and tiny stand-ins."""

from __future__ import annotations

import copy
from typing import Any

from tests.comfyui import adapter_prompts
from tests.comfyui.adapters import write_adapter, write_lora
from tests.comfyui.client import Comfy
from tests.comfyui.graphs import node
from tests.comfyui.stand_in_files import (
    workflow_named,
    workflow_prompt,
    write_stand_in,
    write_text_encoder,
)

Prompt = dict[str, Any]
SHIPPED = {  # a prompt's name here -> what its workflow's name holds
    "checkerboard_quickstart": "GM Sampler beside KSampler",
    "digits_quickstart": "Coloured digits",
    "autoguidance": "Autoguidance",
    "mixture_source": "mixture source",
    "checkerboard_custom_sampling": "GM-ODE and GM-SDE",
    "digits_guidance": "Two kinds of guidance",
}
SMALL = {"width": 256, "height": 256, "batch_size": 4, "repeat": 1, "size": 64, "steps": 2}
LORA = "flux_style.safetensors"


def serve(comfy: Comfy) -> None:
    """Write the stand-ins that the prompts name."""
    models = comfy.base / "models"
    for base in ("flux", "qwen"):
        write_stand_in(models / "diffusion_models" / adapter_prompts.FILES[base], "base")
        write_adapter(models / "loras" / adapter_prompts.ADAPTERS[base], base)
    write_lora(models / "loras" / LORA)
    for name in ("clip_l", "t5xxl"):
        write_text_encoder(models / "text_encoders" / f"{name}.safetensors")
    comfy.object_info()


def shipped(name: str) -> Prompt:
    """Return a prompt of workflows/api, made small."""
    return smaller(workflow_prompt(workflow_named(SHIPPED[name])))


def smaller(prompt: Prompt) -> Prompt:
    """Lower sizes and counts of a prompt to those of `SMALL`."""
    for about in prompt.values():
        for name, value in SMALL.items():
            found = about["inputs"].get(name)
            if isinstance(found, int) and found > value:
                about["inputs"][name] = value
    return prompt


def adapted(base: str, lora: bool = False) -> Prompt:
    """Return a prompt with a GM adapter on a tiny base."""
    prompt = adapter_prompts.graph(base, steps=2, substeps=8)
    if lora:
        style = node("LoraLoaderModelOnly", lora_name=LORA, strength_model=0.5)
        prompt = adapter_prompts.inserted(prompt, "style", style, "model")
    return latent_shown(prompt)


def policy() -> Prompt:
    """Return a prompt with the policy sampler and its sigmas."""
    return latent_shown(adapter_prompts.custom(adapter_prompts.graph("flux"), steps=2))


def eight_bit(save: bool = False, compute: str = "16 bit") -> Prompt:
    """Return a prompt with an adapter on an 8-bit base, or one that saves that base."""
    name = adapter_prompts.FILES["flux"]
    load = node("GMFlowLoadDiffusionModel8bit", unet_name=name, compute=compute)
    if save:
        kept = "diffusion_models/kept"
        keep = node("GMFlowSaveDiffusionModel8bit", model=["base", 0], filename_prefix=kept)
        return {"base": load, "keep": keep}
    return {**adapted("flux"), "base": load}


def latent_shown(prompt: Prompt) -> Prompt:
    """Return the prompt with a preview of its latent's picture in the place of a saved file."""
    shown = {name: about for name, about in prompt.items() if name != "save"}
    return {**shown, "save": node("SaveLatent", samples=["sample", 0], filename_prefix="l/last")}


def unconditional() -> Prompt:
    """Return a prompt of the digits without a class."""
    prompt = shipped("digits_quickstart")
    prompt["none"] = node("GMFlowUnconditional")
    prompt["3"]["inputs"]["positive"] = ["none", 0]
    return prompt


def every_prompt() -> dict[str, Prompt]:
    """Return prompts by name; together they hold every node of the extension."""
    prompts = {name: shipped(name) for name in SHIPPED}
    prompts["unconditional"] = unconditional()
    for base in ("flux", "qwen"):
        prompts[base] = adapted(base)
    return prompts | {
        "flux with a LoRA": adapted("flux", lora=True),
        "policy": policy(),
        "8-bit": eight_bit(),
        "8-bit int8": eight_bit(compute="int8"),
        "8-bit saved": eight_bit(save=True),
    }


def reseeded(prompt: Prompt, seed: int) -> Prompt:
    """Return a copy of a prompt with another seed, so that ComfyUI samples again."""
    prompt = copy.deepcopy(prompt)
    for about in prompt.values():
        for name in ("seed", "noise_seed"):
            if isinstance(about["inputs"].get(name), int):
                about["inputs"][name] = seed
    return prompt
