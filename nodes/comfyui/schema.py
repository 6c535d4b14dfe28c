"""Inputs and outputs that several nodes share, with their tooltips."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

from comfy_api.latest import io

from ...gmflow_core.sampling.solvers import FINAL_STEP_SIZE, SOLVERS
from .solver_choice import AUTO

# options of an input that the page shows under "advanced", where the version of ComfyUI can
ADVANCED = {"advanced": True} if "advanced" in inspect.signature(io.Int.Input).parameters else {}
MOST_STOCHASTIC = 100.0  # value of a widget that stands for infinity
WEIGHT = (
    "The weight w of probabilistic guidance: how many standard deviations of the prediction it "
    "shifts the samples away from the negative conditioning. 0 is off; 0.1 suits the "
    "emoji, 0.05 to 0.2 the digits, and the paper's ImageNet demo uses 0.45."
)


def node_schema(aliases: str, **about: Any) -> io.Schema:
    """Return the schema of a node; fields that an older ComfyUI lacks are left out.

    Args:
        aliases: words that people search for, separated by commas.
        about: fields of `io.Schema`.
    """
    about["search_aliases"] = aliases.split(", ")
    known = {field.name for field in dataclasses.fields(io.Schema)}
    return io.Schema(**{name: value for name, value in about.items() if name in known})


def model_input() -> io.Input:
    """Return the input for a MODEL, whether it predicts a mixture or not."""
    return io.Model.Input(
        "model",
        tooltip="A model from GM Load Model or GM Adapter, which predicts a mixture; or any other "
        "model of images or videos, which counts as one Gaussian (GM Spread).",
    )


def positive_input() -> io.Input:
    """Return the optional input for what is generated."""
    return io.Conditioning.Input(
        "positive",
        optional=True,
        tooltip="What to generate: from GM Class Labels, or a prompt for models of text; leave it "
        "open for models that take no conditioning.",
    )


def negative_input() -> io.Input:
    """Return the optional input for what guidance steers away from."""
    return io.Conditioning.Input(
        "negative",
        optional=True,
        tooltip="What guidance steers away from. If nothing is connected, models of classes steer "
        "away from no class.",
    )


def conditioning_inputs(note: str = "") -> list[io.Input]:
    """Return the optional inputs for both conditionings and the weight of guidance.

    Args:
        note: after the tooltip of the weight.
    """
    guidance = weight_input("guidance", default=0.0, note=note, optional=True)
    return [positive_input(), negative_input(), guidance]


def empty_latent_input(note: str = "") -> io.Input:
    """Return the input for the latent of nodes that show what a model makes of noise.

    Args:
        note: after the tooltip.
    """
    return io.Latent.Input(
        "latent_image",
        tooltip=f"An empty latent of the model's size, as for GM Sampler.{note}",
    )


def solver_input(tooltip: str) -> io.Input:
    """Return the input for the choice of a solver."""
    return io.Combo.Input("solver", options=[AUTO, *SOLVERS], default=AUTO, tooltip=tooltip)


def vae_input() -> io.Input:
    """Return the optional input for the VAE that makes pictures of samples."""
    return io.Vae.Input(
        "vae",
        optional=True,
        tooltip="The VAE of a model that samples latents. Models of points and of pixels (the "
        "checkerboard, emoji, digits) need none; without one, latents are shown in approximate "
        "colours.",
    )


def seed_input(name: str, tooltip: str, stays: bool = False) -> io.Input:
    """Return the input for a 64-bit seed.

    Args:
        stays: True if the page is to keep the seed after a run, unless told otherwise; older
            versions of ComfyUI draw a new one.
    """
    fixed = getattr(getattr(io, "ControlAfterGenerate", None), "fixed", True)
    return io.Int.Input(
        name,
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=fixed if stays else True,
        tooltip=tooltip,
    )


def steps_input(default: int) -> io.Input:
    """Return the input for the number of network calls; 0 as default means the model's own."""
    own = "" if default else " 0 uses as many as the GM adapter was made for, or 4 without one."
    return io.Int.Input(
        "steps",
        default=default,
        min=1 if default else 0,
        max=1000,
        tooltip=f"Network calls. GM samplers are made for 4 to 8.{own}",
    )


def order_input(**options) -> io.Input:
    """Return the input for the order of GM-ODE and GM-SDE."""
    return io.Int.Input(
        "order",
        default=2,
        min=1,
        max=2,
        tooltip="2 corrects each predicted mixture with the previous one; 1 uses it as predicted. "
        "For gm-ode and gm-sde.",
        **options,
    )


def shift_input(default: float, lowest: float, **options) -> io.Input:
    """Return the input for the time shift; `lowest` 0 makes 0 stand for the model's own."""
    own = (
        " 0 uses the model's own shift: 1 for the models of this extension; with a GM adapter 3.2, "
        "or what its file says."
    )
    return io.Float.Input(
        "shift",
        default=default,
        min=lowest,
        max=100.0,
        step=0.01,
        tooltip="Time shift: above 1 spends more of the steps at high noise."
        + ("" if lowest else own),
        **options,
    )


def denoise_input() -> io.Input:
    """Return the input for the share of the way from noise to image that is sampled."""
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="1 starts from pure noise; below 1, sampling starts from the latent with that "
        "share of noise added (image to image).",
    )


def final_step_size_input(own: str, **options) -> io.Input:
    """Return the input for the size of the last step; `own` says what 0 stands for."""
    return io.Float.Input(
        "final_step_size",
        default=0.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="Size of the last step relative to the others. 0 uses the adapter's own: "
        f"{FINAL_STEP_SIZE:g} for those of pi-Flow, 1 for those of ArcFlow, or what the file says"
        f"{own}.",
        **options,
    )


def policy_inputs(note: str = "", **options) -> list[io.Input]:
    """Return the inputs for the policy sampler's randomness, their tooltips prefixed by `note`."""
    return [
        io.Float.Input(
            "temperature",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip=f"{note}Below 1 it sharpens the mixture at all steps but the last. 0 is "
            "automatic: what the adapter's file says, or else 0.1 * (steps - 1), at most 1 (0.3 "
            "for 4 steps). If the sigmas are split over several samplers, set it by hand, as each "
            "sampler counts only its own steps. DX and ArcFlow policies have none.",
            **options,
        ),
        io.Float.Input(
            "stochasticity",
            default=0.0,
            min=0.0,
            max=MOST_STOCHASTIC,
            step=0.01,
            tooltip=f"{note}0 is deterministic. Above 0 every step goes further down in noise and "
            f"adds fresh noise back; 1 is as stochastic as the SDE of DDPM; {MOST_STOCHASTIC:g} "
            "stands for infinity: every step goes down to an image and starts again from fresh "
            "noise.",
            **options,
        ),
    ]


def stochasticity_of(value: float) -> float:
    """Return the stochasticity that a widget's value means: the highest one is infinity."""
    return math.inf if value >= MOST_STOCHASTIC else value


def weight_input(name: str, default: float, note: str = "", **options) -> io.Input:
    """Return the input for the weight of probabilistic guidance."""
    return io.Float.Input(
        name,
        default=default,
        min=0.0,
        max=0.99,
        step=0.01,
        tooltip=WEIGHT + note,
        **options,
    )


def guidance_inputs() -> list[io.Input]:
    """Return the inputs for the settings of probabilistic guidance other than its weight."""
    return [
        io.Float.Input(
            "orthogonal",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="How much of the guidance's component along the prediction itself is removed: "
            "1, the paper's choice, lets hardly more values leave their range.",
            **ADVANCED,
        ),
        *interval_inputs("the negative conditioning is not computed"),
    ]


def interval_inputs(saved: str) -> list[io.Input]:
    """Return the inputs for the guided part of the sampling.

    Args:
        saved: what is saved outside of that part, for the tooltip.
    """
    percent = {"min": 0.0, "max": 1.0, "step": 0.001, **ADVANCED}
    return [
        io.Float.Input(
            "start_percent",
            default=0.0,
            tooltip="Guidance begins at this share of the sampling (0 is pure noise); nothing is "
            "guided before it.",
            **percent,
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            tooltip="Guidance ends at this share of the sampling (1 is the finished image). "
            f"Outside of the interval {saved}.",
            **percent,
        ),
    ]


def sampler_output() -> io.Output:
    """Return the SAMPLER output."""
    return io.Sampler.Output(tooltip="For SamplerCustomAdvanced or SamplerCustom.")


def sigmas_output() -> io.Output:
    """Return the SIGMAS output."""
    return io.Sigmas.Output(tooltip="For SamplerCustomAdvanced or SamplerCustom.")


def guider_output() -> io.Output:
    """Return the GUIDER output."""
    return io.Guider.Output(tooltip="For SamplerCustomAdvanced, with any sampler.")
