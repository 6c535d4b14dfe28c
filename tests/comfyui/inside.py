"""Scripts inside ComfyUI's process: their frame, and models, latents and samplers for them."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent


def start(comfyui: str, *options: str) -> None:
    """Make this the process of a ComfyUI with the extension; a fork of one is that already.

    Args:
        comfyui: its folder.
        options: further ones of its command line.
    """
    os.chdir(comfyui)
    sys.path[:] = [comfyui, *(p for p in sys.path if p not in (comfyui, str(FOLDER)))]
    if "nodes" in sys.modules:
        return
    sys.argv = [sys.argv[0], "--cpu", "--disable-api-nodes", *options]
    import comfy.options

    comfy.options.enable_args_parsing()
    import nodes

    spec = importlib.util.spec_from_file_location(
        "text_stand_in", FOLDER / "text_stand_in" / "__init__.py"
    )
    # the stand-in makes ComfyUI accept the sizes of tiny models
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    if not asyncio.run(nodes.load_custom_node(str(REPOSITORY))):
        raise RuntimeError("the extension did not load")


def run_cases(comfyui: str, cases: dict[str, Callable[[], Any]], *options: str) -> None:
    """Run cases in ComfyUI, and print their results, or tracebacks, as JSON by name."""
    start(comfyui, *options)
    found = {}
    for name, case in cases.items():
        try:
            with torch.inference_mode():
                found[name] = case()
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


def ours(name: str) -> Any:
    """Return a module of nodes/comfyui as the extension has loaded it."""
    import nodes

    package = nodes.NODE_CLASS_MAPPINGS["GMFlowSampler"].__module__.removesuffix(".samplers")
    return sys.modules[f"{package}.comfyui.{name}"]


def board() -> tuple[Any, Tensor, list]:
    """Return the shipped checkerboard's MODEL, a latent (2, 2, 8, 8), and its conditioning."""
    model = ours("gm_model").load_gm_model(
        str(REPOSITORY / "gmflow_core" / "shipped" / "checkerboard_k64.safetensors")
    )
    return model, torch.zeros(2, 2, 8, 8), ours("label_conditioning").NO_TEXT


def flux(work: Path, before: Callable[[Any], Any] = lambda base: base) -> tuple[Any, Tensor, list]:
    """Return an adapted FLUX.1, a latent (2, 16, 8, 6), and a conditioning.

    Args:
        before: what other nodes do to the base before the adapter is put on it.
    """
    import comfy.sd
    import comfy.utils

    base = comfy.sd.load_diffusion_model(str(work / "flux.safetensors"))
    tensors, metadata = comfy.utils.load_torch_file(
        str(work / "adapter.safetensors"), return_metadata=True
    )
    model = ours("adapter").with_adapter(before(base), tensors, metadata, name="gmflux_4step")
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, 6, 4096, generator=generator)
    about = {"pooled_output": torch.randn(1, 768, generator=generator), "guidance": 3.5}
    return model, torch.zeros(2, 16, 8, 6), [[text, about]]


def sample(
    model: Any,
    latent: Tensor,
    positive: list,
    sampler: Any,
    *,
    mask: Tensor | None = None,
    sigmas: Tensor | None = None,
    seed: int = 5,
    cfg: float | None = None,
    negative: list | None = None,
) -> Tensor:
    """Sample as SamplerCustomAdvanced does, with Basic Guider or CFG Guider."""
    import comfy.sample
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative or positive)
    guider.set_cfg(1.0 if cfg is None else cfg)
    sigmas = ours("gm_sampler").gm_sigmas(4, 3.2) if sigmas is None else sigmas
    noise = comfy.sample.prepare_noise(latent, seed)
    return guider.sample(
        noise, latent, sampler, sigmas, denoise_mask=mask, disable_pbar=True, seed=seed
    )


def far(x: Tensor, y: Tensor) -> float:
    return ((x - y).norm() / y.norm()).item()


def half_mask(latent: Tensor) -> Tensor:
    mask = torch.zeros(len(latent), 1, *latent.shape[2:])
    mask[..., : latent.shape[-1] // 2] = 1
    return mask


def says(call: Callable[[], Any]) -> str:
    """Return the message of the ValueError or OSError that a call raises, "" if it raises none."""
    try:
        call()
    except (ValueError, OSError) as error:
        return str(error)
    return ""
