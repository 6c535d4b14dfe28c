"""Facts about a model's GM adapter, kept in the model's transformer options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from ...gmflow_core.sampling.solvers import FINAL_STEP_SIZE, SOLVERS
from .bases import Base

ADAPTER = "gmflow_adapter"  # key in transformer_options
# settings of the policy sampler that a policy does not use
UNUSED = {"GMFlow": (), "DX": ("temperature",), "ArcFlow": ("temperature", "substeps")}


@dataclass(frozen=True)
class Adapter:
    """A GM adapter as samplers see it.

    Args:
        base: the entry of the base model it is for.
        steps: the fewest steps it was made for.
        guidance: the distilled guidance it expects; None if the base model takes none.
        details: what its file holds, for people to read.
        final_step_size: size of the last step, relative to the others, that it was made for.
        temperature: of its mixture at all steps but the last; None for the usual one of the number
            of steps.
        policy: kind of policy that its head predicts.
    """

    name: str
    base: Base
    steps: int
    guidance: float | None
    details: str = ""
    final_step_size: float = FINAL_STEP_SIZE
    temperature: float | None = None
    policy: str = "GMFlow"


def refuse_to_save(name: str) -> NoReturn:
    """Refuse to save a model with the adapter `name` on it.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"not saved: this model has the GM adapter {name} on it, and a file of its base with the "
        "adapter's LoRA but without its head would be useless; connect the model from before GM "
        "Adapter, and keep the adapter's own file"
    )


def adapter_of(model_options: dict | None) -> Adapter | None:
    """Return the adapter on a model with these options, None if there is none."""
    return (model_options or {}).get("transformer_options", {}).get(ADAPTER)


def final_step_size_for(model, solver: str) -> float:
    """Return the usual size of the last step of a solver: its own, or the adapter's.

    The steps of a MODEL with an adapter are the adapter's for solvers that follow its policy.
    """
    return usual_final_step_size(adapter_of(model.model_options), solver)


def usual_final_step_size(adapter: Adapter | None, solver: str) -> float:
    """Return what `final_step_size_for` returns for a MODEL with this adapter, or none."""
    usual = SOLVERS[solver].final_step_size
    if adapter is None or usual != FINAL_STEP_SIZE:
        return usual
    return adapter.final_step_size


def with_own_temperature(adapter: Adapter | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings of a solver, with the temperature of the adapter where none is set."""
    if adapter is None or adapter.temperature is None or settings.get("temperature") is not None:
        return settings
    return {**settings, "temperature": adapter.temperature}
