"""Load and save diffusion models with 8-bit weights."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import folder_paths
import torch

from ...gmflow_core.files.atomic import remove_leftovers
from ...gmflow_core.files.errors import FileError, quoted, reason
from ...gmflow_core.files.safetensors_files import write_safetensors
from ...gmflow_core.quantization.int8 import bitsandbytes_product
from .adapter_info import adapter_of, refuse_to_save
from .bases import find_base
from .files import read_tensors
from .int8_checks import check_complete, check_state_dict
from .int8_layers import (
    FLOATS,
    MARK,
    StateDict,
    has_native_layout,
    int8_operations,
    is_quantisable,
)
from .unloading import keep_loadable

LEFT_ALONE = (  # errors that ComfyUI handles itself
    comfy.model_management.InterruptProcessingException,
    torch.cuda.OutOfMemoryError,
)


def load_8bit(
    path: str, compute: str = "16 bit", disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """Load a diffusion model with int8 weights, from a 16-bit file or one saved in 8 bit.

    Args:
        path: a file in any layout that ComfyUI reads.
        compute: "16 bit" or "int8", see `int8_operations`.
        disable_dynamic: load without the dynamic memory manager of newer versions; ComfyUI sets it
            when it copies a model.

    Raises:
        ValueError: the file cannot be read, is no diffusion model, has nothing to quantise, is
            quantised in another way, or lacks weights; or one is not finite.
    """
    name = os.path.basename(path)
    state_dict, metadata = read_diffusion_model(path)
    before = sum(weight.nbytes for weight in state_dict.values())
    progress = LayerProgress(state_dict)
    with fitting(name):
        dtype = weight_dtype(state_dict)
    options = {"dtype": dtype, "custom_operations": int8_operations(compute, dtype, progress)}
    load = comfy.sd.load_diffusion_model_state_dict
    # the newer memory manager handles no layout but ComfyUI's own
    extra = {"metadata": metadata, "disable_dynamic": disable_dynamic or not has_native_layout()}
    keys = list(state_dict)
    with fitting(name):
        model = load(state_dict, model_options=options, **_known_to(load, extra))
    if model is None:
        raise ValueError(
            f"no diffusion model that this ComfyUI knows: {name!r} has {len(keys)} tensors, such "
            f"as {', '.join(keys[:3])}. Text encoders, VAEs and LoRAs have loaders of their own"
        )
    if not progress.done:
        raise ValueError(
            f"{name!r} has no linear layers in numbered blocks to quantise; use Load Diffusion "
            "Model"
        )
    check_complete(name, progress.lacking(model.model.diffusion_model))
    if (
        _is_dynamic(model) and not has_native_layout()
    ):  # a version that does not know disable_dynamic
        model = comfy.model_patcher.ModelPatcher(
            model.model, model.load_device, model.offload_device
        )
    if hasattr(model, "cached_patcher_init"):  # newer versions call it to load a model again
        model.cached_patcher_init = (load_8bit, (path, compute))
    keep_loadable(model)
    logging.info(
        "GMFlow: %s: %d linear layers in int8, %.2f GB instead of %.2f GB; %s layout; products in "
        "%s",
        *(name, progress.done, model.model_size() / 1e9, before / 1e9),
        "ComfyUI's" if has_native_layout() else "its own",
        product_name(compute, model.load_device),
    )
    return model


def read_diffusion_model(path: str) -> tuple[StateDict, dict[str, str] | None]:
    """Read a file that can be loaded in 8 bit: its weights in ComfyUI's names, and its metadata.

    Raises:
        ValueError: the file cannot be read, or is quantised in another way.
    """
    name = os.path.basename(path)
    if name.lower().endswith(".gguf"):
        raise ValueError(
            f"{name!r} is quantised already, as a GGUF file; load it with ComfyUI-GGUF's Unet "
            "Loader (GGUF)"
        )
    state_dict, metadata = read_tensors(path, repr(name))
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state_dict)
    inner = comfy.utils.state_dict_prefix_replace(state_dict, {prefix: ""}, filter_keys=True)
    state_dict = inner or state_dict
    check_state_dict(name, state_dict)
    return state_dict, metadata


@contextmanager
def fitting(name: str) -> Iterator[None]:
    """Raise what ComfyUI says of weights that fit no model as an error that names their file.

    Raises:
        FileError: the weights do not fit. Interrupts and a lack of memory pass unchanged.
    """
    try:
        yield
    except (FileError, MemoryError, *LEFT_ALONE):
        raise
    except Exception as error:
        raise FileError(name, f"does not fit its model ({reason(error)})") from error


class LayerProgress:
    """Progress bar of a loading model, advanced by a call after each int8 layer."""

    def __init__(self, state_dict: StateDict):
        self.done = 0
        self.missing: list[str] = []  # names that torch misses in the state dict, as it loads
        self.without_weight: list[str] = []  # linear layers' weights that are not in it
        self._layers = sum(
            key.endswith(f".{MARK}") or is_quantisable(key, weight)
            for key, weight in state_dict.items()
        )
        self._bar = comfy.utils.ProgressBar(max(1, self._layers))

    def __call__(self) -> None:
        """Advance by one layer.

        Raises:
            comfy.model_management.InterruptProcessingException: the user has interrupted.
        """
        self.done += 1
        self._bar.update_absolute(min(self.done, self._layers), self._layers)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def lacking(self, network: torch.nn.Module) -> list[str]:
        """Return the parameters of a network that were not in the state dict."""
        parameters = {name for name, _ in network.named_parameters()}
        found = [name for name in self.missing if name in parameters]
        return sorted({*found, *self.without_weight})


def weight_dtype(state_dict: StateDict) -> torch.dtype:
    """Return the type of the weights that stay unquantised.

    It is the 16-bit type of the file if the model computes in it, else the model's own.
    """
    plain = {
        key: w for key, w in state_dict.items() if w.dtype in FLOATS and not key.endswith("_scale")
    }
    stored = comfy.utils.weight_dtype(plain)
    config = comfy.model_detection.model_config_from_unet(state_dict, "")
    supported = config.supported_inference_dtypes if config else FLOATS
    able = [dtype for dtype in supported if dtype != torch.float32]
    return stored if stored in able or not able else able[0]


def _known_to(function, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that a function of this version of ComfyUI takes."""
    known = inspect.signature(function).parameters
    return {key: value for key, value in arguments.items() if key in known}


def _is_dynamic(model: comfy.model_patcher.ModelPatcher) -> bool:
    """Return whether the dynamic memory manager of newer versions holds the model."""
    return hasattr(model, "is_dynamic") and model.is_dynamic()


def product_name(compute: str, device: torch.device) -> str:
    """Return what computes the matrix products, for the log."""
    if compute == "16 bit":
        return "16 bit or more"
    if has_native_layout():
        return "int8 by ComfyUI"
    if device.type == "cuda" and bitsandbytes_product():
        return "int8 by bitsandbytes"
    return "int8 by torch"


def new_path(prefix: str) -> str:
    """Return the path of a new file below ComfyUI's output folder, as ComfyUI numbers them.

    What a killed save has left in the folder is removed.

    Raises:
        ValueError: the prefix is no place for a file there.
    """
    output = folder_paths.get_output_directory()
    try:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, output)
        path = os.path.join(folder, f"{name}_{counter:05}_.safetensors")
        with suppress(FileNotFoundError):
            os.lstat(path)
    except Exception as error:  # a path outside, NUL characters, surrogates, length, permission
        raise ValueError(
            f"filename_prefix {quoted(prefix)} is no place for a file below {output}: "
            f"{reason(error)}; nothing was written"
        ) from None
    remove_leftovers(folder)
    return path


def save_8bit(model: comfy.model_patcher.ModelPatcher, path: str) -> None:
    """Save an 8-bit model with its LoRAs.

    Raises:
        ValueError: the model is not in 8 bit, or has a GM adapter.
        WriteError: the file cannot be written.
    """
    state = {key: weight.contiguous() for key, weight in saved_state(model).items()}
    write_safetensors(state, path, {"format": "pt"})
    logging.info("GMFlow: saved %s, %.2f GB", path, os.path.getsize(path) / 1e9)


def saved_state(model: comfy.model_patcher.ModelPatcher) -> StateDict:
    """Return the state dict of an 8-bit model with its LoRAs, in the names of published files.

    Raises:
        ValueError: the model is not in 8 bit, or has a GM adapter.
    """
    adapter = adapter_of(model.model_options)
    if adapter is not None:
        refuse_to_save(adapter.name)
    if getattr(model, "injections", None):
        raise ValueError(
            "a LoRA that bypasses the weights cannot be saved in them: load it with Load LoRA "
            f"instead of its bypass form (found {', '.join(map(repr, model.injections))})"
        )
    model = model.clone()
    if _is_dynamic(model):
        comfy.model_management.load_models_gpu([model])
        state = model.model_state_dict_for_saving(model.model.diffusion_model, "diffusion_model.")
    else:
        comfy.model_management.unload_all_models()  # no other clone's patches are in the weights
        try:  # patches that are refused leave some weights patched, which all clones share
            model.patch_model(device_to=model.offload_device)
            state = dict(model.model.diffusion_model.state_dict())
        finally:
            model.unpatch_model(device_to=model.offload_device)
    if not any(key.endswith(f".{MARK}") for key in state):
        raise ValueError(
            "this model is not in 8 bit: connect one from GM Load Diffusion Model (8-bit). "
            "ModelSave saves others; a GM model is kept as the file that GM Load Model reads"
        )
    base = find_base(model)
    for inside, published in (base.saved_names if base else {}).items():
        state = {key.replace(inside, published): weight for key, weight in state.items()}
    return state
