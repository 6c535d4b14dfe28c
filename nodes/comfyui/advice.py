"""Advice that names the nodes of the prompt that runs, and else the node to add."""

from __future__ import annotations

from .graph import closest, connected

GUIDANCE_NODES = ("FluxGuidance", "CLIPTextEncodeFlux")  # that set distilled guidance
OUR_GUIDANCE = {"GMFlowSampler": "guidance", "GMFlowGuider": "scale"}  # probabilistic, by node
SCHEDULES = ("GMFlowPolicySigmas", "GMFlowSigmas", "GMFlowSampler")  # with steps as adapters want


def set_guidance(value: float) -> str:
    """Return how to set the distilled guidance of the conditioning that is used."""
    found = closest("guidance", of=GUIDANCE_NODES)
    if found:
        return f"set guidance of {found} to {value:g}"
    disabled = closest("conditioning", of=("FluxDisableGuidance",))
    if disabled:
        return f"replace {disabled} by FluxGuidance with {value:g}"
    return f"add FluxGuidance with {value:g} after the prompt"


def set_cfg(value: float) -> str:
    """Return how to set the guidance scale of the sampler or guider that is used."""
    found = closest("cfg")
    if found:
        return f"set cfg of {found} to {value:g}"
    for kind, setting in OUR_GUIDANCE.items():
        found = closest(setting, of=(kind,))
        if found:
            return f"set {setting} of {found} to 0"
    return "use Basic Guider, which applies none"


def set_weight() -> str:
    """Return how to set the weight of probabilistic guidance."""
    found = closest("cfg")
    if found:
        return f"set cfg of {found} to a weight in [0, 1), 0.1 to 0.5 are usual"
    return "use GM Guider or CFG Guider, as Basic Guider has no cfg"


def set_steps(steps: int, enough: bool) -> str:
    """Return how to make steps as short as those of a schedule with `steps` steps.

    Args:
        enough: whether there are as many steps now, and only their lengths are wrong.
    """
    ours, other = closest("steps", of=SCHEDULES), closest("steps", but=SCHEDULES)
    if ours and not enough:
        return f"set steps of {ours} to {steps} or more (with denoise below 1, the same share)"
    schedule = f"GM Policy Sigmas with {steps} steps or more"
    sigmas = connected("sigmas")
    if sigmas and not ours:
        return f"use {schedule} in the place of {sigmas}"
    if ours:
        return f"set final_step_size and shift of {ours} to 0, or use more steps"
    if other:
        return f"set steps of {other} higher, or use GM Sampler with {steps} steps"
    return f"use {schedule}"


def set_noise(node: str) -> str:
    """Return how to sample with the noise of another node."""
    found = connected("noise")
    if found:
        return f"connect {node} to noise, in the place of {found}"
    return f"use SamplerCustomAdvanced with {node} on noise"
