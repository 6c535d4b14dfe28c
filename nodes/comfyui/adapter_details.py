"""Describe a GM adapter in words: its policy, its settings, what its LoRA covers, what it fits."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping

import torch

from ...gmflow_core.files.adapter_file import policy_of
from ...gmflow_core.files.adapter_metadata import AdapterFacts, facts_in
from ...gmflow_core.files.errors import MOST_SAID, printable, reading
from ...gmflow_core.files.safetensors_files import open_safetensors
from ...gmflow_core.models.adapter_heads import is_head_key
from .adapter_file import PREFIX, check_names, made_for
from .adapter_folder import DOWNLOAD, AdapterFile
from .adapter_info import Adapter
from .bases import BASES, Base, base_names, find_base_named

Shapes = Mapping[str, tuple[int, ...]]
DOWN = ".lora_A.weight"  # of the matrix (rank, in) of a LoRA pair
NUMBERS = re.compile(r"\.\d+\.")  # of blocks, in names of layers
MOST_KINDS = 40  # of layers that are listed


def read_shapes(path: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return the shapes of the tensors in an adapter's file, and its metadata.

    Raises:
        FileError: it is no safetensors file, or no adapter.
    """
    with reading(path), open_safetensors(path) as file:
        keys = list(file.keys())
        check_names(keys, path)
        return {key: tuple(file.get_slice(key).get_shape()) for key in keys}, file.metadata() or {}


def describe(shapes: Shapes, policy: dict, facts: AdapterFacts, base: Base | None) -> list[str]:
    """Return lines about an adapter.

    Args:
        shapes: of the tensors in its file.
        policy: see `policy_of`.
        facts: see `made_for`.
        base: the base model it is for, if that is known.
    """
    shapes = {key.removeprefix(PREFIX): shape for key, shape in shapes.items()}
    lines = [f"policy: {_policy_in_words(shapes, policy, base)}"]
    last = facts.final_step_size
    lines.append(f"steps: {facts.steps} or more")
    lines.append(f"last step: {'as long as' if last == 1 else f'{last:g} of'} the others")
    lines.append(f"shift: {facts.shift:g}")
    if facts.temperature is not None:
        lines.append(f"temperature: {facts.temperature:g}")
    if base is not None:
        guidance = base.guidance if facts.guidance is None else facts.guidance
        built_in = base.guidance is not None
        lines.append(f"guidance: {f'{guidance:g} only' if built_in else 'none is built in'}")
    return [*lines, *_lora_in_words(shapes)]


def _policy_in_words(shapes: Shapes, policy: dict, base: Base | None) -> str:
    """Return the kind of policy, and its size."""
    without = "(no mixture: for gm-policy and stock samplers)"
    if policy["type"] == "DX":
        rows = shapes.get("proj_out.weight", (0,))[0]
        what = "coefficients" if policy.get("mode") == "polynomial" else "times"
        count = f", {rows // base.layout.width} {what}" if base else ""
        return f"DX{count} {without}"
    patch = (base or BASES[0]).layout.patch
    rows = shapes.get("proj_out_logweights.weight", (0,))[0]
    if policy["type"] == "ArcFlow":
        return f"ArcFlow, K = {rows // patch**2} velocities for each latent pixel {without}"
    return f"GM, a mixture of K = {rows // patch**2} Gaussians for each latent pixel"


def _lora_in_words(shapes: Shapes) -> list[str]:
    """Return lines about the layers that the LoRA changes, counted over the blocks."""
    pairs = {key.removesuffix(DOWN): shape[0] for key, shape in shapes.items() if DOWN in key}
    if not pairs:
        return ["LoRA: none"]
    ranks = sorted(set(pairs.values()))
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    kinds = Counter(NUMBERS.sub(".*.", name, count=1) for name in pairs)
    lines = [f"  {count} x {kind}" for kind, count in sorted(kinds.items())]
    rest = len(lines) - MOST_KINDS
    more = [f"  and {rest} kinds more"] if rest > 0 else []
    return [f"LoRA: rank {rank}, {len(pairs)} layers:", *lines[:MOST_KINDS], *more]


def likely_base(shapes: Shapes) -> Base | None:
    """Return the base model that an adapter is for, by the names of its layers.

    They may be those of several bases; then it is None.
    """
    modules = [key.removeprefix(PREFIX).removesuffix(DOWN) for key in shapes if DOWN in key]
    fitting = [base for base in BASES if any(re.search(base.mark, name) for name in modules)]
    return fitting[0] if len(fitting) == 1 else None


def describe_file(file: AdapterFile, fits) -> str:
    """Return what an adapter's file holds.

    Args:
        fits: takes tensors without values, metadata and a name, and returns whether they fit the
            connected model, in words; None if none is connected.

    Raises:
        ValueError: it is no adapter.
    """
    place = file.place
    if not isinstance(place, str):
        cached = place.cached()
        if cached is None:
            return (
                f"file: {place} on the Hugging Face hub, not downloaded yet\n"
                f"GM Adapter downloads it when it runs with {file.name}{DOWNLOAD}"
            )
        place = str(cached)
    shapes, metadata = read_shapes(place)
    head = {key.removeprefix(PREFIX): shape for key, shape in shapes.items()}
    head = {key: shape for key, shape in head.items() if is_head_key(key)}
    policy = policy_of(metadata, head, file.name)
    facts = made_for(metadata, policy, file.name)
    base = find_base_named(facts.base) or likely_base(shapes)
    found = base.name if base else f"unknown by its layers' names; one of {base_names()}"
    lines = [
        f"file: {printable(place)} ({os.path.getsize(place) / 1e9:.2f} GB)",
        f"base model: {facts.base or found}",
    ]
    if fits is not None:
        empty = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        lines.append(f"connected model: {fits(empty, metadata, file.name)}")
    lines += describe(shapes, policy, facts, base)
    known = ", ".join(facts_in(metadata, file.name).stated())
    return "\n".join([*lines, f"stated in the file: {known or 'its policy only'}"])


def describe_adapted(adapter: Adapter) -> str:
    """Return what is known of the adapter on a model."""
    start = f"adapter: {adapter.name}, on this model\nbase model: {adapter.base.name}"
    return printable(f"{start}\n{adapter.details}", MOST_SAID)
