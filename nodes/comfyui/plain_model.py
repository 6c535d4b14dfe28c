"""Models that predict no mixture: one Gaussian (K = 1) around their mean, of a set spread."""

from __future__ import annotations

import comfy.model_sampling

from ...gmflow_core.flow.single_gaussian import USUAL_SPREAD
from .adapter_info import adapter_of
from .gm_model import GMModel
from .solver_choice import no_effect
from .time_shift import check_flow

SPREAD = "gmflow_spread"  # key in model_options


def predicts_mixture(model, model_options: dict | None) -> bool:
    """Return whether ComfyUI's model, with these options, predicts a mixture or another policy."""
    return isinstance(model, GMModel) or adapter_of(model_options) is not None


def sampling_of(model) -> comfy.model_sampling.ModelSamplingDiscrete:
    """Return a MODEL's sampling, of whatever class it is.

    Raises:
        ValueError: the model predicts velocities of a flow, and its sampling is another.
    """
    sampling = model.get_model_object("model_sampling")
    if predicts_mixture(model.model, model.model_options):
        check_flow(sampling)
    return sampling


def spread_of(model_options: dict | None) -> float:
    """Return the spread of the velocity that is set in the options of a model, or the usual one."""
    return (model_options or {}).get(SPREAD, USUAL_SPREAD)


def spread_in_words(model_options: dict | None) -> str:
    """Describe what a model that predicts no mixture is sampled with, for a message."""
    return f"one Gaussian (K = 1) of spread {spread_of(model_options):.3g}"


def with_spread(model, spread: float):
    """Return a clone of a MODEL with this spread of the velocity, or the usual one for 0."""
    if predicts_mixture(model.model, model.model_options):
        no_effect("spread", "this model predicts its own mixture")
    model = model.clone()
    model.model_options[SPREAD] = spread or USUAL_SPREAD
    return model
