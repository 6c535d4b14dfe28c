"""What models tell ComfyUI's memory manager, and what it does; for `test_dynamic_memory.py`.

    COMFYUI/.venv/bin/python memory_inside.py COMFYUI WORK

COMFYUI is its folder; WORK holds flux.safetensors and adapter.safetensors. Prints what it found as
JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from inside import REPOSITORY, board, flux, ours, run_cases


def main(comfyui: str, work: str) -> None:
    """Run all cases and print their results as JSON by name."""
    run_cases(comfyui, {**CASES, "training": lambda: training(Path(work))})


def budget() -> dict[str, Any]:
    """Load a GM model with a budget below its size, and free a part of it, on the meta device."""
    import comfy.model_management

    patcher, found = board()[0], {}
    loaded = comfy.model_management.LoadedModel(patcher)
    loaded.model_load(0.1)
    found["loaded"] = patcher.loaded_size() / patcher.model_size()
    found["unloaded"] = loaded.model_unload(1.0)
    found["left"] = patcher.loaded_size()
    device, clone = torch.device("meta"), patcher.clone()

    def places() -> list[str]:
        return sorted({str(weight.device) for weight in patcher.model.parameters()})

    for name, memory in (("0.1 bytes", 0.1), ("too few", -1e9), ("half", 3e6)):
        clone.partially_load(device, memory)
        found[name] = places()
    found["freed"] = clone.partially_unload(torch.device("cpu"), 1e6)
    found["kept"] = places()
    return found


def estimates() -> dict[str, float]:
    """Return the bytes for one pixel that GM models ask for, of many pixels."""
    found = {}
    for name, shape in {
        "checkerboard_k64": (1, 2, 1024, 1024),
        "digits_k8": (1000, 3, 8, 8),
        "emoji_k8": (1000, 3, 32, 32),
    }.items():
        path = REPOSITORY / "gmflow_core" / "shipped" / f"{name}.safetensors"
        model = ours("gm_model").load_gm_model(str(path))
        pixels = shape[0] * shape[2] * shape[3]
        found[name] = model.model.memory_required(input_shape=shape) / pixels
    return found


def training(work: Path) -> dict[str, Any]:
    """Load a base for sampling, then a student on it, then the base: the bytes asked for."""
    import comfy.model_management
    import comfy.samplers
    import comfy.sd

    load = comfy.model_management.load_models_gpu
    model = comfy.sd.load_diffusion_model(str(work / "flux.safetensors"))
    _, latent, positive = flux(work)
    parts, name = ours("train_lora"), "double_blocks.0.img_attn.proj"
    width = model.model.diffusion_model.hidden_size
    pair = parts.Pair(torch.zeros(4, width), torch.zeros(width, 4))
    places = {name: parts.Place(name, width, width)}
    base = ours("bases").base_of(model)
    student = ours("train_student").Student(model, base, places, {name: pair}).model

    def asked(each: Any) -> list[float]:
        guider, told = comfy.samplers.CFGGuider(each), []
        guider.set_conds(positive, positive)
        inside = ours("autoguider").InsideSampler(lambda predict: None)

        def watched(models: list, memory_required: float, **named: Any) -> None:
            told.extend([memory_required, named["minimum_memory_required"]])
            load(models, memory_required, **named)

        comfy.model_management.load_models_gpu = watched
        try:
            guider.sample(torch.zeros_like(latent), latent, inside, torch.tensor([1.0, 0.0]))
        finally:
            comfy.model_management.load_models_gpu = load
        return told

    found = {"before": asked(model), "student": asked(student), "after": asked(model)}
    return {**found, "trained": 2 * 4 * width}


CASES = {"budget": budget, "estimates": estimates}

if __name__ == "__main__":
    main(*sys.argv[1:])
