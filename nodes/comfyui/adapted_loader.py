"""Load a base model for an adapter: as Load Diffusion Model does, or through ComfyUI-GGUF."""

from __future__ import annotations

import importlib
import os

import comfy.sd
import folder_paths
import torch

from ...gmflow_core.files.errors import quoted, reason
from .listing import MOST_NAMES, shown
from .model_folders import DIFFUSION_MODELS, find_diffusion_model
from .solver_choice import no_effect

GGUF_FILES, GGUF_NODE = "unet_gguf", "UnetLoaderGGUF"  # of ComfyUI-GGUF
FP8 = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}


def base_files() -> list[str]:
    """Return the files of diffusion models, and GGUF files where they can be loaded."""
    names = [name for folder in _folders() for name in folder_paths.get_filename_list(folder)]
    return list(dict.fromkeys(map(shown, names[:MOST_NAMES])))


def _folders() -> list[str]:
    """Return ComfyUI's kinds of folders that hold base models."""
    has_gguf = GGUF_FILES in folder_paths.folder_names_and_paths
    return [DIFFUSION_MODELS, *([GGUF_FILES] if has_gguf else [])]


def base_path(name: str) -> str:
    """Return the path of a diffusion model's file, which may be a GGUF file.

    Raises:
        ValueError: there is none of that name.
    """
    advice = " (GGUF files need ComfyUI-GGUF)" if name.lower().endswith(".gguf") else ""
    return find_diffusion_model(name, _folders(), advice)


def load_base(name: str, weight_dtype: str):
    """Return the MODEL in a file of models/diffusion_models.

    Args:
        weight_dtype: one of FP8; GGUF files keep their own.

    Raises:
        ValueError: the file cannot be loaded.
    """
    path = base_path(name)
    if path.lower().endswith(".gguf"):
        return _load_gguf(name, weight_dtype)
    try:
        return comfy.sd.load_diffusion_model(path, model_options=dict(FP8[weight_dtype]))
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{os.path.basename(path)} cannot be loaded as a diffusion model ({reason(error)}); "
            "choose the file of a base model, and repeat the download if it is incomplete"
        ) from error


def _load_gguf(name: str, weight_dtype: str):
    """Return the MODEL in a GGUF file, loaded by ComfyUI-GGUF's node.

    Raises:
        ValueError: ComfyUI-GGUF is not installed.
    """
    loader = importlib.import_module("nodes").NODE_CLASS_MAPPINGS.get(GGUF_NODE)
    if loader is None:
        raise ValueError(f"{quoted(name)} is a GGUF file; install ComfyUI-GGUF, which reads those")
    if weight_dtype != "default":
        no_effect(f"weight_dtype {weight_dtype}", "a GGUF file keeps its own")
    return loader().load_unet(name)[0]
