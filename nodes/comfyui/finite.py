"""Refuse inputs of a sampling that are not finite, and say why a result is not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...gmflow_core.files.errors import quoted, reason
from ...gmflow_core.files.safetensors_files import count_not_finite, is_finite
from .notices import notice

TENSORS = ("cross_attn", "pooled_output")  # of a conditioning; masks may hold infinities
HIGHEST_CFG = 30.0  # guidance scale above which an overflow is likely its fault
NAMES = {
    "noise": "the noise",
    "latent_image": "the latent that is sampled",
    "mask": "the noise mask",
    "sigmas": "the list of sigmas",
}


def check_inputs(guider, **tensors: Tensor | None) -> None:
    """Check that what a sampler is given is finite: noise, latent_image, mask, sigmas, and texts.

    Raises:
        ValueError: one is not; the message names it.
    """
    found = {NAMES[name]: tensor for name, tensor in tensors.items() if tensor is not None}
    for kind, conds in (getattr(guider, "conds", None) or {}).items():
        for cond in conds or []:
            for key in TENSORS:
                if isinstance(cond.get(key), Tensor):
                    found[f"the {kind} conditioning ({key})"] = cond[key]
    for name, tensor in found.items():
        if not is_finite(tensor):
            raise ValueError(
                f"not finite: {name} holds {count(tensor)}, and with them every picture would be "
                f"black; look for the node that makes them{_maker_of(name)}"
            )


def _maker_of(name: str) -> str:
    """Return the node that likely makes an input, for a message; "" if none is likelier."""
    if name == NAMES["latent_image"]:
        return " (a VAE in fp16 may overflow)"
    return " (a text encoder in fp16 may overflow)" if "conditioning" in name else ""


def count(tensor: Tensor) -> str:
    """Return how many numbers of a tensor are not finite, for a message."""
    bad = count_not_finite(tensor)
    return f"{bad} of {tensor.numel()} numbers that are not finite (NaN or infinity)"


def report_result(samples: object, guider) -> None:
    """Show on the node that runs that a result is not finite, and the likely cause.

    The check waits for the device, so it is made once, at the end.
    """
    if isinstance(samples, Tensor) and not is_finite(samples):
        try:
            cause = likely_cause(guider)
        except Exception as error:  # weights of another extension's kind; the result must not go
            cause = f"look for the cause in the nodes before (its weights: {reason(error)})"
        notice(f"the result is not finite: {cause} (found {count(samples)})")


def likely_cause(guider) -> str:
    """Return why a sampling with this guider gave numbers that are not finite."""
    patcher = guider.model_patcher
    model, cause = patcher.model, _bad_weight(patcher)
    if cause:
        return cause
    scale = getattr(guider, "cfg", None)
    scale = getattr(guider, "scale", scale)
    if isinstance(scale, int | float) and not abs(scale) <= HIGHEST_CFG:
        return f"the guidance scale {scale:g} is likely too large; lower it"
    if torch.float16 in (model.get_dtype(), getattr(model, "manual_cast_dtype", None)):
        return "likely fp16 overflowed; load the model in bf16 or fp32"
    return (
        "weights, conditioning and latent are finite, so the network or a node around it "
        "overflowed or divided by 0 (PerpNeg does, if its conditionings are equal); remove "
        "guiders, patches and LoRAs one by one, or load the model in fp32"
    )


def _bad_weight(patcher) -> str:
    """Name a weight or a LoRA that is not finite; "" if there is none."""
    for key, patches in getattr(patcher, "patches", {}).items():
        if not all(is_finite(tensor) for tensor in _tensors(patches)) or any(
            isinstance(strength, float) and strength != strength for strength, *_ in patches
        ):
            return f"a LoRA on the model is not finite at {quoted(key)}; remove or replace it"
    heads = [getattr(patch, "head", None) for patch in patcher.object_patches.values()]
    for head in heads:
        for name, weight in head.named_parameters() if isinstance(head, nn.Module) else ():
            if not is_finite(weight):
                return (
                    f"{quoted(name)} in the head of the GM adapter holds {count(weight)}; download "
                    "the adapter again"
                )
    for name, weight in patcher.model.diffusion_model.named_parameters():
        plain = weight.dequantize() if hasattr(weight, "_qdata") else weight
        if not is_finite(plain):
            return (
                f"the model's weight {quoted(name)} holds {count(plain)}; the file is damaged: "
                "download it again, or go back to an earlier checkpoint"
            )
    return ""


def _tensors(value: object, depth: int = 4):
    """Yield the tensors in a patch of ComfyUI's: nested lists, tuples, and objects with weights."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each, depth - 1)
    elif depth and hasattr(value, "weights"):
        yield from _tensors(value.weights, depth - 1)
