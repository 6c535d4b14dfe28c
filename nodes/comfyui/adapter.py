"""Put a GM adapter, a LoRA and a head, on a base model."""

from __future__ import annotations

import json
import logging
import math
import os
import re

import comfy.samplers
import comfy.utils
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...gmflow_core.models.adapter_heads import GMHead, Head, build_head, is_head_key
from ...gmflow_core.sampling.solvers import FINAL_STEP_SIZE
from .bases import BASES, Base, base_of
from .notices import clear, notice
from .options import ADAPTER, RECORDER, Adapter, adapter_of
from .probabilistic_cfg import has_probabilistic_guidance
from .recording import add_recording, offer

SHIFT = (
    3.2  # the time shift of all published adapters; those with a DX policy say so in their metadata
)
STEPS = 4  # of an adapter whose name does not say


def with_adapter(
    model,
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None,
    strength: float = 1.0,
    name: str = "file",
):
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
    broken = [
        key
        for key, t in tensors.items()
        if t.ndim == 0 or not t.is_floating_point() or not t.float().isfinite().all()
    ]
    if broken:
        raise ValueError(
            f"{name}: no finite float arrays: {', '.join(broken[:8])}; the file is damaged, download it again"
        )
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
    adapter = Adapter(
        os.path.basename(name), base.layout, steps, guidance_of(base, model), base.layers
    )
    kind = (
        f"GM policy, K = {head.num_gaussians}"
        if isinstance(head, GMHead)
        else f"DX policy, {head.num_times} times"
    )
    pairs = len(lora) // 2
    notice(
        f"{base.name}, {kind}, {steps} steps or more, {pairs} LoRA pairs at {strength:g}",
        logging.INFO,
    )
    return with_head(
        model, head, base.layers, ShiftedFlow(policy.get("shift", SHIFT), base.multiplier), adapter
    )


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
        raise ValueError(
            f"{name}: policy_config in its metadata is {text!r}, which is no JSON object; the file is damaged"
        )
    if text is None and "proj_out.weight" in tensors:
        raise ValueError(
            f"{name} has the head of a DX policy (proj_out) but no policy_config in its metadata, which tells its segment size "
            "and shift; take the file as it was published"
        )
    policy = {"type": "GMFlow", **policy}
    missing = [
        key for key in ("segment_size", "shift") if policy["type"] == "DX" and key not in policy
    ]
    shift = policy.get("shift", SHIFT)
    if (
        missing
        or isinstance(shift, bool)
        or not isinstance(shift, int | float)
        or not 0.01 <= shift <= 100
    ):
        raise ValueError(
            f"{name}: policy_config in its metadata is {text}, "
            f"{f'without {missing[0]}' if missing else 'whose shift is no number from 0.01 to 100'}; take the file as it was "
            "published"
        )
    return policy


def guidance_of(base: Base, model) -> float | None:
    """The distilled guidance that an adapter expects of this model."""
    takes_guidance = model.model.model_config.unet_config.get(
        "guidance_embed", base.guidance is not None
    )
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
        notice(
            f"{name} holds a head but no LoRA; it fits only a base model that was trained with it"
        )
        return model
    pairs: dict[str, dict[str, str]] = {}
    for key in lora:
        module, _, side = key.rpartition(".lora_")
        pairs.setdefault(module, {})[side] = key
    odd = [
        key
        for module, sides in pairs.items()
        for key in sides.values()
        if set(sides) != {"A.weight", "B.weight"}
    ]
    if odd:
        raise ValueError(
            f"{name}: {len(odd)} keys are neither a head nor a whole pair <module>.lora_A.weight and .lora_B.weight: "
            f"{', '.join(sorted(odd)[:8])}; the file is damaged, or in another layout than the published adapters"
        )
    places = comfy.lora.model_lora_keys_unet(model.model, {})
    renamed, wrong = {}, []
    for module, sides in pairs.items():
        known = base.renamed.get(module, module)
        target = next(
            (p + known for p in ("transformer.", "", "diffusion_model.") if p + known in places),
            None,
        )
        down, up = lora[sides["A.weight"]], lora[sides["B.weight"]]
        if target is None:
            wrong.append(f"{module}: not in this model")
        elif (shape := _shape_at(model, places[target])) != (
            up.shape[0],
            down.shape[1],
        ) or up.shape[1] != down.shape[0]:
            wrong.append(
                f"{module}: {tuple(up.shape)} times {tuple(down.shape)} on a weight of {shape}"
            )
        else:
            renamed.update({f"{target}.lora_A.weight": down, f"{target}.lora_B.weight": up})
    if wrong:
        other = next(
            (
                b.name
                for b in BASES
                if b is not base and any(re.search(b.mark, module) for module in pairs)
            ),
            None,
        )
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
    shape = (
        [layer.out_features, layer.in_features]
        if hasattr(layer, "in_features")
        else list(layer.weight.shape)
    )
    if offset is not None:
        shape[offset[0]] = min(offset[2], max(0, shape[offset[0]] - offset[1]))
    return tuple(shape)


DEFAULT_GUIDANCE = 3.5  # what ComfyUI feeds FLUX models where a conditioning says nothing of it


class HeadForward:
    """The forward of a base model's last layer, with a head in its stead: it gives the mean velocity on, and the prediction to
    whoever waits for it.

    The layer itself stays where it is: ComfyUI's memory managers, LoRA loaders and savers know weights by their place in the
    model, which all its clones share. The head is none of their weights; it is small enough to be sent to the GPU in each call.
    """

    def __init__(self, head: Head):
        self.head = head

    def __call__(self, tokens: Tensor, embedding: Tensor, modulation_dims: object = None) -> Tensor:
        """Mean velocity tokens (B, N, C p^2), in float32.

        Args:
            embedding: (B, D), or (B, M, D) where tokens of reference images have one of their own; the first is the image's,
                and what becomes of the other tokens does not matter, as the base model drops them.
        """
        prediction = self.head(tokens, embedding if embedding.ndim == 2 else embedding[:, 0])
        offer(prediction)
        return self.head.layout.to_tokens(prediction.mean())


def pass_on(tokens: Tensor) -> Tensor:
    """The forward of a layer that falls away."""
    return tokens


class ShiftedFlow(comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.CONST):
    """Flow matching with a time shift, for stock schedulers.

    Its table of sigmas is no buffer: ComfyUI's memory managers would back it up and restore it under the name that the base
    model's table has, too.

    Args:
        time_shift: see `gmflow_core.path.shift_time`.
        multiplier: of sigma, for networks that want another unit of time.
    """

    def __init__(self, time_shift: float, multiplier: float = 1.0):
        super().__init__()
        self.multiplier = multiplier
        self.set_parameters(shift=math.log(time_shift))
        self.complete = True

    def register_buffer(self, name: str, tensor: Tensor, persistent: bool = True) -> None:
        """Keep the table as an attribute, and let nobody else put one in."""
        if not getattr(self, "complete", False):
            object.__setattr__(self, name, tensor)

    def timestep(self, sigma: Tensor) -> Tensor:
        """What the network is fed."""
        return sigma * self.multiplier


def with_head(
    model: comfy.model_patcher.ModelPatcher,
    head: Head,
    layers: tuple[str, ...],
    sampling: ShiftedFlow,
    adapter: Adapter,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of `model` that computes `head` in the place of the layers of its network that these names lead to: the head in
    the first, nothing in the others."""
    model = model.clone()
    for name in layers:
        forward = HeadForward(head) if name == layers[0] else pass_on
        model.add_object_patch(f"diffusion_model.{name}.forward", forward)
    add_recording(
        model, lambda prediction, shape: head.to_image(prediction, adapter.layout.image_size(shape))
    )
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, RECORDER, check_settings)
    model.model_options["transformer_options"][ADAPTER] = adapter
    model.add_object_patch("model_sampling", sampling)
    return model


def check_settings(executor, *args, **kwargs):
    """Say so if what is sampled does not fit the adapter; a wrapper for ComfyUI's OUTER_SAMPLE, so that it is said with stock
    samplers too."""
    clear()
    guider = executor.class_obj
    adapter = adapter_of(guider.model_options)
    if adapter.guidance is not None:
        conds = [cond for conds in getattr(guider, "conds", {}).values() for cond in conds or []]
        values = {cond.get("guidance", DEFAULT_GUIDANCE) for cond in conds} - {adapter.guidance}
        if values:
            asked = ", ".join(
                sorted("none at all" if value is None else f"{value:g}" for value in values)
            )
            notice(
                f"the adapter {adapter.name} was made with a guidance of {adapter.guidance:g}, and the conditioning asks for "
                f"{asked}, which gives poor images; set FluxGuidance to {adapter.guidance:g}"
            )
        cfg = getattr(guider, "cfg", 1.0)
        if cfg != (0.0 if has_probabilistic_guidance(guider.model_patcher) else 1.0):
            notice(
                f"this base model has its guidance built in (distilled) and never learned what a negative prompt is: with a "
                f"guidance of {cfg:g} on top expect poor images; take Basic Guider, or cfg 1"
            )
    places = tuple(f"diffusion_model.{name}." for name in adapter.replaced)
    lost = sorted(key for key in guider.model_patcher.patches if key.startswith(places))
    if lost:
        notice(
            f"a LoRA on this model changes {', '.join(lost)}, which the head of {adapter.name} stands in for: that part of the "
            "LoRA has no effect"
        )
    return executor(*args, **kwargs)


def own_shift(model_sampling) -> float:
    """The time shift of a flow model's sampling, however it is parametrised: the odds of sigma half-way.

    Raises:
        ValueError: it is no flow model's.
    """
    highest, half = float(model_sampling.sigma_max), float(model_sampling.percent_to_sigma(0.5))
    if not 0 < half < highest <= 1:
        raise ValueError(
            f"GM samplers are for flow models, with sigmas up to 1, and this one's go up to {highest:.4g}; connect a model "
            "from Load GM Model or GM Adapter, and remove nodes such as ModelSamplingDiscrete"
        )
    return half / (1 - half)
