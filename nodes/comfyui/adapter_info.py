"""Facts about models of few steps: those of GM adapters, and of networks that were distilled.

An adapter's are kept in the model's transformer options, a network's in the network itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from ...gmflow_core.sampling.solvers import FINAL_STEP_SIZE, SOLVERS
from .bases import Base

ADAPTER = "gmflow_adapter"  # key in transformer_options
# settings of the policy sampler that a policy does not use
UNUSED = {"GMFlow": (), "DX": ("temperature",), "ArcFlow": ("temperature", "substeps")}


@dataclass(frozen=True, kw_only=True)
class FewSteps:
    """What a model of few steps was made for.

    Args:
        name: for messages.
        steps: the fewest steps.
        final_step_size: size of the last step, relative to the others.
        temperature: of its mixture at all steps but the last; None for the usual one of the number
            of steps.
        policy: kind of policy that it predicts.
    """

    name: str
    steps: int
    final_step_size: float = FINAL_STEP_SIZE
    temperature: float | None = None
    policy: str = "GMFlow"


@dataclass(frozen=True, kw_only=True)
class Student(FewSteps):
    """A network that was distilled, as samplers see it.

    Args:
        guidance: that of its teacher, in words, which it has built in; "" if there was none.
    """

    guidance: str = ""

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Student:
        """Return the student of a checkpoint's record, see `gmflow_core.save_checkpoint`."""
        names = ("steps", "final_step_size", "temperature", "policy", "guidance")
        facts = {name: record[name] for name in names if name in record}
        return cls(name="this model", **facts)


@dataclass(frozen=True, kw_only=True)
class Adapter(FewSteps):
    """A GM adapter as samplers see it.

    Args:
        base: the entry of the base model it is for.
        guidance: the distilled guidance it expects; None if the base model takes none.
        details: what its file holds, for people to read.
    """

    base: Base
    guidance: float | None
    details: str = ""


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


def few_steps_of(model_options: dict | None, network: object) -> FewSteps | None:
    """Return what a model of few steps was made for; None for other models.

    Args:
        model_options: of the model, where its adapter is.
        network: its `diffusion_model`, which may have been distilled.
    """
    return adapter_of(model_options) or getattr(network, "student", None)


def few_steps_for(model) -> FewSteps | None:
    """Return what a MODEL of few steps was made for; None for other models."""
    return few_steps_of(model.model_options, model.get_model_object("diffusion_model"))


def final_step_size_for(model, solver: str) -> float:
    """Return the usual size of the last step of a solver: its own, or the model's.

    The steps of a MODEL of few steps are its own for solvers that follow its policy.
    """
    return usual_final_step_size(few_steps_for(model), solver)


def usual_final_step_size(few_steps: FewSteps | None, solver: str) -> float:
    """Return what `final_step_size_for` returns for a MODEL of few steps, or another one."""
    usual = SOLVERS[solver].final_step_size
    if few_steps is None or usual != FINAL_STEP_SIZE:
        return usual
    return few_steps.final_step_size


def with_own_temperature(few_steps: FewSteps | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings of a solver, with the model's own temperature where none is set."""
    own = None if few_steps is None else few_steps.temperature
    if own is None or settings.get("temperature") is not None:
        return settings
    return {**settings, "temperature": own}
