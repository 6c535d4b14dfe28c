"""Put a GM adapter, a LoRA and a head, on a base model."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor

from ...gmflow_core.files.adapter_file import check_size, policy_of, split_tensors
from ...gmflow_core.files.adapter_metadata import AdapterFacts
from ...gmflow_core.files.errors import MOST_SAID, printable
from ...gmflow_core.files.hub_file import title_of
from ...gmflow_core.models.adapter_heads import ArcHead, DXHead, Head, build_head
from .adapter_details import describe
from .adapter_file import made_for, read_adapter
from .adapter_folder import AdapterFile
from .adapter_head import with_head
from .adapter_info import Adapter, adapter_of
from .adapter_lora import with_lora
from .bases import Base, base_of, find_base_named
from .notices import notice
from .solver_choice import no_effect
from .time_shift import ShiftedFlow


def with_adapter(
    model,
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None,
    strength: float = 1.0,
    name: str = "file",
    is_trial: bool = False,
):
    """Return a clone of a MODEL with an adapter on it.

    Args:
        tensors: the adapter's file in the published layout: LoRA pairs under the names of
            diffusers, and a head.
        metadata: metadata of the file; `policy_config` describes the predicted policy as JSON, and
            `gmflow.*` what the adapter was made for.
        strength: strength of the LoRA; the head always counts in full.
        name: name of the file, for messages; where the metadata give no number of steps, the one
            in it ("..._8step") counts.
        is_trial: True to see only whether the adapter fits, and show nothing on the node.

    Raises:
        ValueError: the file is no adapter, or is one for another base model; the message names
            the keys.
    """
    present = adapter_of(model.model_options)
    if present is not None:
        raise ValueError(
            f"this model has a GM adapter already ({present.name}), and can have only one; connect "
            f"{name} to the model before that adapter"
        )
    base = base_of(model)
    head_tensors, lora = split_tensors(tensors)
    policy = policy_of(metadata, head_tensors, name)
    facts = made_for(metadata, policy, name)
    check_base(facts, base, name)
    width = base.width_of(model.model.diffusion_model)
    try:
        head = build_head(head_tensors, policy, base.layout, width)
    except ValueError as error:
        raise ValueError(
            f"no head for {base.name}: {name}: {printable(str(error), MOST_SAID)}"
        ) from error
    check_size(policy, head, name)
    model = with_lora(model, base, lora, strength, name)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    adapter = Adapter(
        name=title_of(name),
        base=base,
        steps=facts.steps,
        guidance=guidance_of(base, model, facts),
        details="\n".join(describe(shapes, policy, facts, base)),
        final_step_size=facts.final_step_size,
        temperature=facts.temperature,
        policy=policy["type"],
    )
    if not is_trial:
        _report(base, head, facts.steps, len(lora) // 2, strength)
    sampling = ShiftedFlow.with_shift(facts.shift, base.multiplier, facts.final_step_size)
    return with_head(model, head, adapter, sampling)


def _report(base: Base, head: Head, steps: int, pairs: int, strength: float) -> None:
    """Show on the node what was put on the model."""
    notice(
        f"{base.name}, {_kind_of(head)}, {steps} steps or more, {pairs} LoRA pairs at {strength:g}",
        logging.INFO,
    )
    if not strength and pairs:
        notice(
            "strength 0 leaves out the adapter's LoRA, and its head alone predicts poorly; remove "
            "GM Adapter to see the base model, or set strength to 1"
        )


def check_base(facts: AdapterFacts, base: Base, name: str) -> None:
    """Check that an adapter is for a base model, if its file says for which.

    A name that this version does not know counts as no name, as files may come from elsewhere.

    Raises:
        ValueError: it is for another one.
    """
    stated = find_base_named(facts.base)
    if stated not in (None, base):
        raise ValueError(
            f"another base: {name} is for {stated.name} (gmflow.base in its metadata), and this "
            f"model is {base.name}; choose an adapter for {base.name}"
        )


def guidance_of(base: Base, model, facts: AdapterFacts) -> float | None:
    """Return the distilled guidance that an adapter expects of this model, None if it has none.

    It is the one that the file states, or else that of the published adapters for the base.
    """
    if base.guidance is None:
        return None
    if not model.model.model_config.unet_config.get("guidance_embed", True):
        notice(
            f"another {base.name} model is needed, expect poor images: this one has no guidance "
            "embedding (schnell, for one, has none), and the GM adapters are made for the version "
            "with one (dev); load that one"
        )
        return None
    return base.guidance if facts.guidance is None else facts.guidance


def _kind_of(head: Head) -> str:
    """Return the kind of policy that a head predicts, for a message."""
    if isinstance(head, ArcHead):
        return f"ArcFlow policy, K = {head.num_components}"
    if isinstance(head, DXHead):
        what = "coefficients" if head.settings.get("mode") == "polynomial" else "times"
        return f"DX policy, {head.num_times} {what}"
    return f"GM policy, K = {head.num_gaussians}"


def load_adapted(model, file: AdapterFile, strength: float, in_list: str = ""):
    """Return a clone of a MODEL with the adapter of a file on it; see `with_adapter`.

    Args:
        file: it is downloaded first where it is not here.
        in_list: a name that hub_id_or_path was preferred to; "" if there is none.
    """
    if in_list:
        no_effect(f"adapter_name ({in_list})", "hub_id_or_path is used")
    return with_adapter(model, *read_adapter(file.path()), strength, file.name)


def fit_in_words(model) -> Callable[[dict[str, Tensor], dict[str, str], str], str]:
    """Return a function that says whether an adapter fits a MODEL; tensors need no values."""

    def fits(tensors: dict[str, Tensor], metadata: dict[str, str], name: str) -> str:
        present = adapter_of(model.model_options)
        if present is not None:
            return f"it has an adapter already ({present.name})"
        try:
            with_adapter(model, tensors, metadata, 1.0, name, is_trial=True)
        except ValueError as error:
            return f"it does not fit: {error}"
        return f"it fits ({base_of(model).name})"

    return fits
