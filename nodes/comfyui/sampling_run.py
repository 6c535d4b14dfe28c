"""Watch every sampling of a GM model, by our samplers and by stock ones.

A wrapper for ComfyUI's SAMPLER_SAMPLE checks what goes in and what comes out, and keeps the inputs
for a GM sampler that another node calls with a function in the place of ComfyUI's model.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

import torch
from torch import Tensor

from .finite import check_inputs, report_result
from .guard import guarded
from .time_shift import check_flow

RUN = "gmflow_run"  # key in model_options


@dataclass(frozen=True, eq=False)
class Run:
    """One sampling.

    Args:
        guider: the guider, ready to be called.
        noise: (B, C, *S), before it is scaled.
        latent_image: (B, C, *S), in the model's own scale.
        sigmas: of the whole sampling.
    """

    guider: object
    noise: Tensor | None
    latent_image: Tensor | None
    sigmas: Tensor


@guarded
def watched(
    executor,
    guider,
    sigmas,
    extra_args,
    callback,
    noise,
    latent_image=None,
    denoise_mask=None,
    disable_pbar=False,
):
    """Run a sampler; a wrapper for ComfyUI's SAMPLER_SAMPLE.

    A result that is not finite is reported on the node that runs, with the likely cause.

    Raises:
        ValueError: the model's sampling is not that of a flow model, or an input is not finite.
    """
    check_flow(guider.inner_model.model_sampling)
    check_steps_taken(sigmas)
    check_inputs(guider, noise=noise, latent_image=latent_image, mask=denoise_mask, sigmas=sigmas)
    _tell_apart(guider)
    options = extra_args.get("model_options") or {}
    run = Run(guider, noise, latent_image, sigmas)
    extra_args["model_options"] = {**options, RUN: run}
    result = executor(
        guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar
    )
    report_result(result, guider)
    return result


def _tell_apart(guider: object) -> None:
    """Give conditionings ids of their own.

    Where a positive conditioning has an area, ComfyUI adds a copy of it to the negative ones, and
    the other way round, with the same id. Predictions of both would be taken for those of one.
    """
    seen = set()
    for conds in getattr(guider, "conds", {}).values():
        for number, cond in enumerate(conds or ()):
            if cond["uuid"] in seen:
                conds[number] = cond = {**cond, "uuid": uuid.uuid4()}
            seen.add(cond["uuid"])


def check_steps_taken(sigmas: object) -> None:
    """Check that sigmas are a list of numbers that leads away from pure noise.

    Raises:
        ValueError: they are not. At sigma 1 a latent has no part of the picture, and ComfyUI would
            divide by 1 - sigma.
    """
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1 or sigmas.is_complex():
        found = f"{sigmas.dtype}, {tuple(sigmas.shape)}" if isinstance(sigmas, Tensor) else ""
        raise ValueError(
            f"the sigmas are no list of numbers, but {found or type(sigmas).__name__}; connect GM "
            "Sigmas, or a stock scheduler"
        )
    if len(sigmas) and sigmas[-1] == 1:
        raise ValueError(
            f"no picture would come: the sigmas end at 1, pure noise ({len(sigmas) - 1} steps). "
            "SplitSigmas at step 0 and FlipSigmas make such: split later, or leave it out"
        )


def run_of(model, extra_args: dict) -> Run:
    """Return the sampling that a sampler function takes part in.

    Args:
        model: its first argument: ComfyUI's model, or a function that another node put in its
            place, which may have `inner_model` and `sigmas`, and calls the model inside.
        extra_args: the sampler function's `extra_args`.
    """
    seen = (extra_args.get("model_options") or {}).get(RUN)
    guider = seen.guider if seen is not None else _guider_of(model)
    return Run(
        guider,
        *(
            getattr(model, name, getattr(seen, name, None))
            for name in ("noise", "latent_image", "sigmas")
        ),
    )


def _guider_of(model) -> object:
    """Return the guider inside a model.

    Raises:
        ValueError: there is none.
    """
    while not hasattr(model, "model_patcher"):
        model = getattr(model, "inner_model", None)
        if model is None or isinstance(model, torch.nn.Module):
            raise ValueError(
                "no guider: a node around the GM sampler calls it with a model of its own, which "
                "leads to no guider of ComfyUI's; connect the GM sampler without that node"
            )
    return model
