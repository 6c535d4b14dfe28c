"""Models that predict no mixture: one Gaussian (K = 1) around their mean, of a set spread."""

from __future__ import annotations

import comfy.model_sampling
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...gmflow_core import GaussianMixture
from ...gmflow_core.flow.single_gaussian import USUAL_SPREAD, single_gaussian
from .adapter_info import adapter_of
from .gm_model import GMModel
from .guard import guarded
from .latent_shapes import SolverShape
from .notices import clear
from .regions import covered
from .solver_choice import no_effect
from .time_shift import check_flow

SPREAD = "gmflow_spread"  # key in model_options, and of our wrapper
USE = "gmflow_spread_use"  # key in the model_options of one sampling


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


def gaussian_of(
    mean: Tensor,
    sigma: Tensor,
    model_options: dict | None,
    conds: list[dict] | None,
    latent: Tensor,
    latent_sigma: Tensor,
    shape: SolverShape,
) -> GaussianMixture:
    """Return the one Gaussian of x_0 around a model's mean, both in the solver's shape.

    Where no positive conditioning counts, the mean is ComfyUI's 0 and no prediction: it is
    followed as it is, with no spread.

    Args:
        sigma: (B,), on the straight path.
        conds: the guider's positive conditionings.
        latent, latent_sigma: what the model was given, in its own units.
    """
    spread, counts = spread_of(model_options), covered(conds, latent, latent_sigma)
    if counts is not None:
        spread = spread * shape.to_solver(counts.to(mean.dtype))
    return single_gaussian(mean, sigma, spread)


def spread_in_words(model_options: dict | None) -> str:
    """Describe what a model that predicts no mixture is sampled with, for a message."""
    return f"one Gaussian (K = 1) of spread {spread_of(model_options):.3g}"


def with_spread(model, spread: float):
    """Return a clone of a MODEL with this spread of the velocity, or the usual one for 0."""
    model = model.clone()
    if predicts_mixture(model.model, model.model_options):
        say_own_mixture()
        return model
    model.model_options[SPREAD] = spread or USUAL_SPREAD
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, SPREAD)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, SPREAD, report_unused_spread)
    return model


def say_own_mixture() -> None:
    """Show on the node that runs that a set spread has no effect on its model."""
    no_effect("GM Spread", "this model predicts its own mixture")


def without_spread(guide, model):
    """Return a clone of the guide of autoguidance without a set spread: the model's counts."""
    guide = guide.clone()
    spread = guide.model_options.pop(SPREAD, None)
    guide.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, SPREAD)
    if spread not in (None, model.model_options.get(SPREAD)):
        no_effect("GM Spread on the guide", "only that of the model counts")
    return guide


class SpreadUse:
    """Whether a sampling has made use of the spread."""

    made = False


def note_use(model_options: dict | None) -> None:
    """Note that a sampling with these options makes use of the spread."""
    use = (model_options or {}).get(USE)
    if use is not None:
        use.made = True


@guarded
def report_unused_spread(executor, *args, **kwargs) -> Tensor:
    """Show on the node that a set spread had no effect; a wrapper for ComfyUI's OUTER_SAMPLE.

    It is known at the end only, as a node around a sampler may hide which one it is.
    """
    clear()
    guider, use = executor.class_obj, SpreadUse()
    guider.model_options[USE] = use
    result = executor(*args, **kwargs)
    if predicts_mixture(guider.model_patcher.model, guider.model_options):  # a node after ours
        say_own_mixture()
    elif not use.made:
        no_effect(
            "GM Spread",
            "this sampler follows the mean alone; choose gm_ode, gm_sde or gm_policy, or a weight "
            "of GM Probabilistic Guidance",
        )
    return result
