"""Make guiders that use probabilistic guidance."""

from __future__ import annotations

import comfy.samplers

from .gm_model import GMModel
from .label_conditioning import unconditional
from .latent_check import check_conditioning
from .notices import notice
from .paths import path_of
from .plain_model import sampling_of
from .probabilistic_cfg import (
    asks_for_negative,
    has_probabilistic_guidance,
    with_probabilistic_guidance,
)
from .solver_choice import is_unconditional, no_effect


def guided_interval(model, start_percent: float, end_percent: float) -> tuple[float, float]:
    """Return the sigmas (low, high) of a part of a MODEL's sampling, which goes from 0 to 1.

    They are in the model's own units.

    Raises:
        ValueError: the part is empty.
    """
    check_part(start_percent, end_percent)
    sampling = model.get_model_object("model_sampling")
    return sampling.percent_to_sigma(end_percent), sampling.percent_to_sigma(start_percent)


def check_part(start_percent: float, end_percent: float) -> None:
    """Check that a part of the sampling, which goes from 0 to 1, is not empty.

    Raises:
        ValueError: it is.
    """
    if start_percent > end_percent:
        raise ValueError(
            f"start_percent {start_percent:g} comes after end_percent {end_percent:g}; sampling "
            "goes from 0 to 1, so the start must be the smaller one"
        )


def guided(model, orthogonal: float = 1.0, start_percent: float = 0.0, end_percent: float = 1.0):
    """Return a clone of the MODEL whose `cfg` is the weight of probabilistic guidance.

    Raises:
        ValueError: the interval is empty, or the model's sampling is none that is known.
    """
    path_of(sampling_of(model))  # refuses a sampling here, rather than when it runs
    check_part(start_percent, end_percent)
    return with_probabilistic_guidance(model, orthogonal, (start_percent, end_percent))


def guidance_of(guider) -> str:
    """Return the guidance that a guider applies, in words; "" if it applies none.

    Raises:
        ValueError: its cfg is no weight of probabilistic guidance, which the model wants.
    """
    cfg = getattr(guider, "cfg", None)
    if not isinstance(cfg, int | float):
        return ""
    if has_probabilistic_guidance(guider.model_patcher):
        if cfg > 1:  # 1 is what guiders with other scales leave there
            guider.model_patcher.model_options["sampler_cfg_function"].guidance(cfg)  # refuses it
        steers = cfg and not is_unconditional(guider.model_patcher)
        return f"guidance {cfg:.3g}" if steers else ""
    return "" if cfg == 1 else f"cfg {cfg:.3g}"


def gm_guider(model, positive, negative=None, scale: float = 0.0) -> comfy.samplers.CFGGuider:
    """Return a guider with weight `scale` on a model from `guided`; on any other, an unguided one.

    Args:
        negative: None stands for no class.

    Raises:
        ValueError: `negative` is missing, and the model takes no classes; or a conditioning is of
            another model.
    """
    of_classes = isinstance(model.model, GMModel)
    if negative is None and scale and not of_classes:
        raise ValueError(
            f"no negative conditioning: guidance with weight {scale:g} needs one to steer away "
            "from; connect one, such as an empty prompt, or set the weight to 0"
        )
    if negative is not None and not scale and not asks_for_negative(model.model_options):
        no_effect("negative", "the weight of the guidance is 0")
    guider, conds = comfy.samplers.CFGGuider(model), {"positive": positive}
    if negative is None and asks_for_negative(model.model_options):
        notice(
            "no negative conditioning, and a node on the model needs one, such as Normalized "
            "Attention Guidance: connect one, or remove that node"
        )
    if negative is not None or (of_classes and scale):
        conds["negative"] = unconditional() if negative is None else negative
    guider.inner_set_conds(conds)
    check_conditioning(model, guider.original_conds)
    guider.set_cfg(scale if has_probabilistic_guidance(model) else 1.0)
    return guider
