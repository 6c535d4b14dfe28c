"""Linear layers with 8-bit weights for ComfyUI.

ComfyUI builds a network from the layers of an *operations* class. The class here has a `Linear`
that rounds its weight to int8 while the state dict is loaded, one layer at a time; the arithmetic
is in `gmflow_core.quantization`. In ComfyUI 0.27 and newer, which has an int8 layout of its own,
its `Linear` keeps the weight, so that its memory manager, LoRA and saving apply; in older versions
`Int8Linear` does. Both read and write the same files, in ComfyUI's layout `int8_tensorwise`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Protocol

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.ops
import torch
from torch import Tensor, nn

from ...gmflow_core.quantization.int8 import (
    Int8Weight,
    int8_linear,
    linear,
    pack,
    quantize_rows,
    unpack,
)

FORMAT = "int8_tensorwise"  # ComfyUI's name of the layout; it may have a scale for each row
MARK = "comfy_quant"  # key of a layer's layout in a state dict: JSON as bytes
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
NOT_MERGED = (
    "8-bit weights cannot be merged into another model, and take no LoRA hooks: load LoRAs onto "
    "the model with a LoRA loader, connect the 8-bit model as model1 of a merge, or use the 16-bit "
    "file"
)
COMPUTE = {"16 bit": linear, "int8": int8_linear}
StateDict = dict[str, Tensor]


def is_block_layer(key: str) -> bool:
    """Return whether a weight belongs to a layer inside one of the network's numbered blocks.

    Layers outside of them (first, last, embeddings of time and text) are few, and errors in them
    reach everything.

    Args:
        key: its name, such as `double_blocks.0.img_attn.qkv.weight`.
    """
    *modules, _, _ = key.split(".")  # the last two are the layer itself and the parameter
    return any(name.isdigit() for name in modules) and not (
        "emb" in modules[0] or modules[0].endswith("_in")
    )


def is_quantisable(key: str, weight: Tensor) -> bool:
    """Return whether an entry of a state dict is the float matrix of a linear layer in a block."""
    return (
        key.endswith(".weight")
        and weight.ndim == 2
        and weight.dtype in FLOATS
        and is_block_layer(key)
    )


def layout(group: int) -> Tensor:
    """Return a layer's layout as a state dict holds it.

    Args:
        group: size of the rotation, 0 for none.
    """
    about = {"format": FORMAT, **({"convrot": True, "convrot_groupsize": group} if group else {})}
    return torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)


def read_layout(mark: Tensor) -> tuple[str, int]:
    """Return the format of a layer and the size of its rotation, 0 for none."""
    about = json.loads(bytes(mark.tolist()))
    about = {**(about.get("params") or {}), **about}
    group = about.get("convrot_groupsize", 256) if about.get("convrot") else 0
    return about.get("format", "unknown"), group


def has_native_layout() -> bool:
    """Return whether this ComfyUI has int8 weights with rotation.

    Version 0.27 and newer have, with the package comfy_kitchen.
    """
    try:
        from comfy.quant_ops import QUANT_ALGOS, get_layout_class

        params = get_layout_class(QUANT_ALGOS[FORMAT]["comfy_tensor_layout"]).Params
        return (
            hasattr(comfy.ops, "mixed_precision_ops")
            and "convrot_groupsize" in params.__dataclass_fields__
        )
    except (ImportError, AttributeError, KeyError):
        return False


class Progress(Protocol):
    """Callback that runs after each int8 layer is read, and keeps the names of missing weights."""

    missing: list[str]
    without_weight: list[str]

    def __call__(self) -> None:
        """Advance by one layer."""


def int8_operations(compute: str, dtype: torch.dtype, progress: Progress) -> type:
    """Return an operations class whose Linear quantises its weight to int8 on load.

    Args:
        compute: "16 bit" expands the weights for each product, "int8" rounds the activations too.
        dtype: type of all other weights.
        progress: called after each layer.
    """
    device = comfy.model_management.get_torch_device()  # rounds, chunk by chunk

    def quantise(state_dict: StateDict, prefix: str, missing: list[str]) -> None:
        """Replace a quantisable weight in a state dict by int8 values, scales and layout."""
        key, mark = f"{prefix}weight", f"{prefix}{MARK}"
        progress.missing = missing  # torch fills one list for the whole network
        if key not in state_dict:
            progress.without_weight.append(key)
        if mark in state_dict:
            progress()
        elif key in state_dict and is_quantisable(key, state_dict[key]):
            try:
                weight = quantize_rows(state_dict[key], device=device)
            except ValueError as error:
                raise ValueError(
                    f"the weight {key!r} cannot be quantised: {error}; the file is damaged"
                ) from None
            state_dict.update(
                {key: weight.values, f"{key}_scale": weight.scale, mark: layout(weight.group)}
            )
            progress()

    if has_native_layout():
        return native_operations(compute, dtype, quantise)

    linear_class = type(
        "Linear",
        (Int8Linear,),
        {"product": staticmethod(COMPUTE[compute]), "quantise": staticmethod(quantise)},
    )
    return type("Operations", (comfy.ops.manual_cast,), {"Linear": linear_class})


def check_shape(layer: nn.Module, state_dict: StateDict, prefix: str) -> None:
    """Check that a layer's weight in its state dict has the layer's shape.

    Raises:
        ValueError: it has another; or a layer in a block has no weight.
    """
    key, expected = f"{prefix}weight", (layer.out_features, layer.in_features)
    found = tuple(state_dict[key].shape) if key in state_dict else "none"
    if found != expected and (key in state_dict or is_block_layer(key)):
        raise ValueError(
            f"the weight {key!r} does not fit: expected {expected}, found {found}; the file is "
            "damaged"
        )


def native_operations(
    compute: str, dtype: torch.dtype, quantise: Callable[[StateDict, str, list[str]], None]
) -> type:
    """Return ComfyUI's own operations for quantised layers, loading what `quantise` has rounded."""
    from comfy.quant_ops import QuantizedTensor

    native = comfy.ops.mixed_precision_ops({"mixed_ops": True}, dtype)

    class Operations(native):
        class Linear(native.Linear):
            @property
            def weight_scale(self) -> Tensor:
                """ComfyUI asks for it when it merges models, or applies LoRA hooks."""
                raise ValueError(NOT_MERGED)

            def _load_from_state_dict(
                self, state_dict: StateDict, prefix: str, metadata, strict, missing, *args
            ) -> None:
                quantise(state_dict, prefix, missing)
                check_shape(self, state_dict, prefix)
                super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *args)

            def _forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                if compute == "int8" or not isinstance(weight, QuantizedTensor):
                    return super()._forward(x, weight, bias)
                about = weight._params
                group = about.convrot_groupsize if about.convrot else 0
                int8 = Int8Weight(weight._qdata, about.scale.reshape(-1, 1), group)
                return linear(x, int8, bias)

            def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
                # a weight of inference mode would be copied, and be none afterwards
                inside = self.weight is not None and self.weight.is_inference()
                with torch.inference_mode(inside or torch.is_inference_mode_enabled()):
                    return super()._apply(fn, recurse)

    return Operations


class Int8Linear(nn.Module, comfy.ops.CastWeightBiasOp):
    """A linear layer whose weight is int8 if its state dict says so.

    `weight` is one tensor with values and scales (`pack`), so that ComfyUI, which backs up, moves,
    pins and restores a layer's `weight`, keeps both. `group` is the size of the rotation; it is
    None for a layer that is not quantised.
    """

    comfy_cast_weights = True  # tells ComfyUI that the layer moves its weights itself
    product = staticmethod(linear)

    @property
    def weight_scale(self) -> Tensor:
        """ComfyUI asks for it when it merges models, or applies LoRA hooks."""
        raise ValueError(NOT_MERGED)

    @staticmethod
    def quantise(state_dict: StateDict, prefix: str, missing: list[str]) -> None:
        """Round the weight in a state dict before it is loaded; `int8_operations` sets it."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.group: int | None = None
        # empty until it is loaded
        self.weight = nn.Parameter(torch.empty(0, device=device, dtype=dtype), requires_grad=False)
        values = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if values is None else nn.Parameter(values, requires_grad=False)

    def _load_from_state_dict(
        self,
        state_dict: StateDict,
        prefix: str,
        local_metadata,
        strict,
        missing,
        unexpected,
        errors,
    ):
        self.quantise(state_dict, prefix, missing)
        check_shape(self, state_dict, prefix)
        key = f"{prefix}weight"
        weight, scale, mark = (
            state_dict.pop(f"{prefix}{name}", None) for name in ("weight", "weight_scale", MARK)
        )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected, errors
        )
        if weight is None:
            return
        missing.remove(key)
        if mark is not None:
            self.group = read_layout(mark)[1]
            new = pack(Int8Weight(weight, scale.float().reshape(-1, 1), self.group))
        else:
            new = weight.to(self.weight.dtype, copy=True)
        self.weight = nn.Parameter(new, requires_grad=False)

    def _save_to_state_dict(self, destination: StateDict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.group is not None:
            weight = unpack(self.weight.detach(), self.out_features, self.group)
            destination.update(
                {f"{prefix}weight": weight.values, f"{prefix}weight_scale": weight.scale}
            )
            destination[f"{prefix}{MARK}"] = layout(self.group)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with the weight, to which LoRA on offloaded layers is added first."""
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
        """Return the float weight that ComfyUI adds LoRA to.

        Args:
            weight: `self.weight`, or a copy of it of any type.
        """
        if self.group is None:
            return weight
        return unpack(weight, self.out_features, self.group).dequantize()

    def set_weight(
        self,
        weight: Tensor,
        inplace_update: bool = False,
        seed=None,
        return_weight: bool = False,
        **kwargs,
    ):
        """Take a float weight with LoRA, and round it stochastically.

        Rounding to the nearest value would lose changes smaller than a step.
        """
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
    """Apply one of ComfyUI's weight functions to a weight.

    For LoRA on offloaded layers the function holds patches. They are applied here, as older
    versions of the function would also call `convert_weight` and `set_weight`, and round the
    result.
    """
    patches = getattr(function, "patches", None)
    if patches is None:
        return function(weight)
    return comfy.lora.calculate_weight(
        patches[function.key], weight, function.key, intermediate_dtype=weight.dtype
    )
