"""GM adapters: a LoRA and a head that make a mixture model of a base model, whatever loader that comes from."""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass, field

import comfy.lora
import comfy.sd
import comfy.utils
import folder_paths
from comfy_api.latest import io
from torch import Tensor

from ..gmflow_core.models.heads import GMHead, HeadLayout, build_head, is_head_key
from ..gmflow_core.solvers import FINAL_STEP_SIZE
from .notices import notice
from .seam import Adapter, ShiftedFlow, adapter_of, with_head

FOLDER = "loras"
SHIFT = 3.2  # the time shift of all published adapters; those with a DX policy say so in their metadata
STEPS = 4  # of an adapter whose name does not say


@dataclass(frozen=True)
class Base:
    """A base model that adapters exist for. A further one is a further entry.

    Args:
        image_model: ComfyUI's name of its architecture.
        width: attribute of its network that holds the transformer's width.
        layout: of its tokens.
        layers: names of its last layers: the head takes the place of the first, the others fall away.
        mark: pattern of a LoRA module that only its adapters have, in the names of diffusers.
        guidance: that it is distilled with, if it is.
        renamed: LoRA modules that ComfyUI does not know by their name in diffusers, and their names in ComfyUI.
        multiplier: of sigma, in the unit of time that its network is fed.
    """

    name: str
    image_model: str
    width: str
    layout: HeadLayout
    layers: tuple[str, ...]
    mark: str
    guidance: float | None = None
    renamed: dict[str, str] = field(default_factory=dict)
    multiplier: float = 1.0


BASES = (
    Base(
        "FLUX.1",
        "flux",
        "hidden_size",
        HeadLayout(channels=16),
        ("final_layer",),
        r"single_transformer_blocks\.\d+\.(proj_mlp|attn\.to_q)$",
        guidance=3.5,
    ),
    Base(
        "Qwen-Image", "qwen_image", "inner_dim", HeadLayout(channels=16), ("norm_out", "proj_out"), r"\.(img|txt)_(mlp|mod)\."
    ),
    Base(
        "FLUX.2",
        "flux2",
        "hidden_size",
        HeadLayout(channels=32, folded=2, modulation_bias=False),
        ("final_layer",),
        r"single_transformer_blocks\.\d+\.attn\.to_qkv_mlp_proj$",
        guidance=4.0,
        renamed={
            "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
            "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        },
    ),
)


def base_of(model) -> Base:
    """The entry of BASES for a MODEL.

    Raises:
        ValueError: there is none.
    """
    config = getattr(model.model, "model_config", None)
    found = (getattr(config, "unet_config", None) or {}).get("image_model")
    for base in BASES:
        if base.image_model == found:
            return base
    raise ValueError(
        f"GM Adapter is for {', '.join(base.name for base in BASES)}, and this model is a {type(model.model).__name__}"
        f"{f' ({found})' if found else ''}; connect one of those"
    )


def with_adapter(model, tensors: dict[str, Tensor], metadata: dict[str, str] | None, strength: float = 1.0, name: str = "file"):
    """A clone of a MODEL with an adapter on it.

    Args:
        tensors: of the adapter's file, in the published layout: LoRA pairs under the names of diffusers, and a head.
        metadata: of the file; `policy_config` says which policy it predicts, as JSON.
        strength: of the LoRA; the head is always whole.
        name: of the file, for messages; the number of steps in it ("..._8step") is how many the adapter was made for.

    Raises:
        ValueError: the file is no adapter, or one for another base model; the message names the keys.
    """
    if adapter_of(model.model_options) is not None:
        raise ValueError(
            f"this model has a GM adapter already ({adapter_of(model.model_options).name}), and can have one only; connect "
            f"{name} to the model before it"
        )
    base = base_of(model)
    network = model.model.diffusion_model
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    if not any(is_head_key(key) for key in tensors):
        raise ValueError(
            f"{name} is no GM adapter: none of its {len(tensors)} tensors ({', '.join(list(tensors)[:3])}, ...) is of a GM "
            "head (proj_out_means and the like); use Load LoRA for ordinary LoRAs, and for adapters a file such as "
            "gmflux_k8_piid_4step of Lakonik/pi-FLUX.1"
        )
    broken = [key for key, t in tensors.items() if t.ndim == 0 or not t.is_floating_point() or not t.float().isfinite().all()]
    if broken:
        raise ValueError(f"{name}: no finite float arrays: {', '.join(broken[:8])}; the file is damaged, download it again")
    policy = policy_of(metadata, tensors, name)
    try:
        head = build_head(tensors, policy, base.layout, getattr(network, base.width))
    except ValueError as error:
        raise ValueError(f"{name} on {base.name}: {error}") from error
    lora = {key: tensor for key, tensor in tensors.items() if not is_head_key(key)}
    model = with_lora(model, base, lora, strength, name)
    steps = steps_of(name)
    if policy["type"] == "DX":
        steps = max(1, round(1 / policy["segment_size"] + 1 - FINAL_STEP_SIZE))
    elif steps is None:
        steps = STEPS
        notice(
            f"the name {name} does not say how many steps the adapter was made for; taken as {STEPS}. Keep the name of its "
            "folder (such as gmflux_k8_piid_8step) in the file's"
        )
    adapter = Adapter(os.path.basename(name), base.layout, steps, guidance_of(base, model), base.layers)
    kind = f"GM policy, K = {head.num_gaussians}" if isinstance(head, GMHead) else f"DX policy, {head.num_times} times"
    pairs = len(lora) // 2
    notice(f"{base.name}, {kind}, {steps} steps or more, {pairs} LoRA pairs at {strength:g}", logging.INFO)
    return with_head(model, head, base.layers, ShiftedFlow(policy.get("shift", SHIFT), base.multiplier), adapter)


def steps_of(name: str) -> int | None:
    """How many steps an adapter was made for, by the name of its file or folder: "..._8step..."."""
    found = re.search(r"(?<!\d)([1-9]\d?)[ _-]?steps?(?![a-z0-9])", name.lower())
    return int(found[1]) if found else None


def policy_of(metadata: dict[str, str] | None, tensors: dict[str, Tensor], name: str) -> dict:
    """What the metadata of an adapter say of its policy; the GM policy if they say nothing.

    Raises:
        ValueError: they cannot be read, or leave out what a DX policy needs.
    """
    text = (metadata or {}).get("policy_config")
    try:
        policy = {} if text is None else json.loads(text)
    except ValueError:
        policy = None
    if not isinstance(policy, dict):
        raise ValueError(f"{name}: policy_config in its metadata is {text!r}, which is no JSON object; the file is damaged")
    if text is None and "proj_out.weight" in tensors:
        raise ValueError(
            f"{name} has the head of a DX policy (proj_out) but no policy_config in its metadata, which tells its segment size "
            "and shift; take the file as it was published"
        )
    policy = {"type": "GMFlow", **policy}
    missing = [key for key in ("segment_size", "shift") if policy["type"] == "DX" and key not in policy]
    shift = policy.get("shift", SHIFT)
    if missing or isinstance(shift, bool) or not isinstance(shift, int | float) or not 0.01 <= shift <= 100:
        raise ValueError(
            f"{name}: policy_config in its metadata is {text}, "
            f"{f'without {missing[0]}' if missing else 'whose shift is no number from 0.01 to 100'}; take the file as it was "
            "published"
        )
    return policy


def guidance_of(base: Base, model) -> float | None:
    """The distilled guidance that an adapter expects of this model."""
    takes_guidance = model.model.model_config.unet_config.get("guidance_embed", base.guidance is not None)
    if base.guidance is not None and not takes_guidance:
        notice(
            f"this {base.name} model has no guidance embedding (as the schnell version has none), and the GM adapters are "
            "made for the one that has (dev): expect poor images"
        )
        return None
    return base.guidance


def with_lora(model, base: Base, lora: dict[str, Tensor], strength: float, name: str):
    """A clone of a MODEL with the LoRA part of an adapter, applied by ComfyUI.

    Raises:
        ValueError: a part does not fit the model; the message names the keys.
    """
    if not lora:
        notice(f"{name} holds a head but no LoRA; it fits only a base model that was trained with it")
        return model
    pairs: dict[str, dict[str, str]] = {}
    for key in lora:
        module, _, side = key.rpartition(".lora_")
        pairs.setdefault(module, {})[side] = key
    odd = [key for module, sides in pairs.items() for key in sides.values() if set(sides) != {"A.weight", "B.weight"}]
    if odd:
        raise ValueError(
            f"{name}: {len(odd)} keys are neither a head nor a whole pair <module>.lora_A.weight and .lora_B.weight: "
            f"{', '.join(sorted(odd)[:8])}; the file is damaged, or in another layout than the published adapters"
        )
    places = comfy.lora.model_lora_keys_unet(model.model, {})
    renamed, wrong = {}, []
    for module, sides in pairs.items():
        known = base.renamed.get(module, module)
        target = next((p + known for p in ("transformer.", "", "diffusion_model.") if p + known in places), None)
        down, up = lora[sides["A.weight"]], lora[sides["B.weight"]]
        if target is None:
            wrong.append(f"{module}: not in this model")
        elif (shape := _shape_at(model, places[target])) != (up.shape[0], down.shape[1]) or up.shape[1] != down.shape[0]:
            wrong.append(f"{module}: {tuple(up.shape)} times {tuple(down.shape)} on a weight of {shape}")
        else:
            renamed.update({f"{target}.lora_A.weight": down, f"{target}.lora_B.weight": up})
    if wrong:
        other = next((b.name for b in BASES if b is not base and any(re.search(b.mark, module) for module in pairs)), None)
        raise ValueError(
            f"{name} does not fit this {base.name} model"
            f"{f': it looks like an adapter for {other}' if other else ''}. {len(wrong)} of its {len(pairs)} LoRA modules do "
            f"not apply: {'; '.join(wrong[:8])}"
        )
    return comfy.sd.load_lora_for_models(model, None, renamed, strength, 0)[0]


def _shape_at(model, place: str | tuple) -> tuple[int, ...]:
    """The shape of the matrix, or of the part of it, that a LoRA key leads to; the layer's, as weights may be packed."""
    key, offset = place[:2] if isinstance(place, tuple) else (place, None)
    layer = model.get_model_object(key.removesuffix(".weight"))
    shape = [layer.out_features, layer.in_features] if hasattr(layer, "in_features") else list(layer.weight.shape)
    if offset is not None:
        shape[offset[0]] = min(offset[2], max(0, shape[offset[0]] - offset[1]))
    return tuple(shape)


class GMFlowAdapter(io.ComfyNode):
    """A GM adapter on any MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GMFlowAdapter",
            display_name="GM Adapter",
            category="GMFlow",
            description="Makes a FLUX.1 or Qwen-Image model (or FLUX.2, see the README) predict a Gaussian mixture, so that "
            "the GM Policy Sampler needs 4 steps. The model may come from any loader (fp8, int8, GGUF), with LoRA loaders "
            "before or after; to stock samplers it is an ordinary model.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="A FLUX.1 dev or Qwen-Image model from any loader; FLUX.2 as far as its adapter is known."
                ),
                io.Combo.Input(
                    "adapter_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A GM adapter from models/loras, such as gmflux_k8_piid_4step or gmqwen_k8_piid_4step. Keep the "
                    "number of steps in its name: it tells how many the adapter was made for.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="Of the adapter's LoRA part. A little above 1 can sharpen text and details, above all on "
                    "fine-tuned models.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="For GM Policy Sampler or GM Sampler, or any stock sampler, which follows the mean.")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str | None, **kwargs) -> list:
        """A file that was replaced is loaded again. A name that comes over a wire is not known yet."""
        path = folder_paths.get_full_path(FOLDER, adapter_name) if adapter_name else None
        return [os.stat(path).st_mtime, os.stat(path).st_size] if path else []

    @classmethod
    def execute(cls, model, adapter_name: str, strength: float) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(FOLDER, adapter_name)
        if not adapter_name.endswith((".safetensors", ".sft")):
            raise ValueError(f"{adapter_name} is not a safetensors file; GM adapters are published as such")
        try:
            tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
        except Exception as error:
            raise ValueError(f"{adapter_name} cannot be read ({error}). An incomplete download has to be repeated") from error
        return io.NodeOutput(with_adapter(model, tensors, metadata, strength, adapter_name))
