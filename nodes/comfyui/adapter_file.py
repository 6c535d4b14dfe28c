"""Read a GM adapter's file: a LoRA, a head, and the policy that the head predicts.

The layout is that of the published adapters of pi-Flow (Chen et al. 2025, arXiv 2510.14974).
"""

from __future__ import annotations

import json
import re

from torch import Tensor

from ...gmflow_core.models.adapter_heads import is_head_key
from ...gmflow_core.sampling.solvers import FINAL_STEP_SIZE
from .notices import notice

SHIFT = 3.2  # time shift of the published adapters; those with a DX policy state it in metadata
STEPS = 4  # steps of an adapter whose name gives no number


def split_tensors(
    tensors: dict[str, Tensor], name: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of an adapter's head and those of its LoRA.

    Raises:
        ValueError: there is no head, or a tensor is not finite; the message names the keys.
    """
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    head = {key: tensor for key, tensor in tensors.items() if is_head_key(key)}
    if not head:
        raise ValueError(
            f"{name} is no GM adapter: none of its {len(tensors)} tensors "
            f"({', '.join(list(tensors)[:3])}, ...) belongs to a GM head (proj_out_means and the "
            "like); use Load LoRA for ordinary LoRAs, or choose an adapter such as "
            "gmflux_k8_piid_4step of Lakonik/pi-FLUX.1"
        )
    broken = [key for key, tensor in tensors.items() if not _is_sound(tensor)]
    if broken:
        raise ValueError(
            f"{name}: these tensors are no finite float arrays: {', '.join(broken[:8])}; the file "
            "is damaged, download it again"
        )
    return head, {key: tensor for key, tensor in tensors.items() if key not in head}


def _is_sound(tensor: Tensor) -> bool:
    """Return whether a tensor is a finite array of floats."""
    floats = tensor.ndim > 0 and tensor.is_floating_point()
    return floats and bool(tensor.float().isfinite().all())


def policy_of(metadata: dict[str, str] | None, tensors: dict[str, Tensor], name: str) -> dict:
    """Return the policy that an adapter's metadata describe; the GM policy if they are silent.

    Raises:
        ValueError: the metadata cannot be read, or lack what a DX policy needs.
    """
    text = (metadata or {}).get("policy_config")
    try:
        policy = {} if text is None else json.loads(text)
    except ValueError:
        policy = None
    if not isinstance(policy, dict):
        raise ValueError(
            f"{name}: policy_config in its metadata is {text!r}, which is no JSON object; the file "
            "is damaged"
        )
    if text is None and "proj_out.weight" in tensors:
        raise ValueError(
            f"{name} has the head of a DX policy (proj_out) but no policy_config in its metadata, "
            "which gives the segment size and the shift; use the file as it was published"
        )
    policy = {"type": "GMFlow", **policy}
    problem = _problem_of(policy)
    if problem:
        raise ValueError(
            f"{name}: policy_config in its metadata is {text}, {problem}; use the file as it was "
            "published"
        )
    return policy


def _problem_of(policy: dict) -> str:
    """Return what is wrong with a policy, "" if nothing is."""
    needed = ("segment_size", "shift") if policy["type"] == "DX" else ()
    missing = [key for key in needed if key not in policy]
    if missing:
        return f"without {missing[0]}"
    shift = policy.get("shift", SHIFT)
    is_number = isinstance(shift, int | float) and not isinstance(shift, bool)
    return "" if is_number and 0.01 <= shift <= 100 else "whose shift is no number from 0.01 to 100"


def steps_of(policy: dict, name: str) -> int:
    """Return the number of steps that an adapter was made for.

    A DX policy's segment size gives it; else the name of the file or its folder does, such as
    "..._8step". Without a number in the name it is STEPS, and a notice says so.
    """
    if policy["type"] == "DX":
        return max(1, round(1 / policy["segment_size"] + 1 - FINAL_STEP_SIZE))
    found = re.search(r"(?<!\d)([1-9]\d?)[ _-]?steps?(?![a-z0-9])", name.lower())
    if found:
        return int(found[1])
    notice(
        f"the name {name} does not say how many steps the adapter was made for; {STEPS} is assumed."
        " Keep the name of the adapter's folder (such as gmflux_k8_piid_8step) in the file's name"
    )
    return STEPS
