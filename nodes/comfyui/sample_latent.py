"""Noise, sigmas, solver and guider in one call: sample a LATENT with a MODEL."""

from __future__ import annotations

import inspect
import logging
from dataclasses import replace

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
from torch import Tensor

from .adapter_info import few_steps_for, final_step_size_for
from .gm_model import GMModel
from .gm_sampler import gm_sampler
from .guiders import gm_guider, guided
from .label_conditioning import NO_TEXT, SOURCE
from .notices import notice
from .plain_model import sampling_of
from .probabilistic_cfg import has_probabilistic_guidance
from .solver_choice import no_effect, report_unused, resolved
from .time_shift import own_shift, own_sigmas

RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # keys of an empty LATENT


def sample_latent(
    model,
    latent: dict,
    seed: int,
    steps: int,
    solver: str,
    *,
    shift: float = 0.0,
    denoise: float = 1.0,
    positive: list | None = None,
    negative: list | None = None,
    guidance: float = 0.0,
    final_step_size: float = 0.0,
    **settings,
) -> dict:
    """Return a LATENT sampled from `latent`, with the noise that ComfyUI's own samplers would use.

    Args:
        steps: network calls; as many as suit the model if 0.
        solver: a name in SOLVERS; AUTO for the one that suits the model.
        shift: time shift of the sigmas; the model's own if 0.
        guidance: weight of probabilistic guidance.
        final_step_size: size of the last step relative to the others; if 0, the one that suits the
            model and the solver.
        settings: further arguments of `solve`.

    Raises:
        ValueError: a conditioning is missing, or the settings do not fit the model.
    """
    solver, steps = resolved(model, solver, steps)
    report_unused(solver, settings, few_steps_for(model))
    sampling = sampling_of(model)
    shift = shift or own_shift(sampling)
    final_step_size = final_step_size or final_step_size_for(model, solver)
    sigmas = own_sigmas(sampling, steps, shift, denoise, final_step_size)
    if not len(sigmas):
        no_effect("sampling", "denoise is 0: the latent stays as it is")
        return latent
    check_denoise(denoise, latent["samples"])
    samples = run_sampler(
        model,
        latent,
        gm_sampler(solver, shift, **settings),
        sigmas,
        seed,
        positive,
        negative,
        guidance,
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
    )
    samples = samples.to(comfy.model_management.intermediate_device())
    return {**{key: latent[key] for key in latent if key not in RATIOS}, "samples": samples}


def run_sampler(
    model,
    latent: dict,
    sampler: comfy.samplers.Sampler,
    sigmas: Tensor,
    seed: int,
    positive: list | None = None,
    negative: list | None = None,
    guidance: float = 0.0,
    **shown,
) -> Tensor:
    """Return samples (B, C, *S) of any SAMPLER from ComfyUI's noise for a seed.

    Args:
        guidance: weight of probabilistic guidance.
        shown: further arguments of a guider's `sample`, for its progress.

    Raises:
        ValueError: a conditioning is missing, or does not fit the model.
    """
    if positive is None and not isinstance(model.model, GMModel):
        raise ValueError(
            f"this model ({type(model.model).__name__}) is conditioned on text; connect a prompt "
            "(CLIPTextEncode) to positive"
        )
    positive = NO_TEXT if positive is None else positive
    samples = fitting_samples(model, latent)
    if guidance and not has_probabilistic_guidance(model):
        model = guided(model)
    return gm_guider(model, positive, negative, guidance).sample(
        initial_noise(latent, samples, positive, seed),
        samples,
        sampler,
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        seed=seed,
        **shown,
    )


def check_denoise(denoise: float, samples: Tensor) -> None:
    """Show on the node if it is to keep a part of an empty latent."""
    if denoise < 1 and not samples.any():
        notice(
            f"denoise {denoise:g} keeps a part of an empty latent, as if that were a picture; set "
            "denoise to 1, or connect a picture's latent",
            logging.WARNING,
        )


def initial_noise(latent: dict, samples: Tensor, positive: list, seed: int) -> Tensor:
    """Return the noise for a LATENT: that of the modes if `positive` names some, else N(0, I)."""
    source = (positive or NO_TEXT)[0][1].get(SOURCE)
    if source is None:
        return comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    return replace(source, seed=seed).generate_noise({**latent, "samples": samples})


def fitting_samples(model, latent: dict) -> Tensor:
    """Return a LATENT's samples in the model's channels and dimensions.

    Empty ones also get the model's size of a latent pixel, in the versions of ComfyUI that know it.
    """
    known = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters
    ratios = {key: latent[key] for key in RATIOS if key in latent and key in known}
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)
