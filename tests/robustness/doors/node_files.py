"""Doors of the nodes' files: models, adapters, 8-bit models, sources, and the listings of them.

Only for a process in which ComfyUI runs; see `inside_comfyui.py`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import folder_paths
import torch

import nodes
from gmflow_core.files.checkpoint import SHIPPED, save_checkpoint
from gmflow_core.models import GMDiT
from gmflow_core.models.gmdit import GMDiTConfig
from tests.comfyui.adapters import write_adapter
from tests.comfyui.bases import write_flux
from tests.diffusers_folder import random_model, write_published_folder

from ..children import Limits
from .door import Door
from .models import FOLDER_FILES, GMDIT, make_mlp, random_weights
from .nodes_at_work import (
    TINY,
    base_model,
    call,
    latent_of,
    node_class,
    sample,
    stock_sample,
    use_outputs,
)

NODES = "GMFlow"  # ids of the extension's nodes begin with it
LIMITS = Limits(60, 900)


def add_folder(kind: str, folder: Path) -> None:
    """Let ComfyUI look for a kind of files in a folder, before all others."""
    folder_paths.add_model_folder_path(kind, str(folder), True)
    folder_paths.filename_list_cache.clear()


def make_gm_model(folder: Path) -> None:
    """Write a checkpoint of pictures of two classes."""
    sizes = {**GMDIT, "channels": 3, "num_heads": 4}
    model = random_weights(GMDiT(GMDiTConfig(**sizes)))
    data = {"labels": ["left", "right"], "space": "pixels"}
    save_checkpoint(model, folder / "model.safetensors", data=data)


def use_gm_model(folder: Path) -> Any:
    """Load a checkpoint with the node, name a class, and sample with a stock sampler and ours."""
    add_folder("gmflow", folder)
    (model,) = call("GMFlowLoader", model_name="model.safetensors")
    labels = call("GMFlowClassLabels", model=model, label="1", more_labels="0", repeat=1)
    labels[3].encode()
    return [*use_outputs([model]), sample(model)]


def make_adapter(folder: Path, base: str, policy: str) -> None:
    """Write an adapter, and load the base that it is put on."""
    write_adapter(folder / "tiny_4step.safetensors", base, single=1, policy=policy, **TINY)
    base_model(base)


def use_adapter(folder: Path, base: str) -> Any:
    """Put an adapter on a base, and sample."""
    add_folder("loras", folder)
    inputs = {"adapter_name": "tiny_4step.safetensors", "strength": 1.0}
    (model,) = call("GMFlowAdapter", model=base_model(base), **inputs)
    return [sample(model, "gm-policy")]


def make_16_bit(folder: Path) -> None:
    """Write a FLUX in 16 bit."""
    write_flux(folder / "flux.safetensors", single=1, **TINY)


def make_8_bit(folder: Path) -> None:
    """Save a FLUX in 8 bit."""
    make_16_bit(folder)
    add_folder("diffusion_models", folder)
    (model,) = call("GMFlowLoadDiffusionModel8bit", unet_name="flux.safetensors")
    call("GMFlowSaveDiffusionModel8bit", model=model, filename_prefix="cases")
    (saved,) = Path(folder_paths.get_output_directory()).glob("cases*.safetensors")
    shutil.move(saved, folder / "flux.safetensors")


def use_8_bit(folder: Path) -> Any:
    """Load a FLUX with the 8-bit loader, and sample.

    The weights must be finite. Large ones make a stock sampler's result overflow, which is no
    matter of the loader.
    """
    add_folder("diffusion_models", folder)
    (model,) = call("GMFlowLoadDiffusionModel8bit", unet_name="flux.safetensors")
    with torch.inference_mode():
        if stock_sample(model).shape != latent_of(model)["samples"].shape:
            raise RuntimeError("samples of another shape")
    return [model.model.state_dict()]


def make_source(folder: Path) -> None:
    """Copy the shipped source."""
    shutil.copy(SHIPPED / "digits_source.safetensors", folder / "source.safetensors")


def use_source(folder: Path) -> Any:
    """Load a source with the node, and draw noise of it."""
    add_folder("gmflow_sources", folder)
    (source,) = call("GMFlowSourceLoader", source_name="source.safetensors")
    inputs = {"noise_seed": 0, "batch_size": 2, "choice": "by weight"}
    noise, conditioning, latent, _ = call("GMFlowSourceNoise", source=source, **inputs)
    return [noise.generate_noise(latent), conditioning]


def make_listing(folder: Path) -> None:
    """Write what models/gmflow may hold, into a folder of that folder."""
    folder = folder / "listed"
    folder.mkdir()
    make_mlp(folder)
    shutil.copy(SHIPPED / "digits_k8.safetensors", folder / "digits.safetensors")
    make_source(folder)
    labels = {str(i): f"class {i}" for i in range(10)}
    write_published_folder(folder / "published", random_model(), labels=labels)


def use_listing(folder: Path) -> Any:
    """List everything, as /object_info does: no file may make it fail.

    LoRAs and diffusion models are listed by ComfyUI itself, whose own nodes never end on folders
    that link to each other; so only folders without links are among them.
    """
    import json

    kinds = ["gmflow", "gmflow_sources"]
    inside = [Path(place, name) for place, names, _ in os.walk(folder) for name in names]
    kinds += [] if any(map(Path.is_symlink, inside)) else ["loras", "diffusion_models"]
    for kind in kinds:
        add_folder(kind, folder / "listed")
    for name in sorted(nodes.NODE_CLASS_MAPPINGS):
        if name.startswith(NODES):
            text = json.dumps(node_class(name).GET_NODE_INFO_V1())
            text.encode()
            if len(text) > 4_000_000:
                raise RuntimeError(f"{name} describes itself in {len(text):,} bytes")
    return []


def doors() -> list[Door]:
    """Return the doors of this file."""
    file = {"*.safetensors": "safetensors"}
    listing = {f"listed/{pattern}": kind for pattern, kind in {**file, **FOLDER_FILES}.items()}
    listing |= {"listed/*.safetensors*": "bytes", "listed/published": "tree", "listed": "tree"}
    return [
        Door("node GM Load Model", make_gm_model, use_gm_model, file, 1, LIMITS),
        *(
            Door(
                f"node GM Adapter, {base} {policy}",
                lambda folder, base=base, policy=policy: make_adapter(folder, base, policy),
                lambda folder, base=base: use_adapter(folder, base),
                file,
                2,
                LIMITS,
            )
            for base, policy in (("flux", "GM"), ("flux", "DX"), ("qwen", "GM"))
        ),
        Door("node Load 8-bit, 16-bit file", make_16_bit, use_8_bit, file, 1, LIMITS),
        Door("node Load 8-bit, 8-bit file", make_8_bit, use_8_bit, file, 2, LIMITS),
        Door("node GM Load Mixture Source", make_source, use_source, file, 1, LIMITS),
        Door("listings of nodes", make_listing, use_listing, listing, 1, LIMITS),
    ]
