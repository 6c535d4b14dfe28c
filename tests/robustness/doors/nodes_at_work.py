"""Nodes of the extension at work in this process: sound inputs, calls, and what comes of them.

Only for a process in which ComfyUI runs; see `inside_comfyui.py`.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import folder_paths
import torch

import nodes
from tests.comfyui.adapters import write_adapter
from tests.comfyui.bases import write_flux, write_qwen_image

from ..verdicts import Refusal

TINY = {"hidden": 256, "depth": 1}
SHIPPED = {
    "checkerboard": "checkerboard_k64.safetensors",
    "digits": "digits_k8.safetensors",
    "modes": "digits_modes_k8.safetensors",
}
WIDTHS = {"flux": 4096, "qwen": 3584}


def node_class(name: str) -> Any:
    """Return the class of a node as ComfyUI has it."""
    return nodes.NODE_CLASS_MAPPINGS[name]


def call(name: str, **inputs: Any) -> list[Any]:
    """Validate and run a node as ComfyUI does, and return its outputs.

    What comes through a link is None for `validate_inputs` and `fingerprint_inputs`.

    Raises:
        Refusal: the node refuses the inputs before it runs.
    """
    cls = node_class(name)
    widgets = {key: value if plain(value) else None for key, value in inputs.items()}
    if _overrides(cls, "validate_inputs"):
        wanted = inspect.getfullargspec(cls.validate_inputs)
        names = {*wanted.args, *wanted.kwonlyargs}
        given = widgets if wanted.varkw else {k: v for k, v in widgets.items() if k in names}
        answer = cls.validate_inputs(**given)
        if isinstance(answer, str):
            raise Refusal(answer)
    if _overrides(cls, "fingerprint_inputs"):
        cls.fingerprint_inputs(**widgets)
    with torch.inference_mode():
        output = getattr(cls, cls.FUNCTION)(**inputs)
    return list(output.args if hasattr(output, "args") else output.result)


def plain(value: Any) -> bool:
    """Return whether a value can be a widget's, and not only come through a link."""
    return value is None or isinstance(value, (bool, int, float, str, list, dict))


def _overrides(cls: Any, name: str) -> bool:
    """Return whether a node class has its own method of that name."""
    from comfy_api.latest import io

    return getattr(cls, name).__func__ is not getattr(io.ComfyNode, name).__func__


@functools.cache
def shipped(name: str) -> Any:
    """Return the MODEL of a shipped checkpoint."""
    return call("GMFlowLoader", model_name=SHIPPED[name])[0]


@functools.cache
def base_model(base: str) -> Any:
    """Return a tiny MODEL in the layout of a base."""
    folder = Path(folder_paths.models_dir) / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"tiny_{base}.safetensors"
    if not path.exists():
        if base == "flux":
            write_flux(path, single=1, **TINY)
        else:
            write_qwen_image(path, **TINY)
    return nodes.UNETLoader().load_unet(path.name, "default")[0]


@functools.cache
def adapted(base: str) -> Any:
    """Return a tiny base with a sound adapter on it."""
    folder = Path(folder_paths.models_dir) / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(folder / f"{base}_4step.safetensors", base, single=1, **TINY)
    inputs = {"adapter_name": f"{base}_4step.safetensors", "strength": 1.0}
    return call("GMFlowAdapter", model=base_model(base), **inputs)[0]


@functools.cache
def eight_bit() -> Any:
    """Return a tiny FLUX in 8 bit."""
    base_model("flux")
    return call("GMFlowLoadDiffusionModel8bit", unet_name="tiny_flux.safetensors")[0]


@functools.cache
def mixture_source() -> Any:
    """Return the shipped mixture source."""
    return call("GMFlowSourceLoader", source_name="digits_source.safetensors")[0]


def conditioning_of(model: Any) -> list:
    """Return sound CONDITIONING for a MODEL."""
    kind = type(model.model).__name__.lower()
    for base, width in WIDTHS.items():
        if base in kind:
            pooled = torch.zeros(1, 768) if base == "flux" else None
            return [[torch.zeros(1, 4, width), {"pooled_output": pooled, "guidance": 3.5}]]
    network = model.get_model_object("diffusion_model")
    if getattr(getattr(network, "network", None), "config", None) is not None:
        classes = getattr(network.network.config, "num_classes", 0)
        if classes:
            return call("GMFlowClassLabels", model=model, label="1", more_labels="", repeat=1)[0]
    return call("GMFlowUnconditional")[0]


def latent_of(model: Any) -> dict[str, torch.Tensor]:
    """Return a sound LATENT for a MODEL."""
    kind = type(model.model).__name__.lower()
    if "flux" in kind:
        return {"samples": torch.zeros(1, 16, 4, 4)}
    if "qwen" in kind:
        return {"samples": torch.zeros(1, 16, 1, 4, 4)}
    config = model.get_model_object("diffusion_model").network.config
    if hasattr(config, "latent_size"):
        size = config.latent_size
        return {"samples": torch.zeros(1, config.channels, size, size)}
    return {"samples": torch.zeros(1, 2, 4, 4)}


def sample(model: Any, solver: str = "gm-ode") -> torch.Tensor:
    """Sample a MODEL with GM Sampler in one step."""
    latent = latent_of(model)
    inputs = {"seed": 0, "steps": 1, "solver": solver, "order": 1, "substeps": 1, "shift": 1.0}
    output = call(
        "GMFlowSampler",
        model=model,
        latent_image=latent,
        denoise=1.0,
        positive=conditioning_of(model),
        **inputs,
    )
    return output[0]["samples"]


def stock_sample(model: Any) -> torch.Tensor:
    """Sample a MODEL with a stock sampler in one step."""
    latent, conditioning = latent_of(model)["samples"], conditioning_of(model)
    noise = comfy.sample.prepare_noise(latent, 0)
    return comfy.sample.sample(
        model, noise, 1, 0.5, "euler", "simple", conditioning, conditioning, latent, seed=0
    )


def use_outputs(outputs: list[Any]) -> list:
    """Use what a node returned as the next node would, and return all numbers."""
    found = []
    with torch.inference_mode():
        for value in outputs:
            found.append(_use(value))
    return found


def _use(value: Any) -> Any:
    """Use one output."""
    kind = type(value).__name__
    if isinstance(value, torch.Tensor) or plain(value):
        return value
    model = shipped("checkerboard")
    if hasattr(value, "model_options") and hasattr(value, "get_model_object") and "Patcher" in kind:
        return stock_sample(value)
    latent = latent_of(model)
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    if hasattr(value, "generate_noise"):
        return value.generate_noise(latent_of(shipped("modes")))
    if hasattr(value, "sample") and hasattr(value, "model_patcher"):
        latent = latent_of(value.model_patcher)
        noise = torch.ones_like(latent["samples"])
        sampler = comfy.samplers.sampler_object("euler")
        return value.sample(noise, latent["samples"], sampler, sigmas, seed=0)
    if hasattr(value, "sample"):  # a SAMPLER
        noise = torch.ones_like(latent["samples"])
        empty = call("GMFlowUnconditional")[0]
        return comfy.sample.sample_custom(
            model, noise, 1.0, value, sigmas, empty, empty, latent["samples"], seed=0
        )
    return []
