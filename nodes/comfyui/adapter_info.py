"""Facts about a model's GM adapter, kept in the model's transformer options."""

from __future__ import annotations

from dataclasses import dataclass

from .bases import Base

ADAPTER = "gmflow_adapter"  # key in transformer_options


@dataclass(frozen=True)
class Adapter:
    """A GM adapter as samplers see it.

    Args:
        base: the entry of the base model it is for.
        steps: the fewest steps it was made for.
        guidance: the distilled guidance it expects; None if the base model takes none.
        details: what its file holds, for people to read.
    """

    name: str
    base: Base
    steps: int
    guidance: float | None
    details: str = ""


def adapter_of(model_options: dict | None) -> Adapter | None:
    """Return the adapter on a model with these options, None if there is none."""
    return (model_options or {}).get("transformer_options", {}).get(ADAPTER)
