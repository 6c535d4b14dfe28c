"""Keys that the extension puts into conditionings and transformer options, and what lies under them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...gmflow_core.models.adapter_heads import HeadLayout


def class_conditioning(labels: list[int]) -> list:
    """CONDITIONING that says nothing but labels. Its tensor is a one, which ConditioningZeroOut turns into "no class"."""
    return [[torch.ones(1, 1, 1), {LABELS: torch.tensor(labels)}]]


def unconditional() -> list:
    """CONDITIONING that says nothing, to models of any kind."""
    return class_conditioning([NO_CLASS])


NO_CLASS = -1  # among them, whatever the model
RECORDER = "gmflow_mixture_recorder"  # key in transformer_options
ADAPTER = "gmflow_adapter"  # likewise
SOURCE = "gmflow_source"  # key in a conditioning: the SourceNoise whose modes it names
LABELS = "gmflow_labels"  # likewise: integers (n,)


# Adapters
@dataclass(frozen=True)
class Adapter:
    """What samplers want to know of the GM adapter on a model.

    Args:
        layout: of the base model's tokens.
        steps: the fewest that it was made for.
        guidance: the guidance that its base model was distilled with, which it expects; None if the base has none.
        replaced: names of the base model's layers that its head stands in for.
    """

    name: str
    layout: HeadLayout
    steps: int
    guidance: float | None
    replaced: tuple[str, ...]


def adapter_of(model_options: dict | None) -> Adapter | None:
    """The adapter on a model with these options."""
    return (model_options or {}).get("transformer_options", {}).get(ADAPTER)
