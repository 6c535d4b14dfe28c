"""GM samplers and the GM schedule in ComfyUI's own lists: KSampler, KSamplerSelect and others.

ComfyUI looks a sampler up by its name: the function `sample_<name>` in k-diffusion's module. Names
are appended to the lists that are there, and nothing is reloaded.
"""

from __future__ import annotations

import logging

import comfy.samplers
from torch import Tensor

from .gm_sampler import gm_sampler
from .time_shift import own_sigmas

SAMPLERS = {"gm_ode": "gm-ode", "gm_sde": "gm-sde", "gm_policy": "gm-policy"}  # name: solver
SCHEDULER = "gm"
MARK = "of_gmflow"  # attribute of our functions, by which a later import knows them


def gm_schedule(model_sampling, steps: int) -> Tensor:
    """Return `steps` + 1 sigmas: even steps before the model's own time shift.

    A GM adapter brings its shift, and the size of its last step.
    """
    final_step_size = getattr(model_sampling, "final_step_size", 1.0)
    return own_sigmas(model_sampling, steps, final_step_size=final_step_size)


setattr(gm_schedule, MARK, True)


def add_to_stock_lists() -> None:
    """Add our samplers and our schedule to ComfyUI's lists, each name once.

    A name that another extension has taken stays as it is, with a line in the log.
    """
    module = comfy.samplers.k_diffusion_sampling
    for name, solver in SAMPLERS.items():
        present = getattr(module, _function_of(name), None)
        if _is_foreign(name, present, name in comfy.samplers.KSampler.SAMPLERS):
            continue
        function = gm_sampler(solver).sampler_function
        setattr(function, MARK, True)
        setattr(module, _function_of(name), function)
        _append(name, comfy.samplers.SAMPLER_NAMES, comfy.samplers.KSampler.SAMPLERS)
    handlers = comfy.samplers.SCHEDULER_HANDLERS
    present = handlers.get(SCHEDULER)
    if not _is_foreign(SCHEDULER, getattr(present, "handler", None), present is not None):
        handlers[SCHEDULER] = comfy.samplers.SchedulerHandler(handler=gm_schedule, use_ms=True)
        _append(SCHEDULER, comfy.samplers.SCHEDULER_NAMES, comfy.samplers.KSampler.SCHEDULERS)


def remove_from_stock_lists() -> None:
    """Take our samplers and our schedule out of ComfyUI's lists again."""
    module = comfy.samplers.k_diffusion_sampling
    for name in SAMPLERS:
        if getattr(getattr(module, _function_of(name), None), MARK, False):
            delattr(module, _function_of(name))
            _remove(name, comfy.samplers.SAMPLER_NAMES, comfy.samplers.KSampler.SAMPLERS)
    handlers = comfy.samplers.SCHEDULER_HANDLERS
    if getattr(getattr(handlers.get(SCHEDULER), "handler", None), MARK, False):
        del handlers[SCHEDULER]
        _remove(SCHEDULER, comfy.samplers.SCHEDULER_NAMES, comfy.samplers.KSampler.SCHEDULERS)


def _function_of(name: str) -> str:
    return f"sample_{name}"


def _is_foreign(name: str, present: object, is_listed: bool) -> bool:
    """Return whether another extension has taken a name."""
    foreign = (is_listed or present is not None) and not getattr(present, MARK, False)
    if foreign:
        logging.warning("GMFlow: another extension has taken the name %s; it stays as it is", name)
    return foreign


def _append(name: str, *lists: list[str]) -> None:
    """Append a name to each of the lists that lacks it; two of them may be the same one."""
    for each in lists:
        if name not in each:
            each.append(name)


def _remove(name: str, *lists: list[str]) -> None:
    """Remove a name from each of the lists that has it."""
    for each in lists:
        if name in each:
            each.remove(name)
