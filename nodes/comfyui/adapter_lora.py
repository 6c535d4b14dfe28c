"""Put the LoRA part of a GM adapter on a base model, through ComfyUI's own LoRA code."""

from __future__ import annotations

import re

import comfy.lora
import comfy.sd
from torch import Tensor

from .bases import BASES, Base
from .notices import notice


def with_lora(model, base: Base, lora: dict[str, Tensor], strength: float, name: str):
    """Return a clone of a MODEL with the LoRA of an adapter on it.

    Args:
        lora: pairs <module>.lora_A.weight (rank, in) and <module>.lora_B.weight (out, rank),
            the modules in the names of diffusers.
        name: the file's name in messages.

    Raises:
        ValueError: a part does not fit the model; the message names the keys.
    """
    if not lora:
        notice(
            f"{name} holds a head but no LoRA; it fits only a base model that was trained with it"
        )
        return model
    pairs = lora_pairs(lora, name)
    places = comfy.lora.model_lora_keys_unet(model.model, {})
    renamed, wrong = {}, []
    for module, (down, up) in pairs.items():
        known = base.renamed.get(module, module)
        targets = (prefix + known for prefix in ("transformer.", "", "diffusion_model."))
        target = next((target for target in targets if target in places), None)
        if target is None:
            wrong.append(f"{module}: not in this model")
            continue
        shape = _shape_at(model, places[target])
        if shape != (up.shape[0], down.shape[1]) or up.shape[1] != down.shape[0]:
            found = f"{tuple(up.shape)} times {tuple(down.shape)}"
            wrong.append(f"{module}: {found} on a weight of {shape}")
            continue
        renamed.update({f"{target}.lora_A.weight": down, f"{target}.lora_B.weight": up})
    if wrong:
        raise ValueError(
            f"{name} does not fit this {base.name} model{_likely_base(pairs, base)}. {len(wrong)} "
            f"of its {len(pairs)} LoRA modules do not apply: {'; '.join(wrong[:8])}"
        )
    return comfy.sd.load_lora_for_models(model, None, renamed, strength, 0)[0]


def lora_pairs(lora: dict[str, Tensor], name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the matrices A (rank, in) and B (out, rank) of every module.

    Raises:
        ValueError: a key is no half of a whole pair.
    """
    modules: dict[str, dict[str, str]] = {}
    for key in lora:
        module, _, side = key.rpartition(".lora_")
        modules.setdefault(module, {})[side] = key
    halves = {"A.weight", "B.weight"}
    odd = [key for sides in modules.values() if set(sides) != halves for key in sides.values()]
    if odd:
        raise ValueError(
            f"{name}: {len(odd)} keys are neither a head nor a whole pair <module>.lora_A.weight "
            f"and .lora_B.weight: {', '.join(sorted(odd)[:8])}; the file is damaged, or in another "
            "layout than the published adapters"
        )
    return {
        module: (lora[sides["A.weight"]], lora[sides["B.weight"]])
        for module, sides in modules.items()
    }


def _likely_base(modules: dict, base: Base) -> str:
    """Return a remark on the other base whose adapters have such modules, "" if there is none."""
    for other in BASES:
        if other is not base and any(re.search(other.mark, module) for module in modules):
            return f": it looks like an adapter for {other.name}"
    return ""


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
