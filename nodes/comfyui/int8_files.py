"""Load and save models with 8-bit weights."""

from __future__ import annotations

import inspect
import logging
import os

import comfy.utils
import torch

from ...gmflow_core.quantization.int8 import bitsandbytes_product
from .int8_layers import (
    FLOATS,
    FORMAT,
    MARK,
    StateDict,
    has_native_layout,
    int8_operations,
    is_quantisable,
    read_layout,
)
from .options import adapter_of

OTHERS = {  # parts of key names that tell other kinds of quantised files
    "scaled_fp8": "scaled fp8",
    "scale_weight": "scaled fp8",
    "quant_state.bitsandbytes": "bitsandbytes 4 bit",
    ".absmax": "bitsandbytes 4 bit",
    ".SCB": "bitsandbytes int8",
    ".qweight": "GPTQ, AWQ or SVDQuant",
    ".wscales": "SVDQuant",
}


# --- loading and saving
def check_state_dict(name: str, state_dict: StateDict) -> None:
    """Refuse what is quantised already in another way.

    Raises:
        ValueError: says what was found, and which node to use.
    """
    formats = {
        read_layout(mark)[0] for key, mark in state_dict.items() if key.endswith(f".{MARK}")
    } - {FORMAT}
    found = [f"ComfyUI's {format}" for format in sorted(formats)]
    found += [kind for part, kind in OTHERS.items() if any(part in key for key in state_dict)]
    if not any(key.endswith(f".{MARK}") for key in state_dict):
        types = {weight.dtype for key, weight in state_dict.items() if key.endswith("weight")}
        found += sorted(str(dtype).removeprefix("torch.") for dtype in types if dtype.itemsize == 1)
    if found:
        raise ValueError(
            f"{name!r} is quantised already ({found[0]}). Load it with Load Diffusion Model, or the loader of its format; "
            "for 8 bit take the bf16 or fp16 file of the model"
        )


def weight_dtype(state_dict: StateDict) -> torch.dtype:
    """The type of what stays unquantised: the 16-bit type of the file if the model computes in it, else the model's."""
    plain = {
        key: w for key, w in state_dict.items() if w.dtype in FLOATS and not key.endswith("_scale")
    }
    stored = comfy.utils.weight_dtype(plain)
    config = comfy.model_detection.model_config_from_unet(state_dict, "")
    able = [
        dtype
        for dtype in (config.supported_inference_dtypes if config else FLOATS)
        if dtype != torch.float32
    ]
    return stored if stored in able or not able else able[0]


def load_8bit(
    path: str, compute: str = "16 bit", disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """A diffusion model with int8 weights, from a 16-bit file or one that was saved in 8 bit.

    Args:
        path: of a file in any layout that ComfyUI reads.
        compute: "16 bit" or "int8", see `int8_operations`.
        disable_dynamic: without the memory manager of newer versions (ComfyUI asks for that when it copies a model).

    Raises:
        ValueError: the file cannot be read, is no diffusion model, has nothing to quantise, or is quantised otherwise.
    """
    name = os.path.basename(path)
    if name.lower().endswith(".gguf"):
        raise ValueError(
            f"{name!r} is a GGUF file, which is quantised already; load it with ComfyUI-GGUF's Unet Loader (GGUF)"
        )
    try:
        state_dict, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    except Exception as error:
        raise ValueError(
            f"{name!r} cannot be read ({error}). An incomplete download has to be repeated"
        ) from error
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state_dict)
    state_dict = (
        comfy.utils.state_dict_prefix_replace(state_dict, {prefix: ""}, filter_keys=True)
        or state_dict
    )
    check_state_dict(name, state_dict)
    before = sum(weight.nbytes for weight in state_dict.values())
    layers = sum(
        key.endswith(f".{MARK}") or is_quantisable(key, weight)
        for key, weight in state_dict.items()
    )
    progress, done = comfy.utils.ProgressBar(max(1, layers)), 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress.update_absolute(min(done, layers), layers)
        comfy.model_management.throw_exception_if_processing_interrupted()

    dtype = weight_dtype(state_dict)
    load = comfy.sd.load_diffusion_model_state_dict
    options = {"dtype": dtype, "custom_operations": int8_operations(compute, dtype, advance)}
    known = inspect.signature(load).parameters  # older versions have fewer
    # what is not ComfyUI's own layout cannot live in the newer memory manager
    extra = {"metadata": metadata, "disable_dynamic": disable_dynamic or not has_native_layout()}
    keys = list(state_dict)
    model = load(
        state_dict,
        model_options=options,
        **{key: value for key, value in extra.items() if key in known},
    )
    if model is None:
        raise ValueError(
            f"{name!r} is no diffusion model that this ComfyUI knows; it has {len(keys)} tensors, such as "
            f"{', '.join(keys[:3])}. Text encoders, VAEs and LoRAs have loaders of their own"
        )
    if not done:
        raise ValueError(
            f"{name!r} has no linear layers in numbered blocks to quantise; use Load Diffusion Model"
        )
    if (
        getattr(model, "is_dynamic", bool)() and not has_native_layout()
    ):  # versions that do not know disable_dynamic
        model = comfy.model_patcher.ModelPatcher(
            model.model, model.load_device, model.offload_device
        )
    if hasattr(model, "cached_patcher_init"):  # by which newer versions load a model again
        model.cached_patcher_init = (load_8bit, (path, compute))
    logging.info(
        "GMFlow: %s: %d linear layers in int8, %.2f GB instead of %.2f GB; %s layout; products in %s",
        *(name, done, model.model_size() / 1e9, before / 1e9),
        "ComfyUI's" if has_native_layout() else "its own",
        product_name(compute, model.load_device),
    )
    return model


def product_name(compute: str, device: torch.device) -> str:
    """What multiplies, for the log."""
    if compute == "16 bit":
        return "16 bit or more"
    if has_native_layout():
        return "int8 by ComfyUI"
    return (
        "int8 by bitsandbytes"
        if device.type == "cuda" and bitsandbytes_product()
        else "int8 by torch"
    )


def saved_state(model: comfy.model_patcher.ModelPatcher) -> StateDict:
    """The state dict of an 8-bit model with its LoRAs, in the names that published files use.

    Raises:
        ValueError: the model is not in 8 bit, or has a GM adapter.
    """
    adapter = adapter_of(model.model_options)
    if adapter is not None:
        raise ValueError(
            f"this model has the GM adapter {adapter.name} on it, and a file of its base with the adapter's LoRA but without "
            "its head would be of no use; connect the model before GM Adapter"
        )
    model = model.clone()
    if getattr(model, "is_dynamic", bool)():
        comfy.model_management.load_models_gpu([model])
        state = model.model_state_dict_for_saving(model.model.diffusion_model, "diffusion_model.")
    else:
        comfy.model_management.unload_all_models()  # so that no other patches are in the weights
        model.patch_model(device_to=model.offload_device)
        state = dict(model.model.diffusion_model.state_dict())
        model.unpatch_model(device_to=model.offload_device)
    if not any(key.endswith(f".{MARK}") for key in state):
        raise ValueError(
            "this model is not in 8 bit; load it with Load Diffusion Model (8-bit), or save it with ModelSave as it is"
        )
    if model.model.model_config.unet_config.get("image_model") == "flux":
        # newer versions of ComfyUI call these scales weights inside, files and older versions do not
        state = {
            key.replace("_norm.weight", "_norm.scale"): weight for key, weight in state.items()
        }
    return state
