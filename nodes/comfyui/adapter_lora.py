"""Put the LoRA part of a GM adapter on a base model, through ComfyUI's own LoRA code."""

from __future__ import annotations

import re

import comfy.lora
import comfy.sd
from torch import Tensor

from ...gmflow_core.files.adapter_file import lora_pairs
from ...gmflow_core.models.state_dict import check_shapes
from .bases import BASES, Base
from .notices import notice


def with_lora(model, base: Base, lora: dict[str, Tensor], strength: float, name: str):
    """Return a clone of a MODEL with the LoRA of an adapter on it.

    Args:
        lora: pairs <module>.lora_A.weight (rank, in) and <module>.lora_B.weight (out, rank),
            the modules in the names of diffusers.
        name: the file's name in messages.

    Raises:
        ValueError: keys form no pairs, or pairs do not fit the model; the message names them.
    """
    if not lora:
        notice(
            f"no LoRA in {name}, which holds a head alone: it fits only a base model that was "
            "trained with it; use the adapter's file as it was published"
        )
        return model
    pairs = lora_pairs(lora, name)
    places = comfy.lora.model_lora_keys_unet(model.model, {})
    renamed, expected = {}, {}
    for module, (down, up) in pairs.items():
        known = base.renamed.get(module, module)
        targets = (prefix + known for prefix in ("transformer.", "", "diffusion_model."))
        target = next((target for target in targets if target in places), None)
        if target is not None:
            expected[module] = _shape_at(model, places[target])
            renamed.update({f"{target}.lora_A.weight": down, f"{target}.lora_B.weight": up})
    products = {module: (up.shape[0], down.shape[1]) for module, (down, up) in pairs.items()}
    advice = _advice(pairs, base)
    check_shapes(expected, products, f"this {base.name} model", source=name, advice=advice)
    return comfy.sd.load_lora_for_models(model, None, renamed, strength, 0)[0]


def _advice(modules: dict, base: Base) -> str:
    """Return what to do with LoRA modules that do not fit a base."""
    for other in BASES:
        if other is not base and any(re.search(other.mark, module) for module in modules):
            return f"it looks like an adapter for {other.name}"
    return "the file is damaged, or made for another base model"


def _shape_at(model, place: str | tuple) -> tuple[int, ...]:
    """Return the shape of the matrix, or of the slice of it, that a LoRA key leads to.

    It is read from the layer, as quantised weights may be packed.
    """
    key, offset = place[:2] if isinstance(place, tuple) else (place, None)
    layer = model.get_model_object(key.removesuffix(".weight"))
    if hasattr(layer, "in_features"):
        shape = [layer.out_features, layer.in_features]
    else:
        shape = list(layer.weight.shape)
    if offset is not None:
        dim, start, length = offset
        shape[dim] = min(length, max(0, shape[dim] - start))
    return tuple(shape)
