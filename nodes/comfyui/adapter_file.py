"""Read a GM adapter's file: a LoRA, a head, the policy that the head predicts, what it is made for.

The layout is that of the published adapters of pi-Flow (Chen et al. 2025, arXiv 2510.14974) and
ArcFlow (Yang et al. 2026, arXiv 2602.09014).
"""

from __future__ import annotations

import re
from dataclasses import replace

from torch import Tensor

from ...gmflow_core.files.adapter_metadata import AdapterFacts, facts_in
from ...gmflow_core.files.errors import MOST_QUOTED, FileError, printable, quoted, reading
from ...gmflow_core.files.json_files import parse_json
from ...gmflow_core.files.safetensors_files import check_finite, open_safetensors
from ...gmflow_core.models.adapter_heads import (
    POLICIES,
    GMHead,
    Head,
    is_head_key,
    policy_by_names,
)
from ...gmflow_core.models.settings import is_number
from ...gmflow_core.sampling.solvers import FINAL_STEP_SIZE
from .notices import notice

ENDINGS = (".safetensors", ".sft")
KNOWN = f"{', '.join(POLICIES[:-1])} and {POLICIES[-1]}"
PREFIX = "transformer."  # of names in some files
SHIFT = 3.2  # time shift of the published adapters; those with a DX policy state it in metadata
# What adapters of a policy are made for where neither the file nor its name says it. The last step
# is relative to the others.
STEPS = {"GMFlow": 4, "DX": 4, "ArcFlow": 2}
FINAL_STEP_SIZES = {"GMFlow": FINAL_STEP_SIZE, "DX": FINAL_STEP_SIZE, "ArcFlow": 1.0}


def read_adapter(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of an adapter's file.

    Raises:
        FileError: it is no whole safetensors file or no adapter, or a tensor is no finite array of
            floats; the message names it.
    """
    if not path.lower().endswith(ENDINGS):
        raise FileError(
            path, "is not a safetensors file", "choose the .safetensors file of a GM adapter"
        )
    tensors = {}
    with reading(path), open_safetensors(path) as file:
        check_names(list(file.keys()), path)
        for key in file.keys():
            part = file.get_slice(key)
            shape = tuple(part.get_shape())
            if not shape or "F" not in part.get_dtype():
                raise FileError(
                    path,
                    f"cannot be used: {quoted(key)} of type {part.get_dtype()} and shape {shape} "
                    "is no array of floats",
                )
        for key in file.keys():
            tensors[key] = file.get_tensor(key)
            check_finite(tensors[key], key, path)
        return tensors, file.metadata() or {}


def check_names(keys: list[str], path: str) -> None:
    """Check that one of a file's tensors belongs to a head.

    Raises:
        FileError: none does.
    """
    if not any(is_head_key(key.removeprefix(PREFIX)) for key in keys):
        raise FileError(
            path,
            f"is no GM adapter: none of its {len(keys)} tensors ({named(keys, 3)}, ...) belongs to "
            "a GM head (proj_out_means and the like)",
            "use Load LoRA for ordinary LoRAs, or choose an adapter such as gmflux_k8_piid_4step "
            "of Lakonik/pi-FLUX.1",
        )


def split_tensors(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of an adapter's head and those of its LoRA."""
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    head = {key: tensor for key, tensor in tensors.items() if is_head_key(key)}
    return head, {key: tensor for key, tensor in tensors.items() if key not in head}


def named(keys: list[str], most: int = 8) -> str:
    """Name the first of some keys of a file, for a message."""
    return ", ".join(printable(key, MOST_QUOTED) for key in keys[:most])


def policy_of(metadata: dict[str, str] | None, tensors: dict[str, Tensor], name: str) -> dict:
    """Return the policy that an adapter's metadata describe, or else its head's names tell.

    Raises:
        ValueError: the metadata cannot be read, or lack what a DX policy needs.
    """
    text = (metadata or {}).get("policy_config")
    try:
        policy = {} if text is None else parse_json(text, name)
    except FileError:
        policy = None
    if not isinstance(policy, dict):
        raise ValueError(
            f"{name} is damaged: policy_config in its metadata is {quoted(text)}, which is no JSON "
            "object; download it again"
        )
    if text is None and "proj_out.weight" in tensors:
        raise ValueError(
            f"{name} has no policy_config in its metadata, which a DX policy (the head is one, "
            "proj_out) needs for its segment size and shift; use the file as it was published"
        )
    policy = {"type": policy_by_names(tensors), **policy}
    problem = _problem_of(policy)
    if problem:
        raise ValueError(
            f"{name} cannot be used: policy_config in its metadata is "
            f"{printable(text, MOST_QUOTED)}, {problem}; use the file as it was published"
        )
    return policy


def _problem_of(policy: dict) -> str:
    """Return what is wrong with a policy, "" if nothing is."""
    if policy["type"] not in POLICIES:
        return f"of a type that this version does not know: this version knows {KNOWN}"
    needed = ()
    if policy["type"] == "DX":  # polynomials have no segment
        needed = ("shift",) if policy.get("mode") == "polynomial" else ("segment_size", "shift")
    missing = [key for key in needed if key not in policy]
    if missing:
        return f"without {missing[0]}"
    if not is_number(policy.get("shift", SHIFT), 0.01, 100):
        return "whose shift is no number from 0.01 to 100"
    return ""


def check_size(policy: dict, head: Head, name: str) -> None:
    """Check that a policy states the same number of Gaussians as its head has, if it states one.

    Raises:
        ValueError: it does not.
    """
    stated = policy.get("num_gaussians")
    if isinstance(head, GMHead) and stated not in (None, head.num_gaussians):
        raise ValueError(
            f"{name} cannot be used: policy_config in its metadata says num_gaussians = "
            f"{quoted(stated)}, and its head has {head.num_gaussians}; use the file as it was "
            "published"
        )


def made_for(metadata: dict[str, str] | None, policy: dict, name: str) -> AdapterFacts:
    """Return what an adapter was made for: steps, shift, last step and policy are always known.

    The metadata `gmflow.*` count first. Then a DX policy's segment size gives the steps, or else
    the name of the file or its folder does, such as "..._8step". Without a number in the name they
    are those of STEPS, and a notice says so.

    Raises:
        ValueError: the metadata are out of range, or contradict the policy; the message quotes
            them.
    """
    stated, kind = facts_in(metadata, name), policy["type"]
    if stated.policy not in (None, kind):
        raise ValueError(
            f"{name}: wrong metadata, gmflow.policy = {stated.policy}, as its policy_config or its "
            f"head are of {kind}; use the file as it was published"
        )
    final = stated.final_step_size or FINAL_STEP_SIZES[kind]
    steps = stated.steps or _steps_of(policy, name, final)
    shift = stated.shift or policy.get("shift", SHIFT)
    return replace(stated, steps=steps, shift=shift, final_step_size=final, policy=kind)


def _steps_of(policy: dict, name: str, final_step_size: float) -> int:
    """Return the number of steps that an adapter was made for, if its metadata do not say it."""
    if is_number(policy.get("segment_size"), 0.001, 1):
        return max(1, round(1 / policy["segment_size"] + 1 - final_step_size))
    found = re.findall(r"(?<!\d)([1-9]\d?)[ _-]?steps?(?![a-z0-9])", name.lower())
    if found:
        return int(found[-1])  # the file's, rather than that of a folder around it
    usual = STEPS[policy["type"]]
    notice(
        f"{usual} steps are assumed: the name {name} does not say how many steps the adapter was "
        "made for; keep the adapter's name (such as gmflux_k8_piid_8step) as that of the file or "
        "its folder, or write the number into the file: gmflow adapter FILE --steps 8"
    )
    return usual
