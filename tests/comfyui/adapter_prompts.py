"""Prompts with GM adapters, and the tiny random models in the published layouts that they name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from .adapters import write_adapter, write_lora
from .bases import write_flux, write_flux2, write_qwen_image
from .client import Comfy
from .graphs import NOT_FITTING, node
from .stand_in_files import write_text_encoder

FILES = {
    "flux": "flux1-dev.safetensors",
    "qwen": "qwen_image_bf16.safetensors",
    "flux2": "flux2-dev.safetensors",
}
ADAPTERS = {base: f"gm{base}_k8_piid_4step.safetensors" for base in FILES}
EMPTY = {
    "flux": "EmptySD3LatentImage",
    "qwen": "EmptySD3LatentImage",
    "flux2": "EmptyFlux2LatentImage",
}
CLIP_TYPES = {"flux": "flux", "qwen": "qwen_image", "flux2": "flux2"}
ROUNDING = 1e-4  # of float32, over a few steps


def serve(comfy: Comfy) -> Iterator[Comfy]:
    """Yield the server with all files that the prompts name; weights in them must fit."""
    models, before = comfy.base / "models", len(comfy.log())
    for base, writer in {
        "flux": write_flux,
        "qwen": write_qwen_image,
        "flux2": write_flux2,
    }.items():
        writer(models / "diffusion_models" / FILES[base])
        write_adapter(models / "loras" / ADAPTERS[base], base)
        write_lora(models / "loras" / f"{base}_style.safetensors", base)
    write_flux(models / "diffusion_models" / "flux1-schnell.safetensors", guidance=False)
    write_adapter(models / "loras" / "dxflux_n10_piid_4step.safetensors", policy="DX")
    write_adapter(models / "loras" / "gmflux_k8_piid_8step.safetensors", seed=5)
    for name in ("clip_l", "t5xxl"):
        write_text_encoder(models / "text_encoders" / f"{name}.safetensors")
    comfy.object_info()
    yield comfy
    assert not NOT_FITTING.search(strip_expected(comfy.log()[before:]))


def skip_unknown_base(request: pytest.FixtureRequest, server: Comfy) -> None:
    """Skip a test with FLUX.2 if this ComfyUI, an old version, does not know it."""
    base = getattr(request.node, "callspec", None) and request.node.callspec.params.get("base")
    if base and not server.object_info(EMPTY[base]):
        pytest.skip(f"this ComfyUI has no {EMPTY[base]}")


def strip_expected(log: str) -> str:
    """Return a log without what nodes raised, which the tests look at themselves."""
    return re.sub(
        r"!!! Exception during processing !!!.*?Prompt executed", "", log, flags=re.DOTALL
    )


def graph(
    base: str = "flux", width: int = 64, height: int = 64, batch: int = 1, **sampler: Any
) -> dict:
    """Return Load Diffusion Model -> GM Adapter -> GM Sampler -> a saved latent."""
    if base == "flux":
        clip = node(
            "DualCLIPLoader",
            clip_name1="clip_l.safetensors",
            clip_name2="t5xxl.safetensors",
            type="flux",
        )
    else:
        clip = node("CLIPLoader", clip_name="t5xxl.safetensors", type=CLIP_TYPES[base])
    wires = {"model": ["model", 0], "latent_image": ["latent", 0], "positive": ["positive", 0]}
    settings = {
        "seed": 0,
        "steps": 4,
        "solver": "gm-policy",
        "order": 2,
        "substeps": 32,
        "shift": 0.0,
        "denoise": 1.0,
        **sampler,
    }
    return {
        "base": node("UNETLoader", unet_name=FILES[base], weight_dtype="default"),
        "model": node(
            "GMFlowAdapter", model=["base", 0], adapter_name=ADAPTERS[base], strength=1.0
        ),
        "clip": clip,
        "positive": node("CLIPTextEncode", clip=["clip", 0], text="a lighthouse at dusk"),
        "negative": node("CLIPTextEncode", clip=["clip", 0], text="blurry"),
        "latent": node(EMPTY[base], width=width, height=height, batch_size=batch),
        "sample": node("GMFlowSampler", **wires, **settings),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="latents/test"),
    }


def custom(
    prompt: dict, sampler: dict | None = None, guider: dict | None = None, **sigmas: Any
) -> dict:
    """Return the prompt with SamplerCustomAdvanced and the nodes for SAMPLER and SIGMAS."""
    wires = {name: [name, 0] for name in ("noise", "guider", "sampler", "sigmas")}
    settings = {"steps": 4, "shift": 0.0, "final_step_size": 0.5, "denoise": 1.0, **sigmas}
    return {
        **prompt,
        "noise": node("RandomNoise", noise_seed=0),
        "guider": guider or node("BasicGuider", model=["model", 0], conditioning=["positive", 0]),
        "sampler": sampler
        or node("GMFlowPolicySampler", substeps=32, temperature=0.0, stochasticity=0.0),
        "sigmas": node("GMFlowPolicySigmas", model=["model", 0], **settings),
        "sample": node(
            "SamplerCustomAdvanced",
            **wires,
            latent_image=prompt["sample"]["inputs"]["latent_image"],
        ),
    }


def stock(prompt: dict, **settings: Any) -> dict:
    """Return the prompt with KSampler."""
    wires = {
        "model": ["model", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "latent_image": ["latent", 0],
    }
    settings = {
        "seed": 0,
        "steps": 4,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
        **settings,
    }
    return {**prompt, "sample": node("KSampler", **wires, **settings)}


def inserted(prompt: dict, name: str, about: dict, before: str) -> dict:
    """Return the prompt with a node `about` on the wire into the model input of `before`."""
    about["inputs"]["model"] = prompt[before]["inputs"]["model"]
    after = {**prompt[before], "inputs": {**prompt[before]["inputs"], "model": [name, 0]}}
    return {**prompt, name: about, before: after}


def near(a: Tensor, b: Tensor, tolerance: float = ROUNDING) -> bool:
    """Return whether two latents differ by rounding only, relative to the largest value."""
    return a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max()
