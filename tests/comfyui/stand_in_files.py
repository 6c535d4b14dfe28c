"""Write the files that a workflow names, as tiny random models, into a ComfyUI's folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.diffusers_folder import random_model, write_published_folder

from .adapters import write_adapter, write_lora
from .bases import CONTEXT_KLEIN, write, write_flux, write_flux2, write_gguf, write_qwen_image
from .vaes import tiny_autoencoder, write_vae

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
TEXT_STAND_IN = Path(__file__).parent / "text_stand_in"
LABELS = {
    88: "macaw",
    207: "golden retriever",
    279: "Arctic fox, white fox, Alopex lagopus",
    980: "volcano",
}
DOWNLOAD = " (download)"  # after the name of a published adapter
LOADERS = {  # input -> folder of models/, kind of file
    "GMFlowAdapter": {"adapter_name": ("loras", "adapter")},
    "GMFlowLoadDiffusionModel8bit": {"unet_name": ("diffusion_models", "base")},
    "UNETLoader": {"unet_name": ("diffusion_models", "base")},
    "UnetLoaderGGUF": {"unet_name": ("diffusion_models", "gguf")},
    "VAELoader": {"vae_name": ("vae", "vae")},
    "CLIPLoader": {"clip_name": ("text_encoders", "text")},
    "DualCLIPLoader": {
        "clip_name1": ("text_encoders", "text"),
        "clip_name2": ("text_encoders", "text"),
    },
    "LoraLoaderModelOnly": {"lora_name": ("loras", "lora")},
    "LoraLoader": {"lora_name": ("loras", "lora")},
}


def write_stand_ins(base: Path, prompt: Mapping[str, Any], **options: Any) -> list[Path]:
    """Write each file that the loaders of a prompt in API format name, unless it is there.

    Args:
        base: the folder that holds models/ and input/.
        options: of the writers of bases, adapters and LoRAs: hidden, depth, single, seed, dtype.

    Returns:
        All the files, including those that were there already.
    """
    for about in prompt.values():
        if about["class_type"] == "LoadImage":
            write_picture(base / "input" / about["inputs"]["image"])
    return [
        write_stand_in(
            base / "models" / folder / about["inputs"][name].replace(DOWNLOAD, ".safetensors"),
            kind,
            **options,
        )
        for about in prompt.values()
        for name, (folder, kind) in LOADERS.get(about["class_type"], {}).items()
    ]


def workflow_named(part: str) -> str:
    """Return the only name of a workflow that holds `part`, without its ending.

    Raises:
        ValueError: no workflow or more than one has such a name.
    """
    found = [path.stem for path in sorted(WORKFLOWS.glob("*.json")) if part in path.stem]
    if len(found) != 1:
        raise ValueError(f"{part!r} is in the names of {found}, not of one workflow")
    return found[0]


def workflow_prompt(workflow: str) -> dict[str, Any]:
    """Return the prompt of workflows/api/`workflow`.json."""
    return json.loads((WORKFLOWS / "api" / f"{workflow}.json").read_text(encoding="utf-8"))


def write_workflow_files(base: Path, workflow: str) -> dict[str, Any]:
    """Write the files of workflows/api/`workflow`.json, and return that prompt."""
    prompt = workflow_prompt(workflow)
    if "ImageNet" in workflow:
        write_imagenet_stand_ins(base)
    else:
        write_stand_ins(base, prompt)
    return prompt


def write_picture(path: Path) -> Path:
    """Write a colourful picture of 96 x 80 pixels, unless the file is there."""
    if not path.exists():
        x, y = np.meshgrid(np.linspace(0, 255, 96), np.linspace(0, 255, 80))
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8)).save(path)
    return path


def write_stand_in(path: Path, kind: str, **options: Any) -> Path:
    """Write one file of a kind, unless it is there; its name tells the base it belongs to.

    Raises:
        ValueError: `kind` is unknown.
    """
    if path.exists():
        return path
    base = base_of(path.name)
    klein = base == "flux2" and "klein" in path.name.lower()
    if kind == "base":
        if base == "flux":
            return write_flux(path, guidance="schnell" not in path.name.lower(), **options)
        if base == "flux2":
            return write_flux2(path, klein=klein, **options)
        return write_qwen_image(path, **without(options, "single"))
    if kind == "gguf":
        source = write_stand_in(path.with_suffix(".safetensors"), "base", **options)
        write_gguf(source, path, base)
        source.unlink()
        return path
    if kind in ("adapter", "dx"):
        return write_adapter(path, base, policy="DX" if kind == "dx" else "GM", **options)
    if kind == "lora":
        return write_lora(path, base, **without(options, "single"))
    if kind == "vae":
        return write_vae(path, base)
    if kind == "text":
        return write_text_encoder(path, CONTEXT_KLEIN if "qwen_3_4b" in path.name.lower() else None)
    raise ValueError(f"kind is {kind!r}, not base, gguf, adapter, dx, lora, vae or text")


def base_of(name: str) -> str:
    """Return the base that a file belongs to, by its name."""
    name = name.lower().replace("-", "").replace("_", "").replace(".", "")
    return "flux2" if "flux2" in name else "qwen" if "qwen" in name else "flux"


def write_imagenet_stand_ins(base: Path) -> None:
    """Write the published model's folder and the VAE of the workflow with ImageNet's classes.

    The VAE is a tiny autoencoder (TAESD): the stock loader takes it under any name, and its 32 x 32
    latents are 256 x 256 images too. Files that are there stay as they are.
    """
    models = base / "models"
    vae = models / "vae" / "vae-ft-ema-560000-ema-pruned.safetensors"
    if vae.exists():
        return
    labels = {str(label): LABELS.get(label, f"class {label}") for label in range(1000)}
    write_published_folder(
        models / "gmflow" / "gmflow_imagenet_k8_ema",
        random_model(num_classes=1000, latent_size=32),
        labels=labels,
    )
    vae.parent.mkdir(exist_ok=True)
    save_file(tiny_autoencoder(), vae)


def write_text_encoder(path: Path, width: int | None = None) -> Path:
    """Write a file for the loaders that `text_stand_in` replaces.

    Without `width`, the type chosen in the loader sets the width.
    """
    return write(path, {"stand_in": torch.zeros(1)}, {} if width is None else {"width": str(width)})


def install_text_stand_in(base: Path) -> None:
    """Put the extension `text_stand_in` into a base directory that no server uses yet."""
    place = base / "custom_nodes" / TEXT_STAND_IN.name
    if not place.exists():
        shutil.copytree(TEXT_STAND_IN, place, ignore=shutil.ignore_patterns("__pycache__"))


def without(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return the options but those with these names."""
    return {name: value for name, value in options.items() if name not in names}
