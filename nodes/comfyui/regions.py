"""Policies of several positive conditionings, or of one that covers a part: areas, masks, times."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.samplers
import torch
from torch import Tensor

from ...gmflow_core import predict_x0
from ...gmflow_core.flow.blended import BlendedPolicy, Followed, Part
from .latent_shapes import SolverShape
from .recording import MixtureRecorder

LIMITS = ("area", "mask")  # keys that limit a conditioning to a part of the latent
STRENGTHS = ("strength", "mask_strength")  # and that may make it count for nothing
ROUNDING = 1e-4  # relative difference below which two means count as equal
SKIPPED = (
    "no mixture: this model predicts one at every step, and did not now, as nodes that skip "
    "network calls (EasyCache, LazyCache) make it; remove them, or use a stock sampler without "
    "probabilistic guidance"
)
TIMES = ("timestep_start", "timestep_end")  # and to a part of the steps


@dataclass(frozen=True)
class MeanOnly:
    """There is no policy for the whole latent, only a mean.

    Args:
        why: what was found instead, in words.
        advice: what to do about it.
    """

    why: str
    advice: str = "leave that out to make use of the mixture"


def policy_of(
    recorder: MixtureRecorder, conds: list[dict] | None, latent: Tensor, shape: SolverShape
) -> Followed | MeanOnly:
    """Return the policy in x_0 of a guider's positive conditionings, in the solver's shape.

    If one conditioning covers all, it is that one's policy. Otherwise the policies of those that
    count at this step are blended with the weights that ComfyUI averages their means with.

    Args:
        latent: (B, C, *S), that the model was given.

    Raises:
        ValueError: the model predicts no mixture, or none of one of the conditionings.
    """
    conds = conds or []
    active = [cond for cond in conds if cond["uuid"] in recorder.predictions]
    if not active:
        if any(_has(cond, TIMES) for cond in conds):
            return MeanOnly(
                "no positive prompt at this step", "close the gap in the prompts' timestep ranges"
            )
        raise ValueError(SKIPPED)
    if any(cond.get("default") for cond in conds):
        return MeanOnly("a default conditioning, for what others leave")
    sigma = recorder.sigmas[active[0]["uuid"]].to(latent.device)
    others = (cond for cond in conds if cond["uuid"] not in recorder.predictions)
    if any(comfy.samplers.get_area_and_mult(cond, latent, sigma) is not None for cond in others):
        raise ValueError(SKIPPED)
    parts = [_part_of(recorder, cond, latent, shape) for cond in active]
    if any(part is None for part in parts):
        return MeanOnly("predictions for parts of the latent (context windows, tiles)")
    if len(parts) == 1 and not _has(active[0], LIMITS):
        return parts[0].policy
    return BlendedPolicy(tuple(parts), shape.to_solver(latent).shape)


def moved_to(policy: Followed, mean: Tensor) -> Followed:
    """Return a policy moved so that its mean is this one; as it is if they differ by rounding."""
    shift = mean - policy.mean()
    near = shift.abs().max() <= ROUNDING * (1 + mean.abs().max())
    return policy if near else policy.moved(shift)


def covered(conds: list[dict] | None, latent: Tensor, sigma: Tensor) -> Tensor | None:
    """Return where any of a guider's conditionings of one kind counts; None if they do all over.

    Elsewhere, as outside of all masks or timestep ranges, ComfyUI's prediction is 0.

    Args:
        latent: (B, C, *S), that the model is given.
        sigma: (B,), in the model's own units.

    Returns:
        (B, 1, *S) of bool, or None.
    """
    keys = (*LIMITS, *TIMES, *STRENGTHS)
    if conds is None or any(cond.get("default") for cond in conds):
        return None
    if conds and not all(_has(cond, keys) for cond in conds):
        return None
    weight = torch.zeros_like(latent[:, :1])
    for cond in conds:
        about = comfy.samplers.get_area_and_mult(cond, latent, sigma)
        if about is not None:
            window = SolverShape().window(about.area, latent.ndim - 2)
            weight[(slice(None), slice(None), *window)] += about.mult[:, :1].abs()
    return weight > 0


def _has(cond: dict, keys: tuple[str, ...]) -> bool:
    return any(cond.get(key) is not None for key in keys)


def _part_of(
    recorder: MixtureRecorder, cond: dict, latent: Tensor, shape: SolverShape
) -> Part | None:
    """Return the policy of one conditioning, with its weight and place; None if it does not fit.

    x_0 = x - sigma u has the sigma that the network was given, as in ComfyUI's own prediction: a
    node around the sampler may have changed the solver's sigma on its way.
    """
    uuid = cond["uuid"]
    prediction, sigma = recorder.predictions[uuid].to(latent.device), recorder.sigmas[uuid]
    about = comfy.samplers.get_area_and_mult(cond, latent, sigma.to(latent.device))
    if about is None:
        return None
    window = shape.window(about.area, latent.ndim - 2)
    x = shape.to_solver(about.input_x)
    if window is None or not prediction.fits(x):
        return None
    sigma = sigma.to(x.device)
    sigma = sigma.repeat_interleave(len(x) // len(sigma))  # each latent may be many points
    weight = shape.to_solver(about.mult)[:, :1]
    return Part(predict_x0(prediction, x, sigma), weight, window, uuid)
