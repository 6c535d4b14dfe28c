"""Warn if what is sampled does not fit the GM adapter on the model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...gmflow_core import unshift_time
from ...gmflow_core.files.errors import quoted
from .adapter_info import Adapter, FewSteps, Student, adapter_of
from .advice import set_cfg, set_guidance, set_steps
from .guard import guarded
from .latent_check import check_conditioning, check_latent
from .notices import clear, notice
from .probabilistic_cfg import has_probabilistic_guidance
from .unloading import make_loadable


@guarded
def check_settings(executor, noise: Tensor, latent_image: Tensor, *args, **kwargs):
    """Check latent and conditioning, and warn about guidance and LoRAs that do not fit.

    It is a wrapper for ComfyUI's OUTER_SAMPLE, so that stock samplers warn too.
    """
    clear()
    guider = executor.class_obj
    check_latent(guider.model_patcher, latent_image)
    uses_negative = not math.isclose(getattr(guider, "cfg", 1.0), 1.0)
    needed = ("positive", "negative") if uses_negative else ("positive",)
    check_conditioning(guider.model_patcher, getattr(guider, "conds", {}), needed)
    make_loadable(guider.model_patcher)
    adapter = adapter_of(guider.model_options)
    if adapter.guidance is not None:
        _check_guidance(guider, adapter)
    places = tuple(f"diffusion_model.{name}." for name in adapter.base.layers)
    _check_time(guider, adapter)
    lost = sorted(key for key in guider.model_patcher.patches if key.startswith(places))
    if lost:
        notice(
            f"a part of a LoRA has no effect: it changes {', '.join(lost)}, which the head of "
            f"{adapter.name} replaces. The rest of the LoRA works; nothing needs to be done"
        )
    return executor(noise, latent_image, *args, **kwargs)


def _check_time(guider, adapter: Adapter) -> None:
    """Warn if the network is fed times in another unit than its base model's."""
    sampling = guider.model_patcher.get_model_object("model_sampling")
    fed = float(sampling.timestep(torch.tensor(0.5)))
    expected = 0.5 * adapter.base.multiplier
    if not math.isclose(fed, expected, rel_tol=1e-3):
        notice(
            f"times in a wrong unit, expect poor images: at sigma 0.5 {adapter.base.name} is fed "
            f"{fed:g} instead of {expected:g}, as ModelSamplingSD3 does it; use ModelSamplingFlux "
            "or ModelSamplingAuraFlow for another shift"
        )


def _check_guidance(guider, adapter: Adapter) -> None:
    """Warn if the distilled guidance differs from the adapter's, or if cfg is applied as well."""
    conds = [cond for conds in getattr(guider, "conds", {}).values() for cond in conds or []]
    default = adapter.base.default_guidance
    given = {_guidance_in(cond.get("guidance", default), adapter) for cond in conds}
    others = given - {adapter.guidance}
    if others:
        asked = sorted("none at all" if value is None else f"{value:g}" for value in others)
        notice(
            f"guidance {', '.join(asked)} does not fit: {adapter.name} was made with a guidance of "
            f"{adapter.guidance:g}, and any other gives poor images; "
            f"{set_guidance(adapter.guidance)}"
        )
    _check_cfg(
        guider,
        "this base model has its guidance built in (distilled) and was not trained with negative "
        "prompts, so expect poor images",
    )


def report_guidance(guider, made_for: FewSteps) -> None:
    """Warn if guidance is applied to a model that was distilled with its teacher's guidance."""
    if isinstance(made_for, Student) and made_for.guidance:
        _check_cfg(
            guider,
            f"this model has its teacher's guidance built in ({made_for.guidance}) and never saw "
            "an empty label",
        )


def _check_cfg(guider, why: str) -> None:
    """Warn if a guider applies guidance to a model that has its own.

    Args:
        why: it does not fit, in words.
    """
    cfg, off = getattr(guider, "cfg", 1.0), 1.0
    if has_probabilistic_guidance(guider.model_patcher):
        off = 0.0
    if cfg != off:
        notice(f"{'cfg' if off else 'guidance'} {cfg:g} does not fit: {why}; {set_cfg(off)}")


def _guidance_in(value: object, adapter: Adapter) -> float | None:
    """Return the distilled guidance of a conditioning.

    Raises:
        ValueError: it is no finite number.
    """
    if value is None:
        return None
    try:
        number = float(value) if not isinstance(value, str) else math.nan
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"the guidance in the conditioning is {quoted(value)}, no finite number; set "
            f"FluxGuidance to {adapter.guidance:g}"
        )
    return number


def check_steps(made_for: FewSteps, sigmas: Tensor, shift: float) -> None:
    """Warn if a step is longer, in unshifted time, than those a model was made for."""
    times = unshift_time(sigmas.double().cpu(), shift)
    longest, usual = float(-times.diff().min()), 1 / (made_for.steps - 1 + made_for.final_step_size)
    steps = len(sigmas) - 1
    if longest > 1.01 * usual:
        enough = steps >= made_for.steps
        what = "a step is too long" if enough else f"too few steps ({steps})"
        least = f"{made_for.name} was made for {made_for.steps} steps or more"
        notice(
            f"{what}, expect artefacts: {least}, "
            f"each at most {usual:.3f} of the way, and the longest of these {steps} goes "
            f"{longest:.3f}; {set_steps(made_for.steps, enough)}"
        )
