"""Low-rank changes of a base model's layers that are trained beside them.

The layers keep their weights, of whatever type: a change is added to what they return.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.lora
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bases import Base

PREFIXES = ("transformer.", "diffusion_model.")  # of LoRA names in ComfyUI's map
MLP, ATTENTION = "published", "attention too"
TARGETS = (MLP, ATTENTION)


@dataclass
class Switch:
    """A switch between the student (True) and the teacher."""

    student: bool = False


@dataclass(frozen=True)
class Place:
    """Where a LoRA pair acts.

    Args:
        layer: ComfyUI's name of the layer in the network.
        inputs, outputs: of the pair.
        start: first of the layer's outputs that it changes.
    """

    layer: str
    inputs: int
    outputs: int
    start: int = 0


class Pair(nn.Module):
    """A low-rank change up(down(x)), of scale 1, computed in the type of x.

    Args:
        down: A, (rank, inputs).
        up: B, (outputs, rank).
    """

    def __init__(self, down: Tensor, up: Tensor):
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def forward(self, x: Tensor) -> Tensor:
        """Return the change (..., outputs) for x (..., inputs)."""
        return F.linear(F.linear(x, self.down.to(x)), self.up.to(x))


class LearningLayer:
    """Forward of a layer with pairs beside it, which count while the switch is on.

    Args:
        forward: the layer's own.
    """

    def __init__(self, forward: Callable, switch: Switch, pairs: list[tuple[Pair, int]]):
        self.forward, self.switch, self.pairs = forward, switch, pairs

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the layer returns for x (..., inputs), and the changes if they count."""
        result = self.forward(x, *args, **kwargs)
        if not self.switch.student:
            return result
        for pair, start in self.pairs:
            change = pair(x).to(result)
            rest = result.shape[-1] - start - change.shape[-1]
            result = result + F.pad(change, (start, rest))
        return result


def places_of(model, base: Base, names: Callable[[str], bool]) -> dict[str, Place]:
    """Return the layers of a MODEL that LoRAs can change, by their names in adapters' files.

    Args:
        names: returns whether a name is wanted.
    """
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    found = {}
    for key, place in known.items():
        for prefix in PREFIXES:
            if key.startswith(prefix):
                found.setdefault(key.removeprefix(prefix), place)
    for name, own in base.renamed.items():
        if f"diffusion_model.{own}" in known:
            found[name] = known[f"diffusion_model.{own}"]
    places = {name: _place(model, place) for name, place in found.items() if names(name)}
    return {name: place for name, place in places.items() if place is not None}


def targets(base: Base, what: str) -> Callable[[str], bool]:
    """Return a function that says whether a layer's name is among the targets `what`."""
    trained = base.trained
    pattern = re.compile(trained.mlp if what == MLP else f"{trained.mlp}|{trained.attention}")
    return lambda name: pattern.fullmatch(name) is not None


def _place(model, place: str | tuple) -> Place | None:
    """Return the place that ComfyUI's LoRA key leads to, None if it is no linear layer."""
    key, offset = place[:2] if isinstance(place, tuple) else (place, None)
    if not key.endswith(".weight"):
        return None
    layer = model.get_model_object(key.removesuffix(".weight"))
    name = key.removesuffix(".weight").removeprefix("diffusion_model.")
    inputs, outputs = (getattr(layer, n, None) for n in ("in_features", "out_features"))
    if None in (inputs, outputs):
        return None
    if offset is None:
        return Place(name, inputs, outputs)
    dim, start, length = offset
    return Place(name, inputs, min(length, outputs - start), start) if dim == 0 else None


def new_pairs(
    places: Mapping[str, Place], rank: int, generator: torch.Generator
) -> dict[str, Pair]:
    """Return pairs that change nothing yet: A drawn from N(0, 1 / rank^2), B zero."""
    pairs = {}
    for name in sorted(places):
        place = places[name]
        down = torch.randn(rank, place.inputs, generator=generator) / rank
        pairs[name] = Pair(down, torch.zeros(place.outputs, rank))
    return pairs
