"""Read a GM adapter's file: a LoRA, a head, the policy that the head predicts, what it is made for.

The layout is that of the published adapters of pi-Flow (Chen et al. 2025, arXiv 2510.14974) and
ArcFlow (Yang et al. 2026, arXiv 2602.09014).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..flow.policy import FINAL_STEP_SIZE
from ..models.adapter_heads import POLICIES, GMHead, Head, is_head_key, policy_by_names
from ..models.settings import is_number
from .adapter_metadata import (
    POLICY_CONFIG,
    TENSOR_PREFIX,
    AdapterFacts,
    check_is_adapter,
    facts_in,
)
from .errors import MOST_QUOTED, FileError, printable, quoted, reading
from .json_files import parse_json
from .safetensors_files import check_finite, open_safetensors

KNOWN = f"{', '.join(POLICIES[:-1])} and {POLICIES[-1]}"
SHIFT = 3.2  # time shift of the published adapters; those with a DX policy state it in metadata
# What adapters of a policy are made for where neither the file nor its name says it. The last step
# is relative to the others.
STEPS = {"GMFlow": 4, "DX": 4, "ArcFlow": 2}
FINAL_STEP_SIZES = {"GMFlow": FINAL_STEP_SIZE, "DX": FINAL_STEP_SIZE, "ArcFlow": 1.0}


def read_tensors(
    path: str | Path, check_names: Callable[[list[str], str | Path], None] = check_is_adapter
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of an adapter's file.

    Args:
        check_names: called with the tensors' names and the path; raises a `FileError` if they are
            none of an adapter's.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: it is no whole safetensors file or no adapter, or a tensor is no finite array of
            floats; the message names it.
    """
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


def split_tensors(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of an adapter's head and those of its LoRA."""
    tensors = {key.removeprefix(TENSOR_PREFIX): tensor for key, tensor in tensors.items()}
    head = {key: tensor for key, tensor in tensors.items() if is_head_key(key)}
    return head, {key: tensor for key, tensor in tensors.items() if key not in head}


def named(keys: list[str], most: int = 8) -> str:
    """Name the first of some keys of a file, for a message."""
    return ", ".join(printable(key, MOST_QUOTED) for key in keys[:most])


def lora_pairs(lora: dict[str, Tensor], name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the matrices A (rank, in) and B (out, rank) of every module.

    Raises:
        ValueError: a key is no half of a whole pair, or the halves do not fit each other.
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
            f"and .lora_B.weight: {named(sorted(odd))}; the file is damaged, or in another "
            "layout than the published adapters"
        )
    pairs = {
        module: (lora[sides["A.weight"]], lora[sides["B.weight"]])
        for module, sides in modules.items()
    }
    for module, (down, up) in pairs.items():
        if not up.ndim == down.ndim == 2 or up.shape[1] != down.shape[0]:
            raise ValueError(
                f"{name}: the pair of {named([module])} is no product of matrices: lora_B is "
                f"{tuple(up.shape)}, lora_A {tuple(down.shape)}; the file is damaged"
            )
    return pairs


def policy_of(metadata: dict[str, str] | None, tensors: dict[str, Tensor], name: str) -> dict:
    """Return the policy that an adapter's metadata describe, or else its head's names tell.

    Raises:
        ValueError: the metadata cannot be read, or lack what a DX policy needs.
    """
    text = (metadata or {}).get(POLICY_CONFIG)
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


def made_for(
    metadata: dict[str, str] | None, policy: dict, name: str, warn: Callable[[str], None]
) -> AdapterFacts:
    """Return what an adapter was made for: steps, shift, last step and policy are always known.

    The metadata `gmflow.*` count first. Then a DX policy's segment size gives the steps, or else
    the name of the file or its folder does, such as "..._8step". Without a number in the name they
    are those of STEPS.

    Args:
        policy: see `policy_of`.
        name: of the file, with or without its folder.
        warn: called with a line if the number of steps is assumed.

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
    steps = stated.steps or _steps_of(policy, name, final, warn)
    shift = stated.shift or policy.get("shift", SHIFT)
    return replace(stated, steps=steps, shift=shift, final_step_size=final, policy=kind)


def _steps_of(policy: dict, name: str, final_step_size: float, warn: Callable[[str], None]) -> int:
    """Return the number of steps that an adapter was made for, if its metadata do not say it."""
    if is_number(policy.get("segment_size"), 0.001, 1):
        return max(1, round(1 / policy["segment_size"] + 1 - final_step_size))
    found = re.findall(r"(?<!\d)([1-9]\d?)[ _-]?steps?(?![a-z0-9])", name.lower())
    if found:
        return int(found[-1])  # the file's, rather than that of a folder around it
    usual = STEPS[policy["type"]]
    warn(
        f"{usual} steps are assumed: the name {name} does not say how many steps the adapter was "
        "made for; keep the adapter's name (such as gmflux_k8_piid_8step) as that of the file or "
        "its folder, or write the number into the file: gmflow adapter FILE --steps 8"
    )
    return usual
