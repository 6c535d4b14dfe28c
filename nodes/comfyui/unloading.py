"""Let models with ComfyUI's int8 weights be unloaded between two prompts.

ComfyUI runs prompts in torch's inference mode, and unloads for `POST /free` outside of it. The
quantised weights become ordinary tensors there, of which torch makes no parameter in inference
mode: in ComfyUI 0.33 the next load ends with "Cannot set version_counter for inference tensor", and
so does every later one. Here such weights are kept as tensors of inference mode.
"""

from __future__ import annotations

import torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor, nn

KEY = "gmflow_unloading"  # of our callback


def keep_loadable(model) -> None:
    """Let a MODEL, and its clones, be loaded again after ComfyUI has unloaded it."""
    model.remove_callbacks_with_key(CallbacksMP.ON_DETACH, KEY)
    model.add_callback_with_key(CallbacksMP.ON_DETACH, KEY, make_loadable)


def make_loadable(model, *arguments) -> None:
    """Make the quantised weights of a MODEL tensors of inference mode; no numbers are copied.

    ComfyUI calls it after it has unloaded the model. Models of its dynamic memory manager are left
    alone: it moves no parameters.
    """
    if getattr(model, "is_dynamic", bool)():
        return
    with torch.inference_mode():
        for module in model.model.modules():
            for name, weight in module._parameters.items():
                if is_quantised(weight) and not weight.is_inference():
                    weight = type(weight)(weight._qdata, weight._layout_cls, weight._params)
                    module._parameters[name] = nn.Parameter(weight, requires_grad=False)


def is_quantised(weight: object) -> bool:
    """Return whether a weight is one of ComfyUI's quantised tensors."""
    parts = ("_qdata", "_layout_cls", "_params")  # as the versions with the int8 layout name them
    return isinstance(weight, Tensor) and all(hasattr(weight, part) for part in parts)
