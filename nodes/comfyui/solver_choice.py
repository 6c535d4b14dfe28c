"""Choose the solver and the number of steps for a model, and say which settings have no effect."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from ...gmflow_core.flow.path import unshift_time
from ...gmflow_core.sampling.solvers import SOLVERS, usual_temperature
from .adapter_info import UNUSED, FewSteps, few_steps_for, usual_final_step_size
from .notices import notice

AUTO = "auto"  # choice of the solver that suits the model
STEPS = 4  # network calls for a model that was made for no number of steps
ROUNDING = 0.02  # of sizes of steps: schedules of tables are uneven by about 1 %
# values that settings have if the user leaves them alone
UNSET = {"order": 2, "substeps": None, "temperature": None, "stochasticity": 0.0}


def solver_for(model) -> str:
    """Return the solver that suits a MODEL.

    It is gm-policy for a model of few steps (behind an adapter, or distilled), euler for a model
    with a mixture source that does not know its modes (mixture solvers have no closed form for
    it), and gm-ode for every other model.
    """
    if few_steps_for(model) is not None:
        return "gm-policy"
    record = getattr(model.get_model_object("diffusion_model"), "source", None)
    if record is not None and record["conditioning"] != "mode":
        return "euler"
    return "gm-ode"


def steps_for(model) -> int:
    """Return the number of steps that suits a MODEL: what it was made for, else STEPS."""
    few_steps = few_steps_for(model)
    return STEPS if few_steps is None else few_steps.steps


def resolved(model, solver: str, steps: int) -> tuple[str, int]:
    """Return the solver, and the number of steps: those that suit a MODEL for AUTO and 0."""
    return solver_for(model) if solver == AUTO else solver, steps or steps_for(model)


def is_unconditional(model) -> bool:
    """Return whether a MODEL's network takes no conditioning, neither classes nor text."""
    return not getattr(model.get_model_object("diffusion_model"), "takes_labels", True)


def _unusual_times(
    sigmas: Tensor, shift: float, final_step_size: float, highest: float
) -> list[str]:
    """Return what a time grid down to 0 has that is not usual: where it starts, its last step.

    Args:
        highest: sigma of pure noise.
        final_step_size: the usual size of the last step relative to the others.
    """
    times, found = unshift_time(sigmas.double().cpu(), shift), []
    if times[-1] > 0:
        return found  # of several samplers, not the last
    share = float(times[0]) / unshift_time(highest, shift)
    if share < 1 - ROUNDING:
        found.append(f"the last {share:.3g} of the way")
    *others, last = (-times.diff() / -times.diff()[0]).tolist()
    are_equal = others and all(abs(size - 1) < ROUNDING for size in others)
    if are_equal and last > 1 + ROUNDING:  # no schedule's, but of a stage that goes on to 0
        found.append(f"last step {last:.2g} times as long as the others")
    elif are_equal and abs(last - final_step_size) > ROUNDING:
        found.append(f"final step size {last:.2g}")
    return found


def no_effect(what: str, why: str) -> None:
    """Show on the node that runs that a setting has no effect, and why."""
    notice(f"no effect: {what}, as {why}", logging.INFO)


def report_unused(solver: str, settings: dict[str, Any], few_steps: FewSteps | None = None) -> None:
    """Show on the node which of the settings a solver, or the model's policy, does not use."""
    changed = [name for name, usual in UNSET.items() if settings.get(name, usual) != usual]
    unused = [name for name in changed if name not in SOLVERS[solver].settings]
    if unused:
        no_effect(" and ".join(unused), f"{solver} does not use {'them' if unused[1:] else 'it'}")
    if few_steps is not None and solver == "gm-policy":
        idle = [name for name in changed if name in UNUSED[few_steps.policy]]
        if idle:
            why = f"{few_steps.name} has a policy of type {few_steps.policy}"
            no_effect(" and ".join(idle), why)


def report_settings(
    solver: str,
    sigmas: Tensor,
    shift: float,
    settings: dict[str, Any],
    guidance: str = "",
    few_steps: FewSteps | None = None,
    highest: float = 1.0,
) -> None:
    """Show on the node, in one line, what a solver runs with.

    Args:
        sigmas: those of all steps, and the last one's end.
        shift: time shift of the sigmas.
        settings: further arguments of `solve`; those that the solver does not take are left out.
        guidance: the guider's guidance, in words; "" if there is none.
        few_steps: of the model, whose policy may not use some of them.
        highest: sigma of the model's pure noise, below 1 for models of epsilon or v.
    """
    known, steps = SOLVERS[solver], len(sigmas) - 1
    unused = UNUSED[few_steps.policy] if few_steps and solver == "gm-policy" else ()
    about = [f"{steps} step{'s' if steps > 1 else ''}", f"shift {shift:.3g}"]
    about += _unusual_times(sigmas, shift, usual_final_step_size(few_steps, solver), highest)
    if "order" in known.settings:
        about.append(f"order {settings.get('order', 2)}")
    if "spectrum" in known.settings and settings.get("spectrum") is not None:
        about.append("with its spectrum network")
    if "temperature" in known.settings and "temperature" not in unused:
        temperature = settings.get("temperature")
        about.append(
            f"temperature {usual_temperature(steps) if temperature is None else temperature:.3g}"
        )
    if known.substeps and "substeps" not in unused:
        substeps = settings.get("substeps") or known.substeps
        about.append(f"{substeps} substep{'s' if substeps > 1 else ''}")
    if "stochasticity" in known.settings and settings.get("stochasticity"):
        about.append(f"stochasticity {settings['stochasticity']:.3g}")
    notice(f"{solver}: {', '.join([*about, *filter(None, [guidance])])}", logging.DEBUG)
