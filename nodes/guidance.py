"""Autoguidance (Karras et al. 2024): away from a weaker MODEL of the same thing."""

from __future__ import annotations

from comfy_api.latest import io

from .comfyui.autoguider import AutoGuider
from .comfyui.guiders import check_interval, gm_guider, guided


class GMFlowAutoguidance(io.ComfyNode):
    """Autoguidance as GUIDER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        percent = {"min": 0.0, "max": 1.0, "step": 0.001}
        return io.Schema(
            node_id="GMFlowAutoguidance",
            display_name="Autoguidance",
            category="GMFlow",
            description="Steers away from what a weaker model of the same thing would do, for SamplerCustomAdvanced: the guide "
            "is a smaller or less trained model, or the model itself, weakened. It works with any two models of the same "
            "latents, such as FLUX, and needs no negative conditioning.",
            inputs=[
                io.Model.Input("model", tooltip="The model to sample."),
                io.Model.Input(
                    "guide",
                    tooltip="A weaker model of the same latents: smaller, less trained, with a LoRA at negative strength, or "
                    "with a patch that spoils its attention. One from a file of its own costs memory and no time to change "
                    "between the two.",
                ),
                io.Conditioning.Input("positive", tooltip="What to generate."),
                io.Float.Input(
                    "scale",
                    default=1.5,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="1 is none, and the guide is not even loaded; 1.5 is what MM-FM was measured with. The prediction "
                    "is guide + scale * (model - guide).",
                ),
                io.Float.Input(
                    "start_percent", default=0.0, tooltip=TIPS["start_percent"], **percent
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    tooltip="Guidance ends at this share of the sampling (1 is the finished image). Outside of the interval "
                    "the guide is not called.",
                    **percent,
                ),
                io.Conditioning.Input(
                    "guide_positive",
                    optional=True,
                    tooltip="Another conditioning for the guide, where it needs one; the same if nothing is connected.",
                ),
            ],
            outputs=[io.Guider.Output(tooltip="For SamplerCustomAdvanced, with any sampler.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        guide,
        positive,
        scale: float,
        start_percent: float,
        end_percent: float,
        guide_positive=None,
    ) -> io.NodeOutput:
        check_interval(start_percent, end_percent)
        sampling = model.get_model_object("model_sampling")
        interval = sampling.percent_to_sigma(end_percent), sampling.percent_to_sigma(start_percent)
        return io.NodeOutput(
            AutoGuider(model, guide, positive, guide_positive or positive, scale, interval)
        )


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
        io.Float.Input(
            "orthogonal", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=TIPS["orthogonal"]
        ),
        io.Float.Input("start_percent", default=0.0, tooltip=TIPS["start_percent"], **percent),
        io.Float.Input("end_percent", default=1.0, tooltip=TIPS["end_percent"], **percent),
    ]


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
            inputs=[
                io.Model.Input("model", tooltip="A model from Load GM Model or GM Adapter."),
                *settings_inputs(),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The model with probabilistic cfg: set cfg to a weight in [0, 1), such as 0.2."
                )
            ],
        )

    @classmethod
    def execute(
        cls, model, orthogonal: float, start_percent: float, end_percent: float
    ) -> io.NodeOutput:
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
                io.Float.Input(
                    "scale", default=0.2, min=0.0, max=0.99, step=0.01, tooltip=TIPS["scale"]
                ),
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
        cls,
        model,
        positive,
        scale: float,
        orthogonal: float,
        start_percent: float,
        end_percent: float,
        negative=None,
    ) -> io.NodeOutput:
        model = guided(model, orthogonal, start_percent, end_percent)
        return io.NodeOutput(gm_guider(model, positive, negative, scale))
