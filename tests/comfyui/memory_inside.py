"""What models tell ComfyUI's memory manager, and what it does; for `test_dynamic_memory.py`.

    COMFYUI/.venv/bin/python memory_inside.py COMFYUI WORK

Prints what it found as JSON.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from inside import REPOSITORY, board, ours, run_cases


def main(comfyui: str, work: str) -> None:
    """Run all cases and print their results as JSON by name."""
    run_cases(comfyui, CASES)


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


CASES = {"budget": budget, "estimates": estimates}

if __name__ == "__main__":
    main(*sys.argv[1:])
