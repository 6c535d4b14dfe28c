"""Blend prompts of regions, and guide, inside ComfyUI's process, for `around_samplers.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from inside import far, flux, ours, sample, says
from torch import Tensor


def changed_positive(work: Path) -> dict[str, Any]:
    """Guide where a node changes the positive prediction; and tell injected layers apart."""
    import comfy.model_patcher
    import comfy.samplers

    model, latent, ((text, about),) = flux(work)
    steered = ours("probabilistic_cfg").with_probabilistic_guidance(model)
    changed, injected = steered.clone(), model.clone()
    changed.set_model_sampler_pre_cfg_function(
        lambda args: [0.5 * args["conds_out"][0], *args["conds_out"][1:]]
    )
    nothing = comfy.model_patcher.PatcherInjection(inject=lambda _: None, eject=lambda _: None)
    injected.set_injections("bypass", [nothing])
    same = ours("autoguider").same_patches
    found = {"same": [same(model, model.clone()), same(injected, injected.clone())]}
    found["same"] += [same(model, injected), same(injected, model)]
    euler = comfy.samplers.sampler_object("euler")
    for name, sampler in (("euler", euler), ("gm-ode", ours("gm_sampler").gm_sampler("gm-ode"))):
        one, other = (
            sample(each, latent, [[text, about]], sampler, cfg=0.3, negative=[[-text, about]])
            for each in (changed, steered)
        )
        found[name] = ((one - other).norm() / other.norm()).item()
    return found


def regions(work: Path) -> dict[str, Any]:
    """Blend the policies of two prompts: their mean is ComfyUI's own average, and needs no shift.

    The prompts have soft masks, then areas that overlap; a default conditioning leaves only a mean.
    """
    model, latent, ((text, about),) = flux(work)
    blended = sys.modules[ours("regions").BlendedPolicy.__module__].BlendedPolicy
    shifts, moved = [], blended.moved

    def watched(policy, by: Tensor):
        shifts.append((by.abs().max() / policy.mean().abs().max()).item())
        return moved(policy, by)

    blended.moved = watched
    ramp = torch.linspace(0, 1, latent.shape[-1]).expand(1, *latent.shape[2:]).clone()
    top, bottom = (5, latent.shape[-1], 0, 0), (5, latent.shape[-1], 3, 0)
    both = {
        "masks": ({"mask": ramp}, {"mask": 1 - ramp, "mask_strength": 0.5}),
        "areas": ({"area": top, "strength": 0.7}, {"area": bottom}),
    }
    found = {}
    try:
        for name, limits in both.items():
            shifts.clear()
            positive = [
                [sign * text, {**about, **limit}]
                for sign, limit in zip((1, -1), limits, strict=True)
            ]
            sample(model, latent, positive, ours("gm_sampler").gm_sampler("gm-policy"))
            found[name] = [len(shifts), max(shifts)]
        shifts.clear()
        positive = [[text, {**about, "mask": ramp}], [-text, {**about, "default": True}]]
        sample(model, latent, positive, ours("gm_sampler").gm_sampler("gm-policy"))
        found["default"] = [len(shifts), 0.0]
        steered = ours("probabilistic_cfg").with_probabilistic_guidance(model)
        sampler, negative = ours("gm_sampler").gm_sampler("gm-policy"), [[0.5 * text, about]]
        guided, off = (
            sample(steered, latent, positive, sampler, cfg=weight, negative=negative)
            for weight in (0.3, 0.0)
        )
        found["default guided"] = [0, (guided - off).abs().max().item()]
        whole, part, away = [text, about], [-text, {**about, "area": bottom}], [0.5 * text, about]
        limited = {"area": bottom}
        for name, prompts, negative, counting in (
            ("positive", [whole, part], [away], [whole, part]),
            # ComfyUI adds the area of the negative prompt to the positive one
            ("negative", [whole], [[away[0], away[1] | limited]], [whole, [text, about | limited]]),
        ):
            alone = sample(model, latent, counting, sampler)
            hardly = sample(steered, latent, prompts, sampler, cfg=1e-4, negative=negative)
            found[f"areas, {name}"] = ((hardly - alone).norm() / alone.norm()).item()
    finally:
        blended.moved = moved
    return found


def skipped(work: Path) -> dict[str, str]:
    """Say what happens if the network call of one of two areas is skipped, as EasyCache does."""
    model, latent, ((text, about),) = flux(work)
    recorder = sys.modules[ours("regions").MixtureRecorder.__module__].MixtureRecorder
    record, seen = recorder.record, []

    def record_one_kind(self, prediction, sigma, options) -> None:
        seen.extend(options["uuids"])
        if options["uuids"][0] == seen[0]:
            record(self, prediction, sigma, options)

    positive = [[text, about], [-text, {**about, "area": (5, latent.shape[-1], 3, 0)}]]
    try:
        recorder.record = record_one_kind
        sampler = ours("gm_sampler").gm_sampler("gm-policy")
        return {"said": says(lambda: sample(model, latent, positive, sampler))}
    finally:
        recorder.record = record


def orders(work: Path) -> dict[str, list[float]]:
    """Guide before the adapter is put on the model and after it, in all of the sampling or a part.

    Returns:
        For each sampler and part, how far the order is, and how far guidance.
    """
    import comfy.samplers

    guided, found = ours("guiders").guided, {}
    samplers = {"gm-policy": ours("gm_sampler").gm_sampler("gm-policy")}
    samplers["euler"] = comfy.samplers.sampler_object("euler")
    for part in ((0.0, 1.0), (0.3, 0.8)):
        first, latent, positive = flux(work, lambda base, part=part: guided(base, 1.0, *part))
        adapted, _, ((text, about),) = flux(work)
        last, negative = guided(adapted, 1.0, *part), [[-text, about]]
        for name, sampler in samplers.items():
            before, after, off = (
                sample(model, latent, positive, sampler, cfg=weight, negative=negative)
                for model, weight in ((first, 0.3), (last, 0.3), (last, 0.0))
            )
            found[f"{name} {part}"] = [far(before, after), far(after, off)]
    return found
