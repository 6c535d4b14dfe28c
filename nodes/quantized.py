"""Nodes that load a 16-bit diffusion model in 8 bit, and save it.

ComfyUI builds a network out of the layers of an *operations* class. The class handed over here has a `Linear` that rounds
its weight to int8 while the state dict is being loaded, one layer at a time (`gmflow_core.quantize` has the arithmetic).
Where ComfyUI has an int8 layout of its own (0.27 and newer), its `Linear` keeps the weight, so its memory manager, LoRA and
saving are ComfyUI's own; elsewhere `Int8Linear` does. Both read and write the same files, ComfyUI's `int8_tensorwise`.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Callable

import comfy.float
import comfy.lora
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from safetensors.torch import save_file
from torch import Tensor, nn

from ..gmflow_core.quantize import (
    Int8Weight,
    bitsandbytes_product,
    int8_linear,
    linear,
    pack,
    quantize_rows,
    unpack,
)
from .seam import adapter_of

FOLDER = "diffusion_models"
FORMAT = "int8_tensorwise"  # ComfyUI's name of the layout; its scales may be one a row
MARK = "comfy_quant"  # key of a layer's layout in a state dict, as JSON in bytes
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
COMPUTE = {"16 bit": linear, "int8": int8_linear}
OTHERS = {  # parts of key names that tell other kinds of quantised files
    "scaled_fp8": "scaled fp8",
    "scale_weight": "scaled fp8",
    "quant_state.bitsandbytes": "bitsandbytes 4 bit",
    ".absmax": "bitsandbytes 4 bit",
    ".SCB": "bitsandbytes int8",
    ".qweight": "GPTQ, AWQ or SVDQuant",
    ".wscales": "SVDQuant",
}

StateDict = dict[str, Tensor]


def is_block_layer(key: str) -> bool:
    """Whether `key`, such as `double_blocks.0.img_attn.qkv.weight`, is of a layer inside one of the network's numbered
    blocks. The layers outside (first, last, embeddings of time and text) are few, and errors in them reach everything."""
    *modules, _, _ = key.split(".")  # the last two: the layer itself and the parameter
    return any(name.isdigit() for name in modules) and not ("emb" in modules[0] or modules[0].endswith("_in"))


def is_quantisable(key: str, weight: Tensor) -> bool:
    """Whether this entry of a state dict becomes int8: the matrix of a linear layer in a block."""
    return key.endswith(".weight") and weight.ndim == 2 and weight.dtype in FLOATS and is_block_layer(key)


def layout(group: int) -> Tensor:
    """The layout of a layer, as a state dict holds it."""
    about = {"format": FORMAT, **({"convrot": True, "convrot_groupsize": group} if group else {})}
    return torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)


def read_layout(mark: Tensor) -> tuple[str, int]:
    """Format and size of the rotation (0: none) of a layer."""
    about = json.loads(bytes(mark.tolist()))
    about = {**(about.get("params") or {}), **about}
    return about.get("format", "unknown"), about.get("convrot_groupsize", 256) if about.get("convrot") else 0


# --- operations


def has_native_layout() -> bool:
    """Whether this ComfyUI has int8 weights with rotation: 0.27 and newer, with its package comfy_kitchen."""
    try:
        from comfy.quant_ops import QUANT_ALGOS, get_layout_class

        params = get_layout_class(QUANT_ALGOS[FORMAT]["comfy_tensor_layout"]).Params
        return hasattr(comfy.ops, "mixed_precision_ops") and "convrot_groupsize" in params.__dataclass_fields__
    except (ImportError, AttributeError, KeyError):
        return False


def int8_operations(compute: str, dtype: torch.dtype, advance: Callable[[], None]) -> type:
    """The operations class whose linear layers round themselves to int8 as they are loaded.

    Args:
        compute: "16 bit" expands the weights for each product, "int8" rounds the activations too.
        dtype: type of all other weights.
        advance: called after each layer.
    """
    device = comfy.model_management.get_torch_device()  # that rounds; a layer goes there and back in chunks

    def quantise(state_dict: StateDict, prefix: str) -> None:
        """Replace a layer's weight in its state dict by int8 values, scales and layout, if it is to be quantised."""
        key, mark = f"{prefix}weight", f"{prefix}{MARK}"
        if mark in state_dict:
            advance()
        elif key in state_dict and is_quantisable(key, state_dict[key]):
            try:
                weight = quantize_rows(state_dict[key], device=device)
            except ValueError as error:
                raise ValueError(f"the weight {key!r} cannot be quantised: {error}; the file is damaged") from None
            state_dict.update({key: weight.values, f"{key}_scale": weight.scale, mark: layout(weight.group)})
            advance()

    if has_native_layout():
        return native_operations(compute, dtype, quantise)

    linear_class = type(
        "Linear", (Int8Linear,), {"product": staticmethod(COMPUTE[compute]), "quantise": staticmethod(quantise)}
    )
    return type("Operations", (comfy.ops.manual_cast,), {"Linear": linear_class})


def check_shape(layer: nn.Module, state_dict: StateDict, prefix: str) -> None:
    """
    Raises:
        ValueError: a layer in a block has no weight in its state dict, or one of another shape.
    """
    key, expected = f"{prefix}weight", (layer.out_features, layer.in_features)
    found = tuple(state_dict[key].shape) if key in state_dict else "none"
    if found != expected and (key in state_dict or is_block_layer(key)):
        raise ValueError(f"the weight {key!r} does not fit: expected {expected}, found {found}; the file is damaged")


def native_operations(compute: str, dtype: torch.dtype, quantise: Callable[[StateDict, str], None]) -> type:
    """ComfyUI's own operations for quantised layers, which are given a state dict that `quantise` has gone over."""
    from comfy.quant_ops import QuantizedTensor

    native = comfy.ops.mixed_precision_ops({"mixed_ops": True}, dtype)

    class Operations(native):
        class Linear(native.Linear):
            def _load_from_state_dict(self, state_dict: StateDict, prefix: str, *args) -> None:
                quantise(state_dict, prefix)
                check_shape(self, state_dict, prefix)
                super()._load_from_state_dict(state_dict, prefix, *args)

            def _forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                if compute == "int8" or not isinstance(weight, QuantizedTensor):
                    return super()._forward(x, weight, bias)
                about = weight._params
                scale = about.scale.reshape(-1, 1)
                return linear(x, Int8Weight(weight._qdata, scale, about.convrot_groupsize if about.convrot else 0), bias)

    return Operations


class Int8Linear(nn.Module, comfy.ops.CastWeightBiasOp):
    """A linear layer whose weight is int8 if its state dict says so.

    `weight` is one tensor with values and scales (`pack`), so that ComfyUI, which backs up, moves, pins and restores a
    layer's `weight`, keeps both. `group` is the size of the rotation, None for a layer that is not quantised.
    """

    comfy_cast_weights = True  # moves its weights to the input's device by itself
    product = staticmethod(linear)

    @staticmethod
    def quantise(state_dict: StateDict, prefix: str) -> None:
        """What is done with the state dict before it is loaded."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.group: int | None = None
        self.weight = nn.Parameter(torch.empty(0, device=device, dtype=dtype), requires_grad=False)  # until it is loaded
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), requires_grad=False) if bias else None

    def _load_from_state_dict(self, state_dict: StateDict, prefix: str, local_metadata, strict, missing, unexpected, errors):
        self.quantise(state_dict, prefix)
        check_shape(self, state_dict, prefix)
        key = f"{prefix}weight"
        weight, scale, mark = (state_dict.pop(f"{prefix}{name}", None) for name in ("weight", "weight_scale", MARK))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if weight is None:
            return
        missing.remove(key)
        if mark is not None:
            self.group = read_layout(mark)[1]
            self.weight = nn.Parameter(pack(Int8Weight(weight, scale.float().reshape(-1, 1), self.group)), requires_grad=False)
        else:
            self.weight = nn.Parameter(weight.to(self.weight.dtype, copy=True), requires_grad=False)

    def _save_to_state_dict(self, destination: StateDict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.group is not None:
            weight = unpack(self.weight.detach(), self.out_features, self.group)
            destination.update({f"{prefix}weight": weight.values, f"{prefix}weight_scale": weight.scale})
            destination[f"{prefix}{MARK}"] = layout(self.group)

    def forward(self, x: Tensor) -> Tensor:
        move = comfy.model_management.cast_to
        bias = None if self.bias is None else move(self.bias, x.dtype, x.device)
        for function in self.bias_function:
            bias = _patched(bias, function)
        weight = move(self.weight, x.dtype if self.group is None else None, x.device)
        if self.group is not None:
            int8 = unpack(weight, self.out_features, self.group)
            if not self.weight_function:
                return self.product(x, int8, bias)
            weight = int8.dequantize(x.dtype)
        for function in self.weight_function:
            weight = _patched(weight, function)
        return nn.functional.linear(x, weight, bias)

    def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs) -> Tensor:
        """The weight that ComfyUI computes LoRA on, from `self.weight` or a copy of it, of whatever type."""
        return weight if self.group is None else unpack(weight, self.out_features, self.group).dequantize()

    def set_weight(self, weight: Tensor, inplace_update: bool = False, seed=None, return_weight: bool = False, **kwargs):
        """Take a weight with LoRA, rounded stochastically: rounding to the nearest would lose what is below a step."""
        if self.group is None:
            new = comfy.float.stochastic_rounding(weight, self.weight.dtype, seed=seed or 0)
        else:
            new = pack(quantize_rows(weight, self.group, seed=seed or 0))
        if return_weight:
            return new
        if inplace_update:
            self.weight.data.copy_(new)
        else:
            self.weight = nn.Parameter(new, requires_grad=False)
        return None


def _patched(weight: Tensor, function: Callable) -> Tensor:
    """A weight after one of ComfyUI's weight functions. For LoRA on offloaded layers these hold patches; older versions
    of them would call `convert_weight` and `set_weight` as well, and round the result."""
    patches = getattr(function, "patches", None)
    if patches is None:
        return function(weight)
    return comfy.lora.calculate_weight(patches[function.key], weight, function.key, intermediate_dtype=weight.dtype)


# --- loading and saving


def check_state_dict(name: str, state_dict: StateDict) -> None:
    """Refuse what is quantised already in another way.

    Raises:
        ValueError: says what was found, and which node to use.
    """
    formats = {read_layout(mark)[0] for key, mark in state_dict.items() if key.endswith(f".{MARK}")} - {FORMAT}
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
    plain = {key: w for key, w in state_dict.items() if w.dtype in FLOATS and not key.endswith("_scale")}
    stored = comfy.utils.weight_dtype(plain)
    config = comfy.model_detection.model_config_from_unet(state_dict, "")
    able = [dtype for dtype in (config.supported_inference_dtypes if config else FLOATS) if dtype != torch.float32]
    return stored if stored in able or not able else able[0]


def load_8bit(path: str, compute: str = "16 bit", disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
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
        raise ValueError(f"{name!r} is a GGUF file, which is quantised already; load it with ComfyUI-GGUF's Unet Loader (GGUF)")
    try:
        state_dict, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    except Exception as error:
        raise ValueError(f"{name!r} cannot be read ({error}). An incomplete download has to be repeated") from error
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state_dict)
    state_dict = comfy.utils.state_dict_prefix_replace(state_dict, {prefix: ""}, filter_keys=True) or state_dict
    check_state_dict(name, state_dict)
    before = sum(weight.nbytes for weight in state_dict.values())
    layers = sum(key.endswith(f".{MARK}") or is_quantisable(key, weight) for key, weight in state_dict.items())
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
    model = load(state_dict, model_options=options, **{key: value for key, value in extra.items() if key in known})
    if model is None:
        raise ValueError(
            f"{name!r} is no diffusion model that this ComfyUI knows; it has {len(keys)} tensors, such as "
            f"{', '.join(keys[:3])}. Text encoders, VAEs and LoRAs have loaders of their own"
        )
    if not done:
        raise ValueError(f"{name!r} has no linear layers in numbered blocks to quantise; use Load Diffusion Model")
    if getattr(model, "is_dynamic", bool)() and not has_native_layout():  # versions that do not know disable_dynamic
        model = comfy.model_patcher.ModelPatcher(model.model, model.load_device, model.offload_device)
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
    return "int8 by bitsandbytes" if device.type == "cuda" and bitsandbytes_product() else "int8 by torch"


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
        state = {key.replace("_norm.weight", "_norm.scale"): weight for key, weight in state.items()}
    return state


class GMFlowLoadDiffusionModel8bit(io.ComfyNode):
    """A diffusion model with int8 weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GMFlowLoadDiffusionModel8bit",
            display_name="Load Diffusion Model (8-bit)",
            category="GMFlow",
            description="Loads the bf16 or fp16 file of a diffusion model (FLUX.1, Qwen-Image, and other transformers) with "
            "half the memory: the linear layers of its blocks are rounded to int8, one by one, as the file is read. The "
            "MODEL is an ordinary one: LoRA, samplers and offloading work as with Load Diffusion Model.",
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="The bf16 or fp16 file, from models/diffusion_models; or one saved by Save Diffusion Model "
                    "(8-bit). fp8 and GGUF files are quantised already and have loaders of their own.",
                ),
                io.Combo.Input(
                    "compute",
                    options=list(COMPUTE),
                    default="16 bit",
                    optional=True,
                    tooltip="16 bit: weights are expanded layer by layer, activations stay as they are; the most precise. "
                    "int8: activations are rounded to int8 as well; faster where the device has fast int8 arithmetic, "
                    "and the error is about 1.2 times as large, still well below that of fp8 weights.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="An ordinary MODEL with int8 weights.")],
        )

    @classmethod
    def validate_inputs(cls, unet_name: str | None = None) -> bool | str:
        """The file must exist; older versions of ComfyUI do not look. A name that comes over a wire is not known yet."""
        if unet_name is None or folder_paths.get_full_path(FOLDER, unet_name):
            return True
        return f"there is no file {unet_name!r} in {folder_paths.get_folder_paths(FOLDER)}; put it there and press R"

    @classmethod
    def fingerprint_inputs(cls, unet_name: str | None, compute: str = "16 bit") -> list:
        """A file that was replaced is loaded again."""
        if unet_name is None:
            return []
        stat = os.stat(folder_paths.get_full_path_or_raise(FOLDER, unet_name))
        return [unet_name, compute, stat.st_mtime, stat.st_size]

    @classmethod
    def execute(cls, unet_name: str, compute: str = "16 bit") -> io.NodeOutput:
        return io.NodeOutput(load_8bit(folder_paths.get_full_path_or_raise(FOLDER, unet_name), compute))


class GMFlowSaveDiffusionModel8bit(io.ComfyNode):
    """An 8-bit diffusion model as a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GMFlowSaveDiffusionModel8bit",
            display_name="Save Diffusion Model (8-bit)",
            category="GMFlow",
            description="Saves a model loaded by Load Diffusion Model (8-bit), with the LoRAs that are on it, in ComfyUI's "
            "int8 layout. Load Diffusion Model (8-bit) reads it in any version; ComfyUI 0.27 and newer also with Load "
            "Diffusion Model.",
            inputs=[
                io.Model.Input("model", tooltip="A model in 8 bit, from before GM Adapter."),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/ComfyUI_int8",
                    tooltip="Below ComfyUI's output folder; files in its subfolder diffusion_models appear in the loaders.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: comfy.model_patcher.ModelPatcher, filename_prefix: str) -> io.NodeOutput:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, folder_paths.get_output_directory())
        path = os.path.join(folder, f"{name}_{counter:05}_.safetensors")
        state = {key: weight.contiguous() for key, weight in saved_state(model).items()}
        save_file(state, path, metadata={"format": "pt"})
        logging.info("GMFlow: saved %s, %.2f GB", path, os.path.getsize(path) / 1e9)
        return io.NodeOutput(ui={"text": [path]})
