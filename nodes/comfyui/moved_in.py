"""Open workflows that were made for ComfyUI-piFlow, where that extension is not installed.

ComfyUI offers to replace nodes that it does not know; the entries here say by which of ours, and
which value goes where. They have no effect on nodes that ComfyUI knows, so that they may stay when
ComfyUI-piFlow is loaded after this extension. Ids, inputs and the order of its widgets were read in
versions 1.0.5 and 1.3.2.
"""

from __future__ import annotations

import importlib
from typing import Any

from comfy_api.latest import io

from .graph import running_server
from .sample_latent import sample_latent

LEAST = 1e-6  # of a temperature or a step: 0 is a limit that is not computed itself
CONTROL = "control_after_generate"  # the page keeps its widget behind that of a seed
LOADER = {
    "model_name": "model_name",
    "weight_dtype": "weight_dtype",
    "adapter_name": "adapter_name",
    "adapter_strength": "strength",
}
GGUF_WIDGETS = (
    *("model_name", "dequant_dtype", "patch_dtype", "patch_on_device"),
    *("adapter_name", "adapter_strength"),
)
SAMPLER = {
    "seed": "seed",
    "steps": "steps",
    "substeps": "substeps",
    "final_step_size_scale": "final_step_size",
    "diffusion_coefficient": "stochasticity",
    "gm_temperature": "gm_temperature",
    "manual_gm_temperature": "temperature",
    "denoise": "denoise",
}
# node of ComfyUI-piFlow: node here, widgets there in their order, inputs there and here, and values
# of inputs that have none there. The shift of its ModelSamplingPiFlow is that of a stock node.
REPLACEMENTS: dict[str, tuple[str, list[str], dict[str, str], dict[str, Any]]] = {
    "Load pi-Flow Model": ("GMFlowAdaptedModel", list(LOADER), LOADER, {}),
    "Load pi-Flow Model (GGUF)": (
        "GMFlowAdaptedModel",
        list(GGUF_WIDGETS),
        {name: LOADER[name] for name in GGUF_WIDGETS if name in LOADER},
        {"weight_dtype": "default"},
    ),
    "ModelSamplingPiFlow": (
        "ModelSamplingAuraFlow",
        ["shift"],
        {"model": "model", "shift": "shift"},
        {},
    ),
    "pi-Flow Sampler": (
        "GMFlowPiFlowSampler",
        ["seed", CONTROL, *list(SAMPLER)[1:]],
        {
            "model": "model",
            "conditioning": "positive",
            "latent_image": "latent_image",
            **SAMPLER,
        },
        {},
    ),
}


async def register_replacements() -> None:
    """Register the replacements, where ComfyUI has them and does not know the nodes itself.

    Without a server, as in a script that imports ComfyUI's nodes, there is no place for them.
    """
    replace = getattr(io, "NodeReplace", None)
    if replace is None or running_server() is None:
        return
    api = importlib.import_module("comfy_api.latest").ComfyAPI()
    known = importlib.import_module("nodes").NODE_CLASS_MAPPINGS
    for old, (new, widgets, inputs, values) in REPLACEMENTS.items():
        if old in known:
            continue
        mapped = [{"new_id": ours, "old_id": theirs} for theirs, ours in inputs.items()]
        mapped += [{"new_id": name, "set_value": value} for name, value in values.items()]
        await api.node_replacement.register(
            replace(new, old, widgets, mapped, [{"new_idx": 0, "old_idx": 0}])
        )


def sample_as_piflow(
    model,
    positive: list,
    latent: dict,
    *,
    gm_temperature: str,
    temperature: float,
    final_step_size: float,
    **settings,
) -> dict:
    """Return a LATENT sampled with the settings of ComfyUI-piFlow's sampler.

    Args:
        gm_temperature: "auto" or "manual".
        temperature: of the mixture, for "manual".
        settings: further arguments of `sample_latent`.

    Raises:
        ValueError: the settings do not fit the model.
    """
    return sample_latent(
        model,
        latent,
        solver="gm-policy",
        positive=positive,
        temperature=None if gm_temperature == "auto" else max(temperature, LEAST),
        final_step_size=max(final_step_size, LEAST),
        **settings,
    )
