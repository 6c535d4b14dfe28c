"""Prompts in API format for several test files."""

from __future__ import annotations

import re
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from .client import Comfy

# ComfyUI logs one of these if weights of a file fit no layer
NOT_FITTING = re.compile(
    r"unet missing|unet unexpected|lora key not loaded|NOT LOADED|ERROR lora", re.IGNORECASE
)


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """Return one node of a prompt; a link is [node, slot]."""
    return {"class_type": kind, "inputs": inputs}


def latent_of(comfy: Comfy, prompt: dict) -> Tensor:
    """Run a prompt and return the latent that its node "save" saves, (B, C, H, W)."""
    folder = comfy.base / "output" / "latents"
    name = f"test{len(list(folder.glob('*.latent')))}"
    save = {
        **prompt["save"],
        "inputs": {**prompt["save"]["inputs"], "filename_prefix": f"latents/{name}"},
    }
    comfy.run({**prompt, "save": save})
    (new,) = folder.glob(f"{name}_*.latent")
    return load_file(new)["latent_tensor"]
