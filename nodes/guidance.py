"""Probabilistic guidance: as a patch of a MODEL, and as GUIDER."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io

from .conditioning import unconditional
from .models import GMModel
from .seam import has_probabilistic_guidance, with_probabilistic_guidance

TIPS = {
    "scale": "The weight w of probabilistic guidance: how many standard deviations of the prediction it shifts the samples "
    "away from the negative conditioning. 0 is none; 0.05 to 0.2 suit the digits, 0.45 is the paper's demo on ImageNet.",
    "orthogonal": "How much of the guidance's part along the prediction itself is removed: 1, the paper's choice, keeps "
    "values in range.",
    "start_percent": "Guidance begins at this share of the sampling (0 is pure noise); before it, nothing is guided.",
    "end_percent": "Guidance ends at this share of the sampling (1 is the finished image). Outside of the interval the "
    "negative conditioning is not computed.",
}


def settings_inputs() -> list[io.Input]:
    """The inputs of `guided`."""
    percent = {"min": 0.0, "max": 1.0, "step": 0.001}
    return [
        io.Float.Input("orthogonal", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=TIPS["orthogonal"]),
        io.Float.Input("start_percent", default=0.0, tooltip=TIPS["start_percent"], **percent),
        io.Float.Input("end_percent", default=1.0, tooltip=TIPS["end_percent"], **percent),
    ]


def check_interval(start_percent: float, end_percent: float) -> None:
    """
    Raises:
        ValueError: it is empty.
    """
    if start_percent > end_percent:
        raise ValueError(
            f"start_percent {start_percent:g} comes after end_percent {end_percent:g}; sampling goes from 0 to 1, so the start "
            "must be the smaller one"
        )


def guided(model, orthogonal: float = 1.0, start_percent: float = 0.0, end_percent: float = 1.0):
    """A clone of the MODEL whose `cfg` is the weight of probabilistic guidance.

    Raises:
        ValueError: the interval is empty.
    """
    check_interval(start_percent, end_percent)
    sampling = model.get_model_object("model_sampling")
    if not 0 < float(sampling.sigma_max) <= 1:
        raise ValueError(
            f"probabilistic guidance is for flow models, with sigmas up to 1; a node has given this one others, up to "
            f"{float(sampling.sigma_max):.4g} (ModelSamplingDiscrete, ModelSamplingContinuousEDM and the like): remove it"
        )
    interval = sampling.percent_to_sigma(end_percent), sampling.percent_to_sigma(start_percent)
    return with_probabilistic_guidance(model, orthogonal, interval)


def gm_guider(model, positive, negative=None, scale: float = 0.0) -> comfy.samplers.CFGGuider:
    """A guider with weight `scale` on a model from `guided`, or without guidance on any other.

    Args:
        negative: no class if None.

    Raises:
        ValueError: there is none, and the model takes no classes.
    """
    of_classes = isinstance(model.model, GMModel)
    if negative is None and scale and not of_classes:
        raise ValueError(
            f"guidance with weight {scale:g} needs a negative conditioning to steer away from: connect one, such as an empty "
            "prompt, or set the weight to 0"
        )
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative or (unconditional() if of_classes and scale else positive))
    guider.set_cfg(scale if has_probabilistic_guidance(model) else 1.0)
    return guider


class GMFlowProbabilisticGuidance(io.ComfyNode):
    """MODEL whose cfg is probabilistic."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GMFlowProbabilisticGuidance",
            display_name="GM Probabilistic Guidance",
            category="GMFlow",
            description="Makes the cfg of every sampler and guider behind it the weight w in [0, 1) of probabilistic guidance: "
            "0 is none, 0.1 to 0.5 usual. It steers the predicted distribution instead of extrapolating the velocity, so that "
            "values stay in range. Stock samplers follow the guided mean, GM samplers the whole guided mixture.",
            inputs=[io.Model.Input("model", tooltip="A model from Load GM Model or GM Adapter."), *settings_inputs()],
            outputs=[io.Model.Output(tooltip="The model with probabilistic cfg: set cfg to a weight in [0, 1), such as 0.2.")],
        )

    @classmethod
    def execute(cls, model, orthogonal: float, start_percent: float, end_percent: float) -> io.NodeOutput:
        return io.NodeOutput(guided(model, orthogonal, start_percent, end_percent))


class GMFlowGuider(io.ComfyNode):
    """Probabilistic guidance as GUIDER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GMFlowGuider",
            display_name="GM Guider",
            category="GMFlow",
            description="Probabilistic guidance for SamplerCustomAdvanced: steers the predicted distribution instead of "
            "extrapolating the velocity, so that values stay in range.",
            inputs=[
                io.Model.Input("model", tooltip="A model from Load GM Model or GM Adapter."),
                io.Conditioning.Input("positive", tooltip="What to generate."),
                io.Float.Input("scale", default=0.2, min=0.0, max=0.99, step=0.01, tooltip=TIPS["scale"]),
                *settings_inputs(),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What to steer away from; no class if nothing is connected to a model of classes.",
                ),
            ],
            outputs=[io.Guider.Output(tooltip="For SamplerCustomAdvanced, with any sampler.")],
        )

    @classmethod
    def execute(
        cls, model, positive, scale: float, orthogonal: float, start_percent: float, end_percent: float, negative=None
    ) -> io.NodeOutput:
        model = guided(model, orthogonal, start_percent, end_percent)
        return io.NodeOutput(gm_guider(model, positive, negative, scale))
